"""How large the KV cache may be: as asked for, or on a GPU what the model's largest step leaves of the engine's share.

The share is `gpu_memory_utilization` of the GPU's memory, everything counted: CUDA's context, weights, graphs, the
largest step, the cache. Engines that start on the same GPU take turns, so what one measures is its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator

import torch

from pagoda.config import EngineConfig, runtime_dir
from pagoda.errors import ConfigError

log = logging.getLogger("pagoda.memory")

GIB = 2**30
CPU_CACHE_GIB = 2.0
CONTEXT_BYTES = 640 * 2**20
"""What CUDA itself takes for a process, which is there before anything can be measured; 500 to 600 MiB were seen."""

SLACK_BYTES = 512 * 2**20
"""Kept beside the largest step: for gaps between tensors of other sizes than its, and what libraries take later."""


class Share:
    """One engine's part of a GPU. Made before the engine allocates anything there."""

    def __init__(self, device: torch.device, utilization: float) -> None:
        self._device = device
        self._free_at_start, self.total = torch.cuda.mem_get_info(device)
        self.limit = int(utilization * self.total)

    @property
    def used(self) -> int:
        """Bytes that this process has taken."""
        return self._free_at_start - self._free() + CONTEXT_BYTES

    def begin_peak(self) -> None:
        """From here on the largest step is looked for."""
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)

    def room(self, reserve: int) -> int:
        """Bytes left for the cache beside the largest step since `begin_peak` and `reserve` bytes more."""
        torch.cuda.synchronize(self._device)
        idle = torch.cuda.max_memory_reserved(self._device) - torch.cuda.memory_reserved(self._device)
        return min(self.limit - self.used, self._free()) - idle - reserve - SLACK_BYTES

    def close(self) -> None:
        """Hold torch's allocator to the share: beyond it, it gives unused memory back before it asks for more.

        What others on the GPU give back meanwhile looks like memory of our own: at worst nothing is held back.
        """
        outside = max(0, self.used - torch.cuda.memory_reserved(self._device))
        torch.cuda.set_per_process_memory_fraction(max(0.0, (self.limit - outside) / self.total), self._device)

    def _free(self) -> int:
        return torch.cuda.mem_get_info(self._device)[0]


@contextlib.contextmanager
def turn(device: torch.device) -> Iterator[None]:
    """Hold a GPU's lock while an engine loads and measures; on a CPU nothing."""
    if device.type == "cpu":
        yield
        return
    name = torch.cuda.get_device_properties(device).uuid
    with open(os.path.join(runtime_dir(), f"gpu-{name}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def asked_for(config: EngineConfig, block_bytes: int, device: torch.device) -> int | None:
    """Blocks that the configuration fixes; None where the GPU's memory decides."""
    if config.num_kv_blocks is not None:
        return config.num_kv_blocks
    gib = config.kv_cache_gib or (CPU_CACHE_GIB if device.type == "cpu" else None)
    return None if gib is None else int(gib * GIB) // block_bytes


def check_fits(num_blocks: int, max_model_len: int, block_size: int) -> None:
    """Raises ConfigError when a single request of full length would not fit."""
    needed = -(-max_model_len // block_size)
    if num_blocks < needed:
        raise ConfigError(
            f"the KV cache holds {max(0, num_blocks)} blocks and a request of max_model_len {max_model_len} needs "
            f"{needed}: lower max_model_len to {max(0, num_blocks) * block_size}, or raise gpu_memory_utilization on a "
            "GPU, kv_cache_gib (num_kv_blocks) on a CPU"
        )
