"""What a device is and has, as far as kernels are chosen by it."""

from functools import lru_cache

import torch


@lru_cache
def has_copy_engine(device: torch.device) -> bool:
    """Say whether programs can have tiles copied by the Tensor Memory Accelerator: from Hopper on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@lru_cache
def is_hopper(device: torch.device) -> bool:
    """Say whether the matrix units are those that warpgroups use: later GPUs have others."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Return how many programs of the largest size a GPU runs at a time."""
    return torch.cuda.get_device_properties(device).multi_processor_count
