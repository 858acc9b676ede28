"""How a checkpoint's matrices are quantised: `quantization_config` of config.json, torch-free.

Read are the formats that have a kernel: fp8 (compressed-tensors' "float-quantized", and the plain "fp8") and 4-bit
groups of 128 inputs (AWQ, GPTQ, compressed-tensors' "pack-quantized"). Whatever else is refused, by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

FIELDS = ("quantization_config", "compression_config")
"""Where config.json says it, in its new and its old word."""
GROUP = 128
REMEDY = "take the checkpoint's unquantised version (parameter quantization='fp8' quantises it while it is loaded)"

Kind = Literal["fp8", "fp8_on_load", "awq", "gptq", "packed"]


class Quantisation(msgspec.Struct, frozen=True, kw_only=True):
    """What the matrices of a model are stored as. The scales of a cache are found by their tensors."""

    kind: Kind
    quant_method: str
    """The checkpoint's word."""
    left: tuple[str, ...] = ()
    """What stays plain: a matrix's name or a stretch of it (`model.layers.0`, `lm_head`), or `re:` and a pattern."""
    per_channel: bool = False
    """fp8: a scale for each output, not one for the matrix."""
    has_input_scales: bool = False
    """fp8: the checkpoint holds a scale for a matrix's inputs."""
    has_zeros: bool = False
    """packed: a group has a zero of its own."""

    def leaves(self, name: str) -> bool:
        """Whether the matrix of this name in the checkpoint is plain."""
        return any(_matches(entry, name) for entry in self.left)


ON_LOAD = Quantisation(kind="fp8_on_load", quant_method="fp8", left=("lm_head",))
"""Plain matrices that become fp8 while they are loaded, all but the head."""


def _matches(entry: str, name: str) -> bool:
    if entry.startswith("re:"):
        return re.match(entry[3:], name) is not None
    return f".{entry}." in f".{name}."


def parse(raw: Mapping[str, Any]) -> Quantisation | None:
    """None for plain weights. Raises ValueError that names the field, its value and a remedy."""
    field = next((name for name in FIELDS if raw.get(name)), None)
    if field is None:
        return None
    said = raw[field]
    if not isinstance(said, dict):
        raise ValueError(f"{field} must be an object, not {said!r}")
    method = said.get("quant_method")
    read = READERS.get(method) if isinstance(method, str) else None
    if read is None:
        known = ", ".join(READERS)
        raise ValueError(f"{field}: quant_method {method!r} is not supported ({known} are): {REMEDY}")
    quantisation = read(_Section(field, str(method), said))
    for entry in quantisation.left:
        _check_pattern(field, entry)
    return quantisation


def _check_pattern(field: str, entry: str) -> None:
    if entry.startswith("re:"):
        try:
            re.compile(entry[3:])
        except re.error as error:
            raise ValueError(f"{field}: {entry!r} is no regular expression ({error}): correct it") from None


class _Section:
    """An object of the configuration that knows its place, for messages."""

    def __init__(self, place: str, method: str, said: Mapping[str, Any]) -> None:
        self.place, self.method, self.said = place, method, said

    def expect(self, name: str, *allowed: object, default: object = None) -> Any:
        """The value of a field. Raises ValueError unless it is one of the allowed ones."""
        value = self.said.get(name, default)
        if isinstance(value, str):
            value = value.lower()
        if value not in allowed:
            raise self.refusal(name, value, f"{' or '.join(map(repr, allowed))} is")
        return value

    def refusal(self, name: str, value: object, supported: str) -> ValueError:
        return ValueError(
            f"{self.place}.{name} {value!r} is not supported with quant_method {self.method!r} ({supported}): {REMEDY}"
        )

    def inner(self, name: str) -> _Section:
        value = self.said.get(name)
        if not isinstance(value, dict):
            raise self.refusal(name, value, "an object is")
        return _Section(f"{self.place}.{name}", self.method, value)

    def names(self, name: str) -> tuple[str, ...]:
        value = self.said.get(name) or []
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise ValueError(f"{self.place}.{name} must be a list of names, not {value!r}")
        return tuple(value)


def _fp8(said: _Section) -> Quantisation:
    said.expect("weight_block_size", None)
    said.expect("fmt", "e4m3", default="e4m3")
    scheme = said.expect("activation_scheme", "dynamic", "static", default="dynamic")
    left = said.names("ignored_layers") + said.names("modules_to_not_convert")
    return Quantisation(
        kind="fp8", quant_method=said.method, left=("lm_head", *left), has_input_scales=scheme == "static"
    )


def _awq(said: _Section) -> Quantisation:
    _expect_groups(said)
    said.expect("zero_point", True, default=True)
    said.expect("version", "gemm", default="gemm")
    return Quantisation(kind="awq", quant_method=said.method, left=("lm_head", *said.names("modules_to_not_convert")))


def _gptq(said: _Section) -> Quantisation:
    _expect_groups(said)
    said.expect("desc_act", False, default=False)
    said.expect("checkpoint_format", "gptq", default="gptq")
    said.expect("is_marlin_format", False, None)
    for name in ("dynamic", "modules_in_block_to_quantize"):
        said.expect(name, None, {}, [])
    head = () if said.said.get("lm_head") else ("lm_head",)
    return Quantisation(kind="gptq", quant_method=said.method, left=(*head, *said.names("modules_to_not_convert")))


def _expect_groups(said: _Section) -> None:
    said.expect("bits", 4)
    said.expect("group_size", GROUP, default=GROUP)


def _compressed_tensors(said: _Section) -> Quantisation:
    groups = said.inner("config_groups")
    if len(groups.said) != 1:
        raise said.refusal("config_groups", sorted(groups.said), "one group is")
    group = groups.inner(next(iter(groups.said)))
    for empty in ("sparsity_config", "transform_config"):
        said.expect(empty, None, {})
    group.expect("targets", ["Linear"])
    group.expect("output_activations", None)
    if said.said.get("kv_cache_scheme"):
        _expect_cache(said.inner("kv_cache_scheme"))
    read = {"float-quantized": _float_quantised, "pack-quantized": _pack_quantised}
    return read[said.expect("format", *read)](group, said.names("ignore"))


def _float_quantised(group: _Section, left: tuple[str, ...]) -> Quantisation:
    weights, inputs = group.inner("weights"), group.inner("input_activations")
    for part in (weights, inputs):
        _expect_number(part, "float", 8)
    is_dynamic = inputs.expect("dynamic", True, False)
    inputs.expect("strategy", "token" if is_dynamic else "tensor")
    return Quantisation(
        kind="fp8",
        quant_method=group.method,
        left=left,
        per_channel=weights.expect("strategy", "channel", "tensor") == "channel",
        has_input_scales=not is_dynamic,
    )


def _pack_quantised(group: _Section, left: tuple[str, ...]) -> Quantisation:
    weights = group.inner("weights")
    group.expect("input_activations", None)
    weights.expect("type", "int")
    weights.expect("num_bits", 4)
    weights.expect("strategy", "group")
    weights.expect("group_size", GROUP)
    # "weight" (also called "static") orders the quantiser's work alone; "group" permutes the inputs.
    weights.expect("actorder", None, "weight", "static")
    symmetric = weights.expect("symmetric", True, False, default=True)
    return Quantisation(kind="packed", quant_method=group.method, left=left, has_zeros=not symmetric)


def _expect_cache(scheme: _Section) -> None:
    _expect_number(scheme, "float", 8)
    scheme.expect("strategy", "tensor", default="tensor")


def _expect_number(said: _Section, kind: str, bits: int) -> None:
    said.expect("type", kind)
    said.expect("num_bits", bits)
    said.expect("symmetric", True, default=True)


READERS = {"compressed-tensors": _compressed_tensors, "fp8": _fp8, "awq": _awq, "gptq": _gptq}
