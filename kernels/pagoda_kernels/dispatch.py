"""The choice of an implementation for each op: once, by device, and said in the log."""

import logging
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any, NoReturn

import torch

from .linear import Linear, PackLinear
from .linear import cpu as linear_cpu
from .paged_attention import PagedAttention
from .paged_attention import cpu as paged_attention_cpu
from .rms_norm import AddRmsNorm, RmsNorm
from .rms_norm import reference as rms_norm_reference
from .rotary_kv_write import RotaryKvWrite
from .rotary_kv_write import cpu as rotary_kv_write_cpu
from .sampling import Sample
from .sampling import cpu as sampling_cpu
from .silu_mul import SiluMul
from .silu_mul import reference as silu_mul_reference

_log = logging.getLogger(__name__)


class MissingKernel(NotImplementedError):
    """The op has no kernel for this kind of device."""


@dataclass(frozen=True)
class Ops:
    """The ops of one device. Models hold this object and call its fields; the contracts are the fields' types."""

    rms_norm: RmsNorm
    add_rms_norm: AddRmsNorm
    rotary_kv_write: RotaryKvWrite
    silu_mul: SiluMul
    paged_attention: PagedAttention
    pack_linear: PackLinear
    linear: Linear
    sample: Sample


def for_device(device: torch.device) -> Ops:
    """Return the ops for a device and log which implementation each one got.

    Without a kernel for the device, an op raises MissingKernel when it is called.
    Raises ValueError for a device type other than cpu and cuda.
    """
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"no ops for device type {device.type!r}: use 'cpu' or 'cuda'")
    ops = _cpu_ops() if device.type == "cpu" else _cuda_ops()
    for field in fields(ops):
        op = getattr(ops, field.name)
        if isinstance(op, _Missing):
            _log.warning("%s on %s: missing", field.name, device.type)
        else:
            _log.info("%s on %s: %s", field.name, device.type, op.__module__)
    return ops


def _cpu_ops() -> Ops:
    return Ops(
        rms_norm=rms_norm_reference.rms_norm,
        add_rms_norm=rms_norm_reference.add_rms_norm,
        rotary_kv_write=rotary_kv_write_cpu.rotary_kv_write,
        silu_mul=silu_mul_reference.silu_mul,
        paged_attention=paged_attention_cpu.paged_attention,
        pack_linear=linear_cpu.pack_linear,
        linear=linear_cpu.linear,
        sample=sampling_cpu.sample,
    )


def _cuda_ops() -> Ops:
    """Kernels in the Triton language, which is imported here and not before: a CPU does without it."""
    return Ops(
        rms_norm=_kernel("rms_norm", "rms_norm"),
        add_rms_norm=_kernel("add_rms_norm", "rms_norm"),
        rotary_kv_write=_kernel("rotary_kv_write", "rotary_kv_write"),
        silu_mul=_kernel("silu_mul", "silu_mul"),
        paged_attention=_kernel("paged_attention", "paged_attention"),
        pack_linear=_kernel("pack_linear", "linear"),
        linear=_kernel("linear", "linear"),
        sample=_kernel("sample", "sampling"),
    )


def _kernel(op: str, folder: str) -> Any:
    """Return the function `op` of <folder>/kernel.py, or what says why there is none."""
    try:
        module = import_module(f".{folder}.kernel", __package__)
    except ModuleNotFoundError as error:
        return _Missing(op, folder, str(error))
    return getattr(module, op)


@dataclass(frozen=True)
class _Missing:
    """Stands in for an op without a kernel."""

    op: str
    folder: str
    why: str

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        raise MissingKernel(
            f"{self.op} has no CUDA kernel (pagoda_kernels/{self.folder}/kernel.py: {self.why}): run on device 'cpu'"
        )
