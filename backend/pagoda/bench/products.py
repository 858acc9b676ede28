"""All matrix products of one step of a model, by torch and by our own operation, beside the bytes that they read."""

from __future__ import annotations

import msgspec
import pagoda_kernels
import torch

from pagoda.bench import machine
from pagoda.errors import ConfigError
from pagoda.hf_config import HFConfig

ROWS = (1, 4, 16, 64, 128, 256)


class Products(msgspec.Struct, frozen=True):
    """Milliseconds of every layer's matrices and the head's, one after the other."""

    rows: int
    torch: float
    ours: float


def measure(config: HFConfig, dtype: torch.dtype, device: torch.device) -> list[Products]:
    """By rows; `ours` is what a model calls, its weights packed first. Raises ConfigError for a mixture of experts."""
    if config.mixture is not None:
        raise ConfigError(f"{config.architecture} has experts, whose products depend on the router: take a dense model")
    ops = pagoda_kernels.for_device(device)
    theirs = machine.products(config, dtype, device, ROWS)
    machine.release(device)
    ours = machine.timed_products(config, dtype, device, ROWS, ops.pack_linear, ops.linear)
    return [Products(rows, theirs[rows], ours[rows]) for rows in ROWS]


def weight_bytes(config: HFConfig, dtype: torch.dtype) -> int:
    """Of the matrices of all layers and the head."""
    layer = sum(rows * columns for rows, columns in machine.matrices(config))
    return (layer * config.num_layers + config.vocab_size * config.hidden_size) * dtype.itemsize
