"""One device's part of a step: weights, KV cache, forward pass, sampling."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import pagoda_kernels
import torch

from pagoda import batch as batches
from pagoda import dummy_weights, memory, models, trials, weights, wishes
from pagoda.config import EngineConfig
from pagoda.cuda_graph import StepGraphs
from pagoda.errors import ConfigError
from pagoda.graph_shapes import Shapes
from pagoda.hf_config import HFConfig
from pagoda.layers import KVCache, Rotary
from pagoda.models import kinds
from pagoda.models.llama import LlamaForCausalLM
from pagoda.plan import Collected, Plan
from pagoda.rows import Rows
from pagoda.sampler import Draw, PromptScores, Sampler
from pagoda.storage import choice

log = logging.getLogger("pagoda.runner")

CPU_BUDGET = 256
"""Tokens: a step of a small model then takes about half a second on two cores."""
GPU_BUDGET = 8192
GPU_MIXED_BUDGET = 2048
"""Tokens: a step of an 8B model then takes about 50 ms on an H100, and streams go on that often beside long prompts."""
LOGITS_STEP = 32
"""Rows: beyond twice as many, logits have one of few sizes. A batch that grows by a request a step would have a new one
each time, tens of MB for which there is no gap, until torch waits for the GPU to give memory back."""
TRIAL_GRAPHS = 4
"""Graphs captured to learn what one takes of the driver's memory."""


@dataclass(frozen=True, slots=True)
class Launched:
    """A step on its way: its plan and where its samples will be."""

    plan: Plan
    draw: Draw | None
    """None when no request of the step is sampled."""
    prompts: PromptScores | None
    """None when no request of the step asks for its prompt's log-probabilities."""


class Runner:
    """Made once, in the thread that will launch steps."""

    def __init__(self, config: EngineConfig, hf_config: HFConfig, folder: Path, max_model_len: int) -> None:
        self.device = resolve_device(config.device)
        self.dtype = resolve_dtype(config.dtype, hf_config.dtype, self.device)
        self.cache_dtype = torch.float8_e4m3fn if config.kv_cache_dtype == "fp8" else self.dtype
        hf_config = choice.resolve(config.quantization, hf_config)
        self.block_size = config.block_size
        self.max_num_batched_tokens, self.max_num_mixed_tokens = resolve_budgets(config, self.device.type)
        self.steps_ahead = 0 if self.device.type == "cpu" else 1
        """How many steps may be launched before the first one's samples are read. A CPU computes in `launch` itself."""
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        if config.batch_invariant:
            check_batch_invariant(self.device, self.dtype)
        self.ops = pagoda_kernels.for_device(self.device, batch_invariant=config.batch_invariant)
        eager = self.device.type == "cpu" or config.enforce_eager
        self.shapes = None
        if not eager:
            self.shapes = Shapes(
                config.max_num_seqs,
                max_model_len,
                self.max_num_batched_tokens,
                widens_cache=self.cache_dtype != self.dtype,
            )
        self.graphs: StepGraphs | None = None
        self._hidden_size, self._vocab_size = hf_config.hidden_size, hf_config.vocab_size
        with memory.turn(self.device):
            self._start(config, hf_config, folder, max_model_len)

    def _start(self, config: EngineConfig, hf_config: HFConfig, folder: Path, max_model_len: int) -> None:
        share = None if self.device.type == "cpu" else memory.Share(self.device, config.gpu_memory_utilization)
        self.sampler = Sampler(self.ops, self.device, hf_config.vocab_size)
        self.rows = Rows(config.max_num_seqs, -(-max_model_len // config.block_size), self.device)
        self.model = self._load(hf_config, folder, dummy=config.load_format == "dummy")
        self.rotary = Rotary(hf_config, max_model_len, self.device)
        block_bytes = hf_config.kv_elements_per_token * config.block_size * self.cache_dtype.itemsize
        fixed = memory.asked_for(config, block_bytes, self.device)
        self.cache = self._make_cache(hf_config, 1)
        if share is not None:
            self._compile(config, max_model_len)
            room = self._measure(share, config, max_model_len) // block_bytes
            fixed = room if fixed is None else fixed
        assert fixed is not None
        memory.check_fits(fixed, max_model_len, config.block_size)
        self.num_blocks = fixed
        self.cache = self._make_cache(hf_config, fixed)
        if share is not None:
            if self.shapes is not None:
                self._capture_largest(self.shapes)
            share.close()
            self._run_largest(config, max_model_len)
            used, total = share.used / memory.GIB, share.total / memory.GIB
            log.info("GPU memory: %.1f of %.1f GiB, a KV cache of %d blocks in it", used, total, fixed)

    def _load(self, hf_config: HFConfig, folder: Path, *, dummy: bool) -> LlamaForCausalLM:
        started = time.monotonic()
        default = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            model = models.build(hf_config, self.ops)
        finally:
            torch.set_default_dtype(default)
        if dummy:
            dummy_weights.fill(model, self.device)
        else:
            weights.load(model, folder, model.tied, self.device)
        log.info("weights %s in %.1f s", "made up" if dummy else "loaded", time.monotonic() - started)
        return model.eval()

    def _make_cache(self, hf_config: HFConfig, num_blocks: int) -> KVCache:
        try:
            return KVCache(hf_config, num_blocks, self.block_size, self.cache_dtype, self.device)
        except torch.OutOfMemoryError:
            raise ConfigError(
                f"a KV cache of {num_blocks} blocks does not fit beside the weights: lower num_kv_blocks "
                "(kv_cache_gib), or leave them to gpu_memory_utilization"
            ) from None

    @torch.inference_mode()
    def _compile(self, config: EngineConfig, max_model_len: int) -> None:
        """All kernels that steps will call, so that no request waits for it."""
        began = time.monotonic()
        with pagoda_kernels.compiling_ahead(), kinds.one_of_each(self.model):
            if self.shapes is not None:
                self._make_graphs(self.shapes).call(self.shapes.all())
            sizes = config.max_num_seqs, self.max_num_mixed_tokens, max_model_len, self.block_size
            for plan in chain(self._largest_steps(config, max_model_len), trials.mixed_steps(*sizes)):
                self.launch(plan)
            for count in range(LOGITS_STEP, config.max_num_seqs, LOGITS_STEP):
                self._logits(torch.zeros(count, self._hidden_size, dtype=self.dtype, device=self.device))
            for chunks in trials.kinds_of_draws(config.max_num_seqs):
                logits = torch.zeros(len(chunks), self._vocab_size, dtype=self.dtype, device=self.device)
                self.sampler.launch(chunks, wishes.of(chunk.request for chunk in chunks), logits)
        log.info("kernels compiled in %.1f s", time.monotonic() - began)

    def _measure(self, share: memory.Share, config: EngineConfig, max_model_len: int) -> int:
        """Bytes that the largest step and the graphs leave of the share, found by running them over a tiny cache.

        The step comes first, since libraries cannot set themselves up while a graph is captured.
        """
        share.begin_peak()
        self._run_largest(config, max_model_len)
        reserve = self._trial_graphs(share, self.shapes) if self.shapes is not None else 0
        room = share.room(reserve)
        self.graphs = None
        torch.cuda.empty_cache()
        return room

    def _run_largest(self, config: EngineConfig, max_model_len: int) -> None:
        for plan in self._largest_steps(config, max_model_len):
            self.collect(self.launch(plan))

    def _largest_steps(self, config: EngineConfig, max_model_len: int) -> Iterator[Plan]:
        return trials.largest_steps(config.max_num_seqs, self.max_num_batched_tokens, max_model_len, self.block_size)

    def _trial_graphs(self, share: memory.Share, shapes: Shapes) -> int:
        """Capture the largest graph, whose memory the others share, and return what the others need beside it."""
        self._capture_largest(shapes)
        before = share.used
        for _ in range(TRIAL_GRAPHS):
            self.use_idle_moment()
        each = (share.used - before) // TRIAL_GRAPHS
        return each * (len(shapes.all()) - 1)

    @torch.inference_mode()
    def _capture_largest(self, shapes: Shapes) -> None:
        """The first, since the others find their memory in its."""
        self.graphs = self._make_graphs(shapes)
        self.graphs.capture(shapes.all()[:1])

    @torch.inference_mode()
    def use_idle_moment(self) -> bool:
        """Prepare something for later steps, in some 20 ms; False when there is nothing left."""
        return self.graphs is not None and self.graphs.capture_another()

    def _make_graphs(self, shapes: Shapes) -> StepGraphs:
        return StepGraphs(self._forward, self._hidden_size, self.dtype, shapes, self.rows, self.block_size)

    def _forward(self, batch: batches.Batch) -> torch.Tensor:
        hidden: torch.Tensor = self.model(batch, self.rotary, self.cache)
        return hidden

    @torch.inference_mode()
    def launch(self, plan: Plan) -> Launched:
        """Start a step; its samples are read with `collect`."""
        if plan.copies:
            self.cache.copy(plan.copies)
        layout = self._lay_out(plan)
        hidden, sample_rows, sampled = self._compute(layout)
        prompts = None
        if layout.scores_prompts:
            prompts = self.sampler.score_prompts(plan.chunks, hidden, self.model.logits)
        if not len(sampled):
            return Launched(plan, None, prompts)
        if len(sampled) < len(hidden):
            hidden = hidden[sample_rows]
        draw = self._draw(plan, layout, hidden)
        self.rows.remember(sampled, draw.tokens)
        return Launched(plan, draw, prompts)

    def _lay_out(self, plan: Plan) -> batches.Layout:
        return batches.lay_out(plan, self.rows, self.block_size)

    def _compute(self, layout: batches.Layout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Hidden states, and the layout's `sample_rows` and `sampled` on the device.

        [T, hidden] where prompts are scored, or all are decodes; else [S, hidden].
        """
        if self.graphs is not None:
            computed = self.graphs.run(layout)
            if computed is not None:
                return computed
        batch, sample_rows, sampled = batches.send(layout, self.rows, self.block_size, self.device)
        return self._forward(batch), sample_rows, sampled

    def _draw(self, plan: Plan, layout: batches.Layout, hidden: torch.Tensor) -> Draw:
        """Samples for hidden states [S, hidden], a row for each chunk that samples."""
        chunks = [c for c in plan.chunks if c.samples]
        return self.sampler.launch(chunks, layout.wishes, self._logits(hidden))

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[S, hidden] to [S, V]."""
        count = len(hidden)
        if self.device.type == "cuda" and count > 2 * LOGITS_STEP and count % LOGITS_STEP:
            padded = hidden.new_empty(-(-count // LOGITS_STEP) * LOGITS_STEP, hidden.shape[1])
            padded[:count] = hidden
            hidden = padded
        return self.model.logits(hidden)[:count]

    def collect(self, launched: Launched) -> Collected:
        """The results of a step; waits for the device."""
        return self.sampler.collect(launched.draw, launched.prompts)


def resolve_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device 'cuda' was asked for and no GPU is visible: run `pagoda doctor`, or set device to 'cpu'"
        )
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def resolve_dtype(name: str, checkpoint: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        name = "float32" if device.type == "cpu" else checkpoint
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"the checkpoint's dtype {name!r} is not known: set dtype to float32, bfloat16 or float16")
    return dtype


def check_batch_invariant(device: torch.device, dtype: torch.dtype) -> None:
    """Raises ConfigError where the same bits are not promised."""
    if device.type != "cpu":
        raise ConfigError(
            f"batch_invariant true is not available on device {device.type!r} yet: "
            "set device to 'cpu', or batch_invariant to false"
        )
    if dtype != torch.float32:
        name = str(dtype).removeprefix("torch.")
        raise ConfigError(
            f"batch_invariant true is not available in dtype {name!r}: "
            "set dtype to 'float32', or batch_invariant to false"
        )


def resolve_budgets(config: EngineConfig, device: str) -> tuple[int, int]:
    """Tokens of a step, and of one with decodes. Raises ConfigError when a full engine's decodes would not fit."""
    least = config.max_num_seqs
    alone, mixed = (CPU_BUDGET, CPU_BUDGET) if device == "cpu" else (GPU_BUDGET, GPU_MIXED_BUDGET)
    given = {
        "max_num_batched_tokens": config.max_num_batched_tokens or max(alone, least),
        "max_num_mixed_tokens": config.max_num_mixed_tokens or max(mixed, least),
    }
    for name, budget in given.items():
        if budget < least:
            raise ConfigError(
                f"{name} {budget} is below max_num_seqs {least}: "
                "a step must have a token for each request; raise the one or lower the other"
            )
    most, beside_decodes = given.values()
    return most, min(most, beside_decodes)
