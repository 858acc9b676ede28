"""Quantised checkpoints, each against transformers' own class with the numbers that its tensors stand for."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pagoda_kernels
import pytest
import torch
from engine.parity import CPU, MAX_MODEL_LEN, PROMPT, SHAPE, Paged, expected_logits, rms, save
from engine.quantised import AWQ, FORMATS, FP8_BY_CHANNEL, GPTQ, Format, quantise_folder
from engine.quantised_parity import WIDE, assert_means
from engine.quantised_parity import plain as plain
from pagoda import dummy_weights, hf_config, models, weights
from pagoda.layers import Linear
from pagoda.storage import choice
from pagoda_kernels.fp8_linear import reference as fp8_reference
from pagoda_kernels.int4_linear import reference as int4_reference
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

formats = pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)


@formats
def test_logits_and_continuation_are_those_of_what_is_stored(tmp_path: Path, plain: Path, form: Format) -> None:
    model = LlamaForCausalLM.from_pretrained(plain, attn_implementation="eager")
    exact = expected_logits(model, PROMPT)
    numbers = quantise_folder(plain, tmp_path, form)
    assert_means(model, tmp_path, numbers, form)
    lost = rms(Paged(tmp_path).prefill(PROMPT, 64) - exact) / rms(exact)
    print(f"{form.name}: quantisation costs {lost:.3f} of the logits' RMS")
    assert 0.001 < lost < form.error


FAMILIES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "phi3": (Phi3Config, Phi3ForCausalLM, {}),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, {"head_dim": 16, "tie_word_embeddings": True}),
}


@pytest.mark.parametrize("form", [FP8_BY_CHANNEL, FORMATS[3], AWQ, GPTQ], ids=lambda form: form.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_biases_joined_matrices_and_tied_heads(tmp_path: Path, family: str, form: Format) -> None:
    config_class, model_class, changes = FAMILIES[family]
    model = save(tmp_path, config_class(**{**WIDE, **changes}), model_class)
    numbers = quantise_folder(tmp_path, tmp_path / "quantised", form)
    assert_means(model, tmp_path / "quantised", numbers, form)


# ── the numbers themselves ────────────────────────────────────────────────────────────────────────────────────────────


def packed_by_reference(folder: Path) -> dict[str, Tensor]:
    """The numbers of each product of a quantised model, by the layer's name."""
    ops = replace(
        pagoda_kernels.for_device(CPU),
        pack_fp8_linear=fp8_reference.pack_fp8_linear,
        fp8_linear=fp8_reference.fp8_linear,
        pack_int4_linear=int4_reference.pack_int4_linear,
        int4_linear=int4_reference.int4_linear,
    )
    model = models.build(hf_config.load(folder), ops)
    weights.load(model, folder, model.tied, CPU)
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, Linear) and name != "lm_head":
            assert isinstance(layer._product, partial)
            packed = layer._product.keywords["packed"]
            found[name] = packed.data if packed.scales is None else packed.data.float() * packed.scales[:, None]
    return found


@formats
def test_numbers_are_bit_for_bit_what_the_layout_says(tmp_path: Path, plain: Path, form: Format) -> None:
    numbers = quantise_folder(plain, tmp_path, form)
    found = packed_by_reference(tmp_path)
    for layer in range(SHAPE["num_hidden_layers"]):
        for joined, parts in (
            ("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("self_attn.o_proj", ("self_attn.o_proj",)),
            ("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
            ("mlp.down_proj", ("mlp.down_proj",)),
        ):
            expected = torch.cat([numbers[f"model.layers.{layer}.{part}.weight"] for part in parts])
            assert torch.equal(found[f"model.layers.{layer}.{joined}"], expected), joined
    assert len(found) == 4 * SHAPE["num_hidden_layers"]


def test_a_plain_checkpoint_is_quantised_while_it_is_loaded(tmp_path: Path, plain: Path) -> None:
    """As the checkpoint with a scale for each output, to the last bit; the head stays plain."""
    quantise_folder(plain, tmp_path, FP8_BY_CHANNEL)
    config = choice.resolve("fp8", hf_config.load(plain))
    assert torch.equal(Paged(plain, MAX_MODEL_LEN, config).prefill(PROMPT, 64), Paged(tmp_path).prefill(PROMPT, 64))


def test_what_is_quantised_keeps_no_plain_copy(plain: Path) -> None:
    """Layers are prepared one after the other, and hold no parameter afterwards that they do not read."""
    config = choice.resolve("fp8", hf_config.load(plain))
    model = models.build(config, pagoda_kernels.for_device(CPU))
    plain_bytes: list[int] = []

    class Watched(Linear):
        def prepare(self) -> None:
            held = [p for p in model.parameters() if p.device.type != "meta" and p.dim() == 2]
            plain_bytes.append(sum(p.nbytes for p in held))
            super().prepare()

    for layer in model.modules():
        if type(layer) is Linear:
            layer.__class__ = Watched
    weights.load(model, plain, model.tied, CPU)
    embedding = config.vocab_size * config.hidden_size * 4
    largest = 2 * config.intermediate_size * config.hidden_size * 4
    assert max(plain_bytes) <= embedding + largest
    assert [name for name, _ in model.named_parameters() if "proj" in name or "head" in name] == []


# ── made-up weights ───────────────────────────────────────────────────────────────────────────────────────────────────


@formats
def test_made_up_weights_have_the_size_of_plain_ones(tmp_path: Path, plain: Path, form: Format) -> None:
    quantise_folder(plain, tmp_path, form)
    (tmp_path / "model.safetensors").unlink()
    found = []
    for folder in (tmp_path, plain):
        model = models.build(hf_config.load(folder), pagoda_kernels.for_device(CPU))
        dummy_weights.fill(model, CPU)
        x = torch.randn(64, WIDE["hidden_size"], generator=torch.Generator().manual_seed(3))
        with torch.inference_mode():
            found.append(model.model.layers[0].mlp.gate_up_proj(x))
    assert not found[0].isnan().any()
    assert rms(found[0]) == pytest.approx(rms(found[1]), rel=0.05)
