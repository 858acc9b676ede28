"""A KV cache of 8-bit floats: what it holds, what it costs, and that a checkpoint's scales are used."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.parity import BLOCK_SIZE, CPU, MAX_MODEL_LEN, PROMPT, SHAPE, Paged, difference, expected_logits, rms
from engine.quantised import FORMATS, FP8_BY_CHANNEL, quantise_folder
from engine.quantised_parity import FP8_TOLERANCE, WIDE
from engine.quantised_parity import plain as plain
from engine.test_models_batched import generate
from pagoda import config, hf_config
from pagoda.errors import CheckpointError, ConfigError
from pagoda.layers import KVCache
from pagoda.runner import Runner
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.models.llama import modeling_llama

LAYERS = SHAPE["num_hidden_layers"]
KEY_SCALES = [0.004 * (layer + 1) for layer in range(LAYERS)]
VALUE_SCALES = [0.003 * (layer + 1) for layer in range(LAYERS)]


@pytest.fixture
def scaled(plain: Path, tmp_path: Path) -> Path:
    """The same model with scales for the cache of each layer."""
    scales = {
        f"model.layers.{layer}.self_attn.{name}_scale": torch.tensor([values[layer]])
        for name, values in (("k", KEY_SCALES), ("v", VALUE_SCALES))
        for layer in range(LAYERS)
    }
    save_file({**load_file(plain / "model.safetensors"), **scales}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((plain / "config.json").read_text())
    return tmp_path


class Paged8(Paged):
    """Over a cache of 8-bit floats, full of NaN where nothing was written."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        shape = hf_config.load(folder)
        self.cache = KVCache(shape, self.cache.keys.shape[1], BLOCK_SIZE, torch.float8_e4m3fn, CPU)
        self.cache.keys.fill_(float("nan"))
        self.cache.values.fill_(float("nan"))


def held(x: Tensor, scale: float) -> Tensor:
    """What a cache holds of x."""
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


@pytest.mark.parametrize("has_scales", [False, True], ids=["no scales", "scales"])
def test_logits_are_those_of_rounded_keys_and_values(
    plain: Path, scaled: Path, has_scales: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    key_scales, value_scales = (KEY_SCALES, VALUE_SCALES) if has_scales else ([1.0] * LAYERS, [1.0] * LAYERS)
    model = LlamaForCausalLM.from_pretrained(plain, attn_implementation="eager")
    exact = expected_logits(model, PROMPT)
    rotate, calls = modeling_llama.apply_rotary_pos_emb, iter(key_scales)

    def rotate_and_round(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        q, k = rotate(*arguments, **options)
        return q, held(k, next(calls))

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotate_and_round)
    for layer, scale in zip(model.model.layers, value_scales, strict=True):
        layer.self_attn.v_proj.register_forward_hook(lambda _, __, v, scale=scale: held(v, scale))
    expected = expected_logits(model, PROMPT)
    got = Paged8(scaled if has_scales else plain).prefill(PROMPT, 9)
    lost = rms(got - exact) / rms(exact)
    print(f"logits within {difference(got, expected):.1e}; the cache costs {lost:.4f} of their RMS")
    assert difference(got, expected) < FP8_TOLERANCE / 5
    assert 0.0005 < lost < 0.1
    assert rms(got - expected) < lost * rms(exact) / 5, "it is the rounding that is reproduced"


def test_scales_mean_nothing_to_a_cache_of_the_models_own_type(plain: Path, scaled: Path) -> None:
    assert torch.equal(Paged(scaled).prefill(PROMPT, 9), Paged(plain).prefill(PROMPT, 9))


@pytest.mark.parametrize("scale", [0.0, float("nan")])
def test_a_scale_that_is_none_is_refused(scaled: Path, scale: float) -> None:
    file = scaled / "model.safetensors"
    save_file({**load_file(file), "model.layers.2.self_attn.v_scale": torch.tensor(scale)}, file)
    with pytest.raises(CheckpointError, match=r"layers\.2\.self_attn\.attention: k_scale .* must be positive"):
        Paged(scaled)


def test_blocks_are_copied(plain: Path) -> None:
    cache = KVCache(hf_config.load(plain), 6, BLOCK_SIZE, torch.float8_e4m3fn, CPU)
    for data in (cache.keys, cache.values):
        data.copy_(torch.randn(data.shape, generator=torch.Generator().manual_seed(0)))
    before = cache.values.float()
    cache.copy([(1, 4), (3, 0)])
    assert torch.equal(cache.values[:, [4, 0]].float(), before[:, [1, 3]])
    assert torch.equal(cache.values[:, [1, 2, 3, 5]].float(), before[:, [1, 2, 3, 5]])


# ── through the engine's parameters ───────────────────────────────────────────────────────────────────────────────────


def make_runner(folder: Path, **settings: object) -> Runner:
    given = {"model": str(folder), "block_size": BLOCK_SIZE, "max_num_seqs": 4, "device": "cpu", **settings}
    return Runner(config.from_parameters(given), hf_config.load(folder), folder, MAX_MODEL_LEN)


def test_it_holds_more_tokens_in_the_same_memory(plain: Path) -> None:
    runners = [make_runner(plain, kv_cache_gib=0.002, kv_cache_dtype=dtype) for dtype in ("auto", "fp8")]
    assert [runner.cache.keys.dtype for runner in runners] == [torch.float32, torch.float8_e4m3fn]
    sizes = [runner.cache.keys.nbytes + runner.cache.values.nbytes for runner in runners]
    assert max(sizes) <= 0.002 * 2**30
    block_bytes = 2 * LAYERS * BLOCK_SIZE * WIDE["num_key_value_heads"] * 16
    assert runners[1].num_blocks == int(0.002 * 2**30) // block_bytes
    assert runners[0].num_blocks == int(0.002 * 2**30) // (4 * block_bytes)


def test_requests_in_one_batch_share_prefixes_in_it(plain: Path) -> None:
    """Each continuation is the one it has alone."""
    prompts = [PROMPT[:n] for n in (1, 8, 17, 40)] + [[*PROMPT[:40], 5, 6, 7]]
    settings = {"kv_cache_dtype": "fp8", "batch_invariant": True}
    together = generate(plain, prompts, 10, 24, **settings)
    assert together == [generate(plain, [prompt], 10, 256, **settings)[0] for prompt in prompts]


@pytest.mark.parametrize("form", [*FORMATS, None], ids=lambda form: form.name if form else "fp8 on load")
def test_a_configuration_alone_runs_with_made_up_weights(
    tmp_path: Path, plain: Path, form: Any, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"load_format": "dummy", "kv_cache_dtype": "fp8"}
    if form is None:
        (tmp_path / "config.json").write_text((plain / "config.json").read_text())
        settings["quantization"] = "fp8"
    else:
        quantise_folder(plain, tmp_path, form)
        (tmp_path / "model.safetensors").unlink()
    with caplog.at_level(logging.INFO, "pagoda.storage"):
        tokens = generate(tmp_path, [PROMPT[:20]], 8, 256, **settings)[0]
    assert len(tokens) == 8
    assert len(set(tokens)) > 1
    assert f"{4 * LAYERS} products of quantised weights" in caplog.text
    assert ("input scales are not used" in caplog.text) == (form is not None and "input scales" in form.name)


def test_a_quantised_checkpoint_is_not_quantised_again(tmp_path: Path, plain: Path) -> None:
    quantise_folder(plain, tmp_path, FP8_BY_CHANNEL)
    with pytest.raises(ConfigError, match="quantised already"):
        make_runner(tmp_path, quantization="fp8")


@pytest.mark.parametrize(
    ("name", "value"), [("quantization", "awq"), ("kv_cache_dtype", "fp8_e5m2"), ("kv_cache_dtype", "int8")]
)
def test_other_words_are_refused(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}.*{value}"):
        config.from_parameters({"model": "m", name: value})


def test_a_cache_scheme_is_accepted_without_scales(tmp_path: Path, plain: Path) -> None:
    quantise_folder(plain, tmp_path, FP8_BY_CHANNEL)
    file = tmp_path / "config.json"
    said = json.loads(file.read_text())
    said["quantization_config"]["kv_cache_scheme"] = {
        "num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True,
    }  # fmt: skip
    file.write_text(json.dumps(said))
    assert Paged8(tmp_path).prefill(PROMPT, 9).isfinite().all()
