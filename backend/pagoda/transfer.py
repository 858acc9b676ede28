"""Between host and device: one copy for all of a step's arrays, and results that are waited for only when wanted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

ALIGNMENT = 16
"""Bytes: arrays of any type begin where a device reads them in full words."""

_TYPES = {
    np.dtype(np.int64): torch.int64,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.float32): torch.float32,
}


def upload(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[torch.Tensor]:
    """Contiguous int64, int32 or float32 arrays as tensors of the device, by one copy that nobody waits for.

    On a CPU the tensors are the arrays' own memory. On a GPU they share one allocation, and the arrays may be reused
    at once: what travels is a pinned copy, which torch keeps until it has arrived.
    """
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    starts, size = [], 0
    for array in arrays:
        starts.append(size)
        size += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
    pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    staged = pinned.numpy()
    for start, array in zip(starts, arrays, strict=True):
        staged[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
    sent = pinned.to(device, non_blocking=True)
    return [
        sent[start : start + array.nbytes].view(_TYPES[array.dtype]).view(array.shape)
        for start, array in zip(starts, arrays, strict=True)
    ]


class Download:
    """Copies of device tensors on their way to the host, ordered behind what the current stream was given so far."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        on_host = all(tensor.device.type == "cpu" for tensor in tensors)
        self._arrived = None if on_host else torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._tensors = list(tensors) if on_host else [_fetch(tensor) for tensor in tensors]
        if self._arrived is not None:
            self._arrived.record()

    def wait(self) -> list[torch.Tensor]:
        """The tensors on the host; waits for these copies and nothing later."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensors


def _fetch(tensor: torch.Tensor) -> torch.Tensor:
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)
