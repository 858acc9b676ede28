"""What the start of a GPU's engine needs no torch for, half a second: done in a thread while torch is imported."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading


def begin(device: str) -> None:
    """Have the driver find its GPUs, and Triton hash itself, unless `device` is the CPU. Nothing waits for it.

    What goes wrong here goes wrong again, and is reported, where it is needed.
    """
    if device != "cpu":
        os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")  # as torch does before it calls the driver
        threading.Thread(target=_prepare, name="warm-up", daemon=True).start()


def _prepare() -> None:
    with contextlib.suppress(OSError, ImportError):
        if ctypes.CDLL("libcuda.so.1").cuInit(0) == 0:
            from triton.runtime.cache import triton_key

            triton_key()  # half a GB, outside Python's lock; Triton keeps it, a part of every kernel's key
