"""Kernels that start before the one ahead of them on the stream has ended ("programmatic dependent launch").

Such a kernel is launched with launch_pdl=True and does two things: `gdc_wait()` before it touches anything that an
earlier kernel may write, and, if its successor may start early too, `gdc_launch_dependents()`. A successor launched
the ordinary way waits for the end, as always. (Decodes beside chunks wait for nobody but at their end: see
paged_attention/decode.py.)
"""

from functools import lru_cache

import torch


@lru_cache
def launches_early(device: torch.device) -> bool:
    """Say whether the device can do it: from Hopper on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
