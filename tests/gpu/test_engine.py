"""The engine on a GPU: CUDA graphs and a step ahead give the tokens of a plain float32 run, whatever the load."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
from pagoda import hf_config
from pagoda.allocation import BlockAllocator
from pagoda.batch import Layout
from pagoda.block_pool import BlockPool
from pagoda.config import EngineConfig
from pagoda.cuda_graph import StepGraph
from pagoda.graph_shapes import Shape
from pagoda.plan import Chunk, Plan
from pagoda.request import Request, Status
from pagoda.runner import Launched, Runner
from pagoda.sampling_params import SamplingParams
from pagoda.scheduler import Scheduler
from safetensors.torch import save_file

pytestmark = pytest.mark.native

VOCAB, HIDDEN, INNER, LAYERS, HEADS, KV_HEADS = 2048, 256, 512, 3, 8, 2
MAX_LEN = 512
GREEDY = SamplingParams(temperature=0)
DRAWN = (
    GREEDY,
    SamplingParams(temperature=0.8, top_k=50, top_p=0.9),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=1.2, min_p=0.05),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose logits lie far apart: rounding does not change the largest."""
    path = tmp_path_factory.mktemp("tiny")
    config = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": INNER,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-5, "max_position_embeddings": MAX_LEN, "torch_dtype": "float32",
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    draw = torch.Generator().manual_seed(0)
    kv = HIDDEN // HEADS * KV_HEADS
    shapes = {"model.embed_tokens": (VOCAB, HIDDEN), "lm_head": (VOCAB, HIDDEN), "model.norm": (HIDDEN,)}
    for layer in range(LAYERS):
        parts = {
            "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (kv, HIDDEN), "self_attn.v_proj": (kv, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
            "mlp.down_proj": (HIDDEN, INNER), "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,),
        }  # fmt: skip
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in parts.items()}
    tensors = {
        f"{name}.weight": torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=draw) * 0.1
        for name, shape in shapes.items()
    }
    save_file(tensors, path / "model.safetensors")
    return path


def prompts() -> list[list[int]]:
    """Lengths from one token to several chunks; some begin alike."""
    draw = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, VOCAB, (1 + 9 * i,), generator=draw).tolist() for i in range(36)]
    return [*ids, [*ids[20][:100], 5, 6], [*ids[20][:64], 7]]


def make_runner(folder: Path, max_len: int = MAX_LEN, **settings: object) -> Runner:
    given = {"model": str(folder), "dtype": "float32", "num_kv_blocks": 2000, "max_num_seqs": 24, **settings}
    config = EngineConfig(**given)  # type: ignore[arg-type]
    return Runner(config, hf_config.load(folder), folder, max_len)


def generate(
    runner: Runner,
    params: tuple[SamplingParams, ...],
    work: list[list[int]] | None = None,
    *,
    burst: int = 38,
    budget: int = 96,
    output: int = 20,
) -> tuple[Scheduler, list[list[int]]]:
    """Serve `work`, `burst` new ones before each step: the scheduler in the end, and the answers."""
    scheduler = Scheduler(
        BlockAllocator(BlockPool(runner.num_blocks), block_size=runner.block_size, enable_prefix_caching=True),
        max_num_seqs=runner.rows.spare,
        max_num_batched_tokens=budget,
        max_num_queued_requests=100,
        max_num_queued_tokens=100_000,
    )
    everything = [
        Request(i, ids, params[i % len(params)], output + i % 7, frozenset(), 1000 + i)
        for i, ids in enumerate(work or prompts())
    ]
    left, in_flight = deque(everything), deque[Launched]()
    while left or scheduler.requests or in_flight:
        for _ in range(min(burst, len(left))):
            scheduler.add(left.popleft())
        plan = scheduler.schedule()
        if plan:
            in_flight.append(runner.launch(plan))
        if in_flight and (not plan or len(in_flight) > runner.steps_ahead):
            launched = in_flight.popleft()
            collected = runner.collect(launched)
            scheduler.update(launched.plan, collected.token_ids, collected.logprobs)
            scheduler.check()
    return scheduler, [request.token_ids[request.num_prompt_tokens :] for request in everything]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Shape]:
    """The shapes of the graphs that run."""
    shapes: list[Shape] = []
    run = StepGraph.run

    def record(self: StepGraph, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
        shapes.append(self.shape)
        return run(self, layout)

    monkeypatch.setattr(StepGraph, "run", record)
    return shapes


@pytest.fixture(scope="module")
def reference(folder: Path) -> list[list[int]]:
    """The CPU's tokens, nothing ahead."""
    return generate(make_runner(folder, device="cpu"), (GREEDY,), budget=4096)[1]


@pytest.mark.parametrize("burst", [38, 3], ids=["all at once", "three a step"])
@pytest.mark.parametrize("enforce_eager", [False, True], ids=["graphs", "eager"])
def test_greedy_tokens_under_load_are_the_reference_ones(
    folder: Path, reference: list[list[int]], ran: list[Shape], burst: int, enforce_eager: bool
) -> None:
    runner = make_runner(folder, device="cuda", enforce_eager=enforce_eager)
    assert runner.steps_ahead == 1
    assert generate(runner, (GREEDY,), burst=burst)[1] == reference
    assert {shape.chunks > 0 for shape in ran} == (set() if enforce_eager else {False, True})


@pytest.mark.parametrize("enforce_eager", [False, True], ids=["graphs", "eager"])
def test_a_common_prefix_is_read_once_and_changes_no_token(folder: Path, ran: list[Shape], enforce_eager: bool) -> None:
    draw = torch.Generator().manual_seed(2)
    prefix = torch.randint(0, VOCAB, (300,), generator=draw).tolist()
    work = [[*prefix, *torch.randint(0, VOCAB, (1 + i,), generator=draw).tolist()] for i in range(40)]
    _, expected = generate(make_runner(folder, device="cpu", max_num_seqs=40), (GREEDY,), work, budget=4096, output=50)
    runner = make_runner(folder, device="cuda", max_num_seqs=40, enforce_eager=enforce_eager)
    scheduler, answers = generate(runner, (GREEDY,), work, burst=1, budget=512, output=50)
    assert scheduler.counters.prefix_hit_tokens > 30 * 256
    assert answers == expected
    assert any(shape.shares_prefix for shape in ran) != enforce_eager


@pytest.mark.parametrize("enforce_eager", [False, True], ids=["graphs", "eager"])
def test_preempted_requests_are_recomputed_to_the_same_tokens(folder: Path, enforce_eager: bool) -> None:
    """A preemption drops a token that is still on the device."""
    work = prompts()[:16]
    _, expected = generate(make_runner(folder, device="cpu"), (GREEDY,), work, budget=4096, output=100)
    runner = make_runner(folder, device="cuda", num_kv_blocks=64, enforce_eager=enforce_eager)
    scheduler, answers = generate(runner, (GREEDY,), work, output=100)
    assert scheduler.counters.preemptions > 3
    assert answers == expected


def test_prompts_are_scored_beside_others(folder: Path) -> None:
    scored, plain = SamplingParams(temperature=0, prompt_logprobs=0), GREEDY
    found = []
    for device in ("cpu", "cuda"):
        runner = make_runner(folder, device=device)
        requests = [Request(i, prompts()[20 + i], p, 2, frozenset(), i) for i, p in enumerate((plain, scored, plain))]
        for i, request in enumerate(requests):
            request.status = Status.RUNNING
            request.block_ids = list(range(20 * i, 20 * i + 20))
        chunks = [Chunk(request, 0, request.num_tokens, True, False, 0) for request in requests]
        collected = runner.collect(runner.launch(Plan(0, chunks)))
        ((chunk, scores),) = collected.prompt_logprobs
        assert chunk is chunks[1]
        found.append((collected.token_ids, [score.logprob for score in scores]))
    (expected_ids, expected), (ids, got) = found
    assert ids == expected_ids
    assert len(got) == len(prompts()[21]) - 1
    assert got == pytest.approx(expected, abs=1e-3)


def test_drawn_tokens_are_the_same_with_and_without_graphs(folder: Path) -> None:
    _, graphs = generate(make_runner(folder, device="cuda"), DRAWN)
    _, eager = generate(make_runner(folder, device="cuda", enforce_eager=True), DRAWN)
    assert graphs == eager


def test_no_step_waits_for_a_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a whole batch asks for, or one request of it, its kernels were compiled before the engine served."""
    from triton.runtime.jit import JITFunction

    runner = make_runner(folder, device="cuda", dtype="bfloat16")
    compiled: list[str] = []
    compile_kernel = JITFunction._do_compile

    def record(self: JITFunction, *args: Any, **options: Any) -> Any:
        compiled.append(self.fn.__name__)
        return compile_kernel(self, *args, **options)

    monkeypatch.setattr(JITFunction, "_do_compile", record)
    asked = (
        *DRAWN,
        SamplingParams(temperature=0, repetition_penalty=1.1),
        SamplingParams(temperature=0, allowed_token_ids=(1, 2, 3), logprobs=2),
        SamplingParams(temperature=0.8, top_k=50, logit_bias={3: 1.0}),
        SamplingParams(temperature=1.0, presence_penalty=0.5, prompt_logprobs=1),
    )
    for params in asked:
        generate(runner, (params,), burst=5, output=4)
    generate(runner, asked, output=4)
    assert not compiled


SHARE = """
import sys, time, json, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
from gpu.test_engine import DRAWN, generate, make_runner
from pagoda import memory
shares = []
begin = memory.Share.__init__
memory.Share.__init__ = lambda self, *a: (begin(self, *a), shares.append(self))[0]
runner = make_runner(Path({folder!r}), device="cuda", num_kv_blocks=None, gpu_memory_utilization={share})
generate(runner, DRAWN)
print(json.dumps([runner.num_blocks, torch.cuda.memory_reserved(), shares[0].limit, shares[0].total]), flush=True)
sys.stdin.read()
"""


def test_two_engines_keep_to_their_shares(folder: Path) -> None:
    """They start at the same moment; what the GPU then holds is within both shares together."""
    before = _used()
    tests = str(Path(__file__).parents[1])
    shares = (0.3, 0.4)
    engines = [
        subprocess.Popen(
            [sys.executable, "-c", SHARE.format(tests=tests, folder=str(folder), share=share)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for share in shares
    ]
    try:
        lines = [engine.stdout.readline() for engine in engines if engine.stdout]
        used = _used() - before
    finally:
        for engine in engines:
            engine.communicate("")
    for line, share in zip(lines, shares, strict=True):
        num_blocks, reserved, limit, total = json.loads(line)
        assert limit == int(share * total)
        assert 0.9 * limit < reserved < limit, f"{reserved} of {limit} bytes, {num_blocks} blocks"
    assert used < sum(shares) * json.loads(lines[0])[3]


def _used() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free


def test_padded_logits_are_those_of_their_rows(folder: Path) -> None:
    """From 65 rows on they are padded, to have few sizes."""
    runner = make_runner(folder, device="cuda", enforce_eager=True)
    for count in (1, 64, 65, 96, 100):
        hidden = torch.randn(count, HIDDEN, device=runner.device)
        torch.testing.assert_close(runner._logits(hidden), runner.model.logits(hidden))
