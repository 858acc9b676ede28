"""Which scheme stores which matrix: chosen here, once, by the matrix's name in the checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Collection

import msgspec
from torch import nn

from pagoda.errors import CheckpointError, ConfigError
from pagoda.hf_config import HFConfig
from pagoda.hf_quantisation import ON_LOAD, Quantisation
from pagoda.layers import GroupedLinear, Linear
from pagoda.storage.fp8 import Fp8, Fp8OnLoad
from pagoda.storage.int4 import Awq, Gptq, PackQuantised
from pagoda.storage.scheme import Scheme

log = logging.getLogger("pagoda.storage")


def resolve(quantization: str, config: HFConfig) -> HFConfig:
    """The model with what the engine's parameter adds: `auto` leaves the checkpoint's word, `fp8` quantises it.

    Raises ConfigError when the checkpoint is quantised otherwise already.
    """
    stored = config.quantisation
    if quantization == "auto" or (stored is not None and stored.quant_method == quantization):
        return config
    if stored is not None:
        raise ConfigError(
            f"parameter quantization={quantization!r} cannot quantise a checkpoint that is quantised already "
            f"(quant_method {stored.quant_method!r}): set it to 'auto'"
        )
    return msgspec.structs.replace(config, quantisation=ON_LOAD)


def store(model: nn.Module, quantisation: Quantisation | None, tied: Collection[str]) -> None:
    """Give the matrices of a model on the meta device their schemes; weights in `tied` are another layer's.

    Raises CheckpointError that names the matrix which cannot be stored so.
    """
    if quantisation is None:
        return
    experts = next((name for name, layer in model.named_modules() if isinstance(layer, GroupedLinear)), None)
    if experts is not None:
        raise CheckpointError(
            f"{experts}: the experts of a mixture have no quantised product (quant_method "
            f"{quantisation.quant_method!r}): take an unquantised checkpoint, with parameter quantization 'auto'"
        )
    count = 0
    for name, layer in model.named_modules():
        if isinstance(layer, Linear) and f"{name}.weight" not in tied and _is_quantised(quantisation, layer, name):
            _store_as(scheme(quantisation), layer, name)
            count += 1
    log.info("%d products of quantised weights: %s (%s)", count, quantisation.kind, quantisation.quant_method)
    if quantisation.has_input_scales:
        log.info("the checkpoint's input scales are not used: inputs get a scale for each row, which loses less")


def scheme(quantisation: Quantisation) -> Scheme:
    match quantisation.kind:
        case "fp8":
            return Fp8(per_channel=quantisation.per_channel, has_input_scale=quantisation.has_input_scales)
        case "fp8_on_load":
            return Fp8OnLoad()
        case "awq":
            return Awq()
        case "gptq":
            return Gptq()
        case "packed":
            return PackQuantised(has_zeros=quantisation.has_zeros)


def _is_quantised(quantisation: Quantisation, layer: Linear, name: str) -> bool:
    names = list(layer.matrices(name))
    plain = [matrix for matrix in names if quantisation.leaves(matrix)]
    if plain and len(plain) < len(names):
        raise CheckpointError(
            f"of {', '.join(names)}, which are one product, the checkpoint leaves {', '.join(plain)} plain: "
            "take one that treats them alike"
        )
    return not plain


def _store_as(chosen: Scheme, layer: Linear, name: str) -> None:
    try:
        layer.store_as(chosen)
    except ValueError as error:
        raise CheckpointError(f"{', '.join(layer.matrices(name))}: {error}") from None
