"""Quantised models on a GPU in bfloat16: their products, their logits beside the CPU's in float32, and their memory."""

from __future__ import annotations

import json
from pathlib import Path

import pagoda_kernels
import pytest
import torch
from engine.quantised import FORMATS, FP8_BY_CHANNEL, Format, ProductErrors, quantise_folder
from gpu.test_engine import GREEDY, LAYERS, MAX_LEN, generate, prompts
from gpu.test_engine import folder as folder
from pagoda import dummy_weights, hf_config, models
from pagoda.batch import Layout
from pagoda.config import EngineConfig
from pagoda.plan import Plan
from pagoda.runner import Runner
from pagoda.sampler import Draw
from pagoda.storage import choice
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.native

PRODUCT_ERROR = 0.02
"""Largest difference of a product, as a share of its largest number: bfloat16, and 8-bit sums of 14 bits."""
LOGIT_ERROR, LOGIT_ERROR_OF_ROUNDED_INPUTS = 0.04, 0.12
"""RMS error of logits as a share of their RMS. A CPU in bfloat16 is off by 0.016 and 0.055."""

formats = pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)


@pytest.fixture(scope="module")
def calm(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with layers that say less: in a chaotic one a single rounding changes everything after it."""
    path = tmp_path_factory.mktemp("calm")
    tensors = load_file(folder / "model.safetensors")
    save_file({name: x * 0.3 if "_proj" in name else x for name, x in tensors.items()}, path / "model.safetensors")
    (path / "config.json").write_text((folder / "config.json").read_text())
    return path


class Watched(Runner):
    """Keeps the logits [V] that every token was drawn from, by request and position."""

    def __init__(self, *arguments: object) -> None:
        self.logits: dict[tuple[object, int], torch.Tensor] = {}  # first: a runner launches steps while it is made
        super().__init__(*arguments)  # type: ignore[arg-type]

    def _draw(self, plan: Plan, layout: Layout, hidden: torch.Tensor) -> Draw:
        chunks = [c for c in plan.chunks if c.samples]
        for chunk, row in zip(chunks, self.model.logits(hidden), strict=True):
            self.logits[chunk.request.key, chunk.start + chunk.count] = row.float().cpu()
        return super()._draw(plan, layout, hidden)


def make_runner(folder: Path, **settings: object) -> Watched:
    given = {"model": str(folder), "num_kv_blocks": 2000, "max_num_seqs": 24, **settings}
    config = EngineConfig(**given)  # type: ignore[arg-type]
    runner = Watched(config, hf_config.load(folder), folder, MAX_LEN)
    runner.logits = {}
    return runner


def answer(runner: Watched, budget: int = 96) -> list[list[int]]:
    return generate(runner, (GREEDY,), budget=budget)[1]


def error(got: Watched, expected: Watched, answers: tuple[list[list[int]], list[list[int]]]) -> float:
    """RMS error of logits as a share of their RMS, of all tokens that follow the same ones in both."""
    wrong = whole = compared = 0.0
    for key, (prompt, ours, theirs) in enumerate(zip(prompts(), *answers, strict=True)):
        common = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(ours) - 1)
        for position in range(len(prompt), len(prompt) + common + 1):
            row = expected.logits[key, position]
            wrong += float((got.logits[key, position] - row).square().sum())
            whole += float(row.square().sum())
            compared += 1
    assert compared > 4 * len(prompts()), "hardly a decoded token was compared"
    return (wrong / whole) ** 0.5


@formats
def test_products_and_logits(tmp_path: Path, calm: Path, form: Format) -> None:
    numbers = quantise_folder(calm, tmp_path, form)
    reference = make_runner(tmp_path, device="cpu", dtype="float32")
    runner = make_runner(tmp_path, device="cuda", dtype="bfloat16", enforce_eager=True)
    products = ProductErrors(runner.model, numbers, form)
    off = error(runner, reference, (answer(runner), answer(reference, 4096)))
    print(f"{form.name}: products within {max(products.worst.values()):.1e}, logits {off:.1e}")
    assert len(products.worst) == 4 * LAYERS
    assert max(products.worst.values()) < PRODUCT_ERROR
    assert off < (LOGIT_ERROR_OF_ROUNDED_INPUTS if form.rounds_inputs else LOGIT_ERROR)


@formats
def test_graphs_change_little(tmp_path: Path, calm: Path, form: Format) -> None:
    """A padded step may take another tile, whose sums have another order."""
    quantise_folder(calm, tmp_path, form)
    eager, graphs = (
        make_runner(tmp_path, device="cuda", dtype="bfloat16", enforce_eager=is_eager) for is_eager in (True, False)
    )
    off = error(graphs, eager, (answer(graphs), answer(eager)))
    assert off < (LOGIT_ERROR_OF_ROUNDED_INPUTS if form.rounds_inputs else LOGIT_ERROR)


@pytest.mark.parametrize("has_scales", [False, True], ids=["no scales", "scales"])
@pytest.mark.parametrize("enforce_eager", [False, True], ids=["graphs", "eager"])
def test_a_cache_of_8_bits(tmp_path: Path, calm: Path, enforce_eager: bool, has_scales: bool) -> None:
    scales = {
        f"model.layers.{layer}.self_attn.{name}_scale": torch.tensor([0.01 * (layer + 1)])
        for name in ("k", "v")
        for layer in range(LAYERS if has_scales else 0)
    }
    save_file({**load_file(calm / "model.safetensors"), **scales}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((calm / "config.json").read_text())
    reference = make_runner(tmp_path, device="cpu", dtype="float32", kv_cache_dtype="fp8")
    runner = make_runner(tmp_path, device="cuda", dtype="bfloat16", kv_cache_dtype="fp8", enforce_eager=enforce_eager)
    assert runner.cache.keys.dtype == torch.float8_e4m3fn
    assert error(runner, reference, (answer(runner), answer(reference, 4096))) < LOGIT_ERROR


def test_all_of_it_at_once_with_made_up_weights(tmp_path: Path, folder: Path) -> None:
    quantise_folder(folder, tmp_path, FP8_BY_CHANNEL)
    (tmp_path / "model.safetensors").unlink()
    runner = make_runner(tmp_path, device="cuda", dtype="bfloat16", load_format="dummy", kv_cache_dtype="fp8")
    assert len({tuple(tokens) for tokens in answer(runner)}) > 10


def test_plain_weights_are_gone_before_the_next_layer_s_come(tmp_path: Path) -> None:
    """The most that is held while a model is quantised is its 8-bit form and a layer or two."""
    hidden, inner, layers, vocab = 2048, 8192, 16, 1024
    config = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": 16, "num_key_value_heads": 16, "rms_norm_eps": 1e-5,
        "max_position_embeddings": MAX_LEN, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    device = torch.device("cuda", torch.cuda.current_device())
    shape = choice.resolve("fp8", hf_config.load(tmp_path))
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = models.build(shape, pagoda_kernels.for_device(device))
    finally:
        torch.set_default_dtype(torch.float32)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    dummy_weights.fill(model, device)
    matrices = layers * (4 * hidden * hidden + 3 * hidden * inner)
    held = torch.cuda.memory_allocated(device) - before
    assert held == pytest.approx(matrices + 2 * 2 * vocab * hidden, rel=0.02)
    largest = 2 * inner * hidden
    assert torch.cuda.max_memory_allocated(device) - before < held + 20 * largest
    assert 20 * largest < matrices, "or the bound would say little"
