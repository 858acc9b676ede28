"""Folders of quantised checkpoints: trouble is named, what is left plain stays so, what no kernel takes is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.parity import MAX_MODEL_LEN, PROMPT, TOLERANCE, Paged, difference, save
from engine.quantised import AWQ, FORMATS, FP8_BY_CHANNEL, GPTQ, Format, quantise_folder
from engine.quantised_parity import WIDE, assert_means
from engine.quantised_parity import plain as plain
from pagoda import hf_config
from pagoda.errors import CheckpointError, ConfigError
from pagoda.layers import Linear
from pagoda.storage import choice
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM


def say(folder: Path, **changes: Any) -> None:
    """Change config.json's quantization_config."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] = {**config["quantization_config"], **changes}
    file.write_text(json.dumps(config))


def change(folder: Path, tensors: dict[str, Tensor | None]) -> None:
    """Replace, add or (None) remove tensors."""
    file = folder / "model.safetensors"
    held = {**load_file(file), **tensors}
    save_file({name: tensor for name, tensor in held.items() if tensor is not None}, file)


LAYER = "model.layers.1."


def test_every_trouble_of_quantised_tensors_is_named(tmp_path: Path, plain: Path) -> None:
    quantise_folder(plain, tmp_path, AWQ)
    change(
        tmp_path,
        {
            LAYER + "mlp.up_proj.qzeros": None,
            LAYER + "mlp.down_proj.weight": torch.zeros(128, 256),
            LAYER + "mlp.gate_proj.qweight": torch.zeros(128, 32),
            LAYER + "self_attn.o_proj.scales": torch.zeros(2, 128, dtype=torch.float16),
        },
    )
    with pytest.raises(CheckpointError) as caught:
        Paged(tmp_path)
    assert f"1 missing: {LAYER}mlp.up_proj.qzeros;" in caught.value.message
    assert f"1 unexpected: {LAYER}mlp.down_proj.weight;" in caught.value.message
    assert f"{LAYER}self_attn.o_proj.scales (shape [2, 128], not [1, 128])" in caught.value.message
    assert f"1 of another type than I32: {LAYER}mlp.gate_proj.qweight (F32)" in caught.value.message


def test_plain_numbers_are_no_8_bit_floats(tmp_path: Path, plain: Path) -> None:
    quantise_folder(plain, tmp_path, FP8_BY_CHANNEL)
    change(tmp_path, {LAYER + "mlp.down_proj.weight": torch.zeros(128, 256, dtype=torch.bfloat16)})
    with pytest.raises(CheckpointError, match=r"1 of another type than F8_E4M3: .*down_proj\.weight \(BF16\)"):
        Paged(tmp_path)


@pytest.mark.parametrize(
    ("form", "field", "entries"),
    [
        (FP8_BY_CHANNEL, "ignore", ["lm_head", "re:.*layers.1.*mlp"]),
        (AWQ, "modules_to_not_convert", ["model.layers.1.mlp"]),
        (GPTQ, "modules_to_not_convert", ["layers.1.mlp"]),
        (FORMATS[3], "ignored_layers", [f"{LAYER}mlp.{name}_proj" for name in ("gate", "up", "down")]),
    ],
    ids=lambda value: value.name if isinstance(value, Format) else "",
)
def test_matrices_that_the_checkpoint_leaves_stay_plain(
    tmp_path: Path, plain: Path, form: Format, field: str, entries: list[str]
) -> None:
    numbers = quantise_folder(plain, tmp_path, form)
    left = {name: tensor for name, tensor in load_file(plain / "model.safetensors").items() if f"{LAYER}mlp" in name}
    quantised = (name for name in load_file(tmp_path / "model.safetensors") if f"{LAYER}mlp" in name)
    change(tmp_path, {**dict.fromkeys(quantised), **left})
    say(tmp_path, **{field: entries})
    model = LlamaForCausalLM.from_pretrained(plain, attn_implementation="eager")
    numbers = {name: tensor for name, tensor in numbers.items() if name not in left}
    assert_means(model, tmp_path, numbers, form)


def test_parts_of_a_product_must_be_stored_alike(tmp_path: Path, plain: Path) -> None:
    quantise_folder(plain, tmp_path, AWQ)
    say(tmp_path, modules_to_not_convert=["q_proj"])
    with pytest.raises(CheckpointError, match=r"which are one product, the checkpoint leaves .*0\.self_attn\.q_proj"):
        Paged(tmp_path)


def test_biases_that_gptq_adds_are_read(tmp_path: Path, plain: Path) -> None:
    """Its exporters write zeros for models without biases. What is not zero counts."""
    numbers = quantise_folder(plain, tmp_path, GPTQ)
    expected = Paged(tmp_path).prefill(PROMPT, 64)
    sizes = {name.removesuffix(".weight"): len(tensor) for name, tensor in numbers.items()}
    change(tmp_path, {f"{name}.bias": torch.zeros(size, dtype=torch.float16) for name, size in sizes.items()})
    paged = Paged(tmp_path)
    assert torch.equal(paged.prefill(PROMPT, 64), expected)
    assert all(layer._bias is None for layer in paged.model.modules() if isinstance(layer, Linear))
    change(tmp_path, {f"{LAYER}mlp.down_proj.bias": torch.ones(128)})
    assert difference(Paged(tmp_path).prefill(PROMPT, 64), expected) > 300 * TOLERANCE


def test_inputs_in_another_order_are_refused(tmp_path: Path, plain: Path) -> None:
    quantise_folder(plain, tmp_path, GPTQ)
    change(tmp_path, {LAYER + "mlp.down_proj.g_idx": torch.arange(256, dtype=torch.int32) % 2})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj: g_idx: .*desc_act false"):
        Paged(tmp_path)
    quantise_folder(plain, tmp_path, GPTQ)
    change(tmp_path, {LAYER + "self_attn.k_proj.g_idx": torch.ones(128, dtype=torch.int32)})
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.qkv_proj: g_idx: .*desc_act false"):
        Paged(tmp_path)


def _group(form: Format, **changes: Any) -> dict[str, Any]:
    group = {**form.config["config_groups"]["group_0"], **changes}
    return {**form.config, "config_groups": {"group_0": group}}


FP8, PACKED = FP8_BY_CHANNEL.config, FORMATS[-1]
WEIGHTS = FP8["config_groups"]["group_0"]["weights"]
INT4 = PACKED.config["config_groups"]["group_0"]["weights"]
REFUSED = {
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"quant_method 'bitsandbytes'"),
    "gguf": ({"quant_method": "gguf"}, r"quant_method 'gguf'"),
    "no method": ({"bits": 4}, r"quant_method None"),
    "no object": ("awq", r"must be an object, not 'awq'"),
    "odd method": ({"quant_method": ["awq"]}, r"quant_method \['awq'\]"),
    "fp8 blocks": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, r"weight_block_size \[128, 128\]"),
    "fp8 e5m2": ({"quant_method": "fp8", "fmt": "e5m2"}, r"fmt 'e5m2'"),
    "awq 8 bits": ({**AWQ.config, "bits": 8}, r"bits 8 .*\(4 is\)"),
    "awq groups": ({**AWQ.config, "group_size": 64}, r"group_size 64 .*\(128 is\)"),
    "awq gemv": ({**AWQ.config, "version": "GEMV"}, r"version 'gemv' .*\('gemm' is\)"),
    "awq without zeros": ({**AWQ.config, "zero_point": False}, r"zero_point False"),
    "gptq act-order": ({**GPTQ.config, "desc_act": True}, r"desc_act True"),
    "gptq v2": ({**GPTQ.config, "checkpoint_format": "gptq_v2"}, r"checkpoint_format 'gptq_v2'"),
    "gptq marlin": ({**GPTQ.config, "is_marlin_format": True}, r"is_marlin_format True"),
    "gptq rules": ({**GPTQ.config, "dynamic": {"-:.*mlp": {}}}, r"dynamic"),
    "gptq channel": ({**GPTQ.config, "group_size": -1}, r"group_size -1"),
    "ct format": ({**FP8, "format": "int-quantized"}, r"format 'int-quantized'"),
    "ct sparse": ({**FP8, "sparsity_config": {"format": "sparse-24-bitmask"}}, r"sparsity_config"),
    "ct two groups": ({**FP8, "config_groups": {"a": {}, "b": {}}}, r"config_groups \['a', 'b'\] .*one group is"),
    "ct targets": (_group(FP8_BY_CHANNEL, targets=["re:.*q_proj"]), r"config_groups\.group_0\.targets"),
    "ct fp8 blocks": (_group(FP8_BY_CHANNEL, weights={**WEIGHTS, "strategy": "block"}), r"weights\.strategy 'block'"),
    "ct weights alone": (_group(FP8_BY_CHANNEL, input_activations=None), r"input_activations None"),
    "ct int8": (_group(FP8_BY_CHANNEL, weights={**WEIGHTS, "type": "int"}), r"weights\.type 'int'"),
    "ct int8 cache": ({**FP8, "kv_cache_scheme": {"num_bits": 8, "type": "int"}}, r"kv_cache_scheme\.type 'int'"),
    "ct act-order": (_group(PACKED, weights={**INT4, "actorder": "group"}), r"weights\.actorder 'group'"),
    "ct channel": (_group(PACKED, weights={**INT4, "strategy": "channel"}), r"weights\.strategy 'channel'"),
    "names": ({**AWQ.config, "modules_to_not_convert": "lm_head"}, r"modules_to_not_convert must be a list of names"),
    "pattern": ({**FP8, "ignore": ["re:("]}, r"'re:\(' is no regular expression"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_kernel_is_refused_by_name(tmp_path: Path, plain: Path, name: str) -> None:
    said, message = REFUSED[name]
    config = json.loads((plain / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    with pytest.raises(CheckpointError, match=message) as caught:
        hf_config.load(tmp_path)
    assert "config.json: quantization_config" in caught.value.message
    if name not in ("no object", "names", "pattern"):
        assert "unquantised version" in caught.value.message


@pytest.mark.parametrize("quantization", ["auto", "fp8"])
def test_a_mixture_of_experts_is_refused(tmp_path: Path, quantization: str) -> None:
    save(tmp_path, MixtralConfig(**{**WIDE, "num_local_experts": 2, "num_experts_per_tok": 1}), MixtralForCausalLM)
    if quantization == "auto":
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": AWQ.config}))
    config = choice.resolve(quantization, hf_config.load(tmp_path))
    with pytest.raises(CheckpointError, match=r"experts.*have no quantised product .*take an unquantised"):
        Paged(tmp_path, MAX_MODEL_LEN, config)


@pytest.mark.parametrize(
    ("form", "hidden", "message"),
    [(AWQ, 192, r"outputs in eights and inputs in groups of 128"), (FP8_BY_CHANNEL, 72, r"multiples of 16")],
    ids=["awq", "fp8"],
)
def test_sizes_that_no_kernel_takes_are_refused_before_a_tensor_is_read(
    tmp_path: Path, form: Format, hidden: int, message: str
) -> None:
    shape = LlamaConfig(**{**WIDE, "hidden_size": hidden, "head_dim": 16})
    shape.save_pretrained(tmp_path)
    config = {**json.loads((tmp_path / "config.json").read_text()), "architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": form.config}))
    with pytest.raises(CheckpointError, match=rf"model\.layers\.0\.self_attn\.q_proj.*{message}"):
        Paged(tmp_path)


def test_what_is_quantised_is_not_quantised_again(tmp_path: Path, plain: Path) -> None:
    quantise_folder(plain, tmp_path, AWQ)
    with pytest.raises(ConfigError, match=r"quantization='fp8' cannot .*quant_method 'awq'.*set it to 'auto'"):
        choice.resolve("fp8", hf_config.load(tmp_path))
    quantise_folder(plain, tmp_path, FORMATS[3])
    stored = hf_config.load(tmp_path)
    assert choice.resolve("fp8", stored) is stored, "the flag may name the checkpoint's own method"
