"""Quantises a saved checkpoint into each published format, packed number by number as the formats' descriptions say.

Nothing here is shared with what reads the formats, and no transformers is needed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pagoda.layers import Linear
from pagoda_kernels.fp8_linear import Fp8Rows
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

GROUP = 128
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
IN_ORDER = tuple(range(8))

Quantiser = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]
"""From a weight [out, in] to its tensors in the checkpoint, and the numbers that these stand for, float32."""


@dataclass(frozen=True)
class Format:
    name: str
    config: Mapping[str, Any]
    """`quantization_config`."""
    quantise: Quantiser
    rounds_inputs: bool
    """Inputs of a product are rounded to e4m3, with a scale for each row."""
    error: float
    """Bound on the RMS error of the logits that quantisation costs a tiny random model, as a share of their RMS."""


def quantise_folder(folder: Path, target: Path, form: Format) -> dict[str, Tensor]:
    """Write the model of `folder` to `target` with all projections quantised, and return the numbers they stand for."""
    stored, meant = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        matrix = name.removesuffix(".weight")
        if not matrix.endswith("_proj") or matrix == name:
            stored[name] = tensor
            continue
        packed, meant[name] = form.quantise(tensor.float())
        stored |= {f"{matrix}.{own}": value.contiguous() for own, value in packed.items()}
    target.mkdir(exist_ok=True)
    save_file(stored, target / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "quantization_config": form.config}))
    return meant


class ProductErrors:
    """Compares every product of a model with that of the numbers it stands for, on the inputs that it gets."""

    def __init__(self, model: nn.Module, numbers: Mapping[str, Tensor], form: Format) -> None:
        self.worst: dict[str, float] = {}
        """By layer, the largest difference as a share of the largest expected value; NaN is infinitely far."""
        for name, layer in model.named_modules():
            if isinstance(layer, Linear):
                weights = [numbers.get(f"{matrix}.weight") for matrix in layer.matrices(name)]
                if weights[0] is not None:
                    layer.register_forward_hook(partial(self._compare, name, torch.cat(weights), form))  # type: ignore[arg-type]

    def _compare(
        self, name: str, weight: Tensor, form: Format, layer: Linear, inputs: tuple[Tensor | Fp8Rows], output: Tensor
    ) -> None:
        x = meant(inputs[0])
        expected = (rounded(x) if form.rounds_inputs else x) @ weight.T
        if layer._bias is not None:
            expected += layer._bias.float().cpu()
        share = float((output.float().cpu() - expected).abs().max() / expected.abs().max())
        self.worst[name] = max(self.worst.get(name, 0.0), share if share == share else float("inf"))


# ── fp8 ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def meant(x: Tensor | Fp8Rows) -> Tensor:
    """The numbers of a product's inputs [T, in], float32, on the host."""
    if isinstance(x, Fp8Rows):
        return x.values.float().cpu() * x.scales.cpu()[:, None]
    return x.float().cpu()


def rounded(x: Tensor) -> Tensor:
    """The numbers nearest to x [T, in] that e4m3 holds with a scale of max|x| times 1 / 448 for each row."""
    scales = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) * (1 / 448)
    return (x / scales).to(torch.float8_e4m3fn).float() * scales


def _fp8_by_channel(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = weight.abs().amax(dim=1, keepdim=True) * (1 / 448)
    values = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": values, "weight_scale": scale}, values.float() * scale


def _fp8_by_tensor(shape: tuple[int, ...], *, inputs: bool = False) -> Quantiser:
    def quantise(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        scale = weight.abs().max() / 448
        values = (weight / scale).to(torch.float8_e4m3fn)
        stored = {"weight": values, "weight_scale": scale.reshape(shape)}
        if inputs:
            stored["input_scale"] = torch.full(shape, 0.01)
        return stored, values.float() * scale

    return quantise


def _float_quantised(strategy: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
    number = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**number, "strategy": strategy, "dynamic": False},
                "input_activations": {**number, **inputs},
                "output_activations": None,
            }
        },
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }


# ── four bits ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Codes:
    """A weight of (codes - zeros) * scales; codes [out, in], zeros and scales [out, in / 128]."""

    codes: Tensor
    zeros: Tensor
    scales: Tensor

    @property
    def numbers(self) -> Tensor:
        zeros, scales = (x.float().repeat_interleave(GROUP, dim=1) for x in (self.zeros, self.scales))
        return (self.codes.float() - zeros) * scales


def _codes(weight: Tensor, *, symmetric: bool) -> Codes:
    groups = weight.reshape(len(weight), -1, GROUP)
    low, high = groups.amin(dim=2).clamp(max=0), groups.amax(dim=2).clamp(min=0)
    if symmetric:
        scales = (groups.abs().amax(dim=2) / 7.5).half()
        zeros = torch.full(scales.shape, 8)
    else:
        scales = ((high - low) / 15).half()
        zeros = (-low / scales.float()).round().clamp(0, 15).long()
    codes = (groups / scales.float()[..., None]).round() + zeros[..., None]
    return Codes(codes.clamp(0, 15).long().flatten(1), zeros, scales)


def _words(numbers: Tensor, order: tuple[int, ...]) -> Tensor:
    """[rows, 8 n] four-bit numbers as int32 [rows, n]: number order[i] of each eight at bit 4 i."""
    words = torch.zeros(len(numbers), numbers.shape[1] // 8, dtype=torch.int64)
    for i, place in enumerate(order):
        words |= numbers[:, place::8] << (4 * i)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _awq(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    made = _codes(weight, symmetric=False)
    stored = {
        "qweight": _words(made.codes.T, AWQ_ORDER),
        "qzeros": _words(made.zeros.T, AWQ_ORDER),
        "scales": made.scales.T,
    }
    return stored, made.numbers


def _gptq(*, symmetric: bool) -> Quantiser:
    def quantise(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        made = _codes(weight, symmetric=symmetric)
        stored = {
            "qweight": _words(made.codes, IN_ORDER).T,
            "qzeros": _words((made.zeros.T - 1) & 15, IN_ORDER),
            "scales": made.scales.T,
            "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUP,
        }
        return stored, made.numbers

    return quantise


def _pack_quantised(*, symmetric: bool) -> Quantiser:
    def quantise(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        made = _codes(weight, symmetric=symmetric)
        # As published: signed numbers, moved by 8 when they are packed.
        signed, zeros = made.codes - 8, made.zeros - 8
        stored = {
            "weight_packed": _words(signed + 8, IN_ORDER),
            "weight_scale": made.scales,
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            stored["weight_zero_point"] = _words(zeros.T + 8, IN_ORDER).T
        return stored, made.numbers

    return quantise


def _int4_config(*, symmetric: bool) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP, "symmetric": symmetric}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["re:.*lm_head"],
    }


AWQ_CONFIG = {
    "quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm",
    "modules_to_not_convert": None,
}  # fmt: skip
GPTQ_CONFIG = {
    "quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False, "lm_head": False,
    "checkpoint_format": "gptq", "damp_percent": 0.1, "true_sequential": True,
}  # fmt: skip
TOKEN = {"strategy": "token", "dynamic": True}

FP8_BY_CHANNEL = Format(
    "compressed-tensors fp8 by channel", _float_quantised("channel", TOKEN), _fp8_by_channel, True, 0.15
)
AWQ = Format("awq", AWQ_CONFIG, _awq, False, 0.45)
GPTQ = Format("gptq", GPTQ_CONFIG, _gptq(symmetric=False), False, 0.45)
FORMATS = (
    FP8_BY_CHANNEL,
    replace(
        FP8_BY_CHANNEL,
        name="compressed-tensors fp8 by tensor",
        config=_float_quantised("tensor", TOKEN),
        quantise=_fp8_by_tensor((1,)),
    ),
    replace(
        FP8_BY_CHANNEL,
        name="compressed-tensors fp8 with input scales",
        config=_float_quantised("tensor", {"strategy": "tensor", "dynamic": False}),
        quantise=_fp8_by_tensor((1,), inputs=True),
    ),
    Format("fp8", {"quant_method": "fp8", "activation_scheme": "dynamic"}, _fp8_by_tensor(()), True, 0.15),
    Format(
        "fp8 with input scales",
        {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["re:.*lm_head"]},
        _fp8_by_tensor((), inputs=True),
        True,
        0.15,
    ),
    AWQ,
    GPTQ,
    Format("gptq symmetric", {**GPTQ_CONFIG, "sym": True}, _gptq(symmetric=True), False, 0.45),
    Format("pack-quantized", _int4_config(symmetric=False), _pack_quantised(symmetric=False), False, 0.45),
    Format("pack-quantized symmetric", _int4_config(symmetric=True), _pack_quantised(symmetric=True), False, 0.45),
)
