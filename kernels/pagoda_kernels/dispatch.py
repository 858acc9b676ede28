"""The choice of an implementation for each op: once, by device, and said in the log."""

import logging
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any, NoReturn

import torch

from . import batch_invariant as invariant
from .embedding import Embedding
from .embedding import reference as embedding_reference
from .fp8_linear import Fp8Linear, PackFp8Linear
from .fp8_linear import cpu as fp8_linear_cpu
from .gelu_mul import GeluMul
from .gelu_mul import reference as gelu_mul_reference
from .grouped_linear import GroupedLinear
from .grouped_linear import reference as grouped_linear_reference
from .int4_linear import Int4Linear, PackInt4Linear
from .int4_linear import cpu as int4_linear_cpu
from .linear import Linear, LinearOnto, PackLinear
from .linear import cpu as linear_cpu
from .logits_edit import EditLogits
from .logits_edit import cpu as logits_edit_cpu
from .logprobs import GetTopLogprobs
from .logprobs import cpu as logprobs_cpu
from .lora import AddLora
from .lora import reference as lora_reference
from .paged_attention import PagedAttention
from .paged_attention import cpu as paged_attention_cpu
from .rms_norm import AddRmsNorm, AddRmsNormFp8, RmsNorm
from .rms_norm import reference as rms_norm_reference
from .rotary_kv_write import RotaryKvWrite
from .rotary_kv_write import cpu as rotary_kv_write_cpu
from .sampling import Sample
from .sampling import cpu as sampling_cpu
from .silu_linear import SiluLinear
from .silu_linear import cpu as silu_linear_cpu
from .silu_mul import SiluMul, SiluMulFp8
from .silu_mul import reference as silu_mul_reference

_log = logging.getLogger(__name__)


class MissingKernel(NotImplementedError):
    """The op has no kernel for this kind of device."""


@dataclass(frozen=True)
class Ops:
    """The ops of one device. Models hold this object and call its fields; the contracts are the fields' types."""

    rms_norm: RmsNorm
    add_rms_norm: AddRmsNorm
    add_rms_norm_fp8: AddRmsNormFp8
    rotary_kv_write: RotaryKvWrite
    silu_mul: SiluMul
    silu_mul_fp8: SiluMulFp8
    gelu_mul: GeluMul
    embedding: Embedding
    grouped_linear: GroupedLinear
    add_lora: AddLora
    paged_attention: PagedAttention
    pack_linear: PackLinear
    linear: Linear
    linear_onto: LinearOnto
    silu_linear: SiluLinear
    pack_fp8_linear: PackFp8Linear
    fp8_linear: Fp8Linear
    pack_int4_linear: PackInt4Linear
    int4_linear: Int4Linear
    edit_logits: EditLogits
    top_logprobs: GetTopLogprobs
    sample: Sample


def for_device(device: torch.device, *, batch_invariant: bool = False) -> Ops:
    """Return the ops for a device and log which implementation each one got.

    batch_invariant: a row's result has the same bits whatever else the call holds, at a price; on the CPU only.
    Without a kernel for the device, an op raises MissingKernel when it is called.
    Raises ValueError for a device type other than cpu and cuda, or one without what is asked for.
    """
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"no ops for device type {device.type!r}: use 'cpu' or 'cuda'")
    if batch_invariant and device.type != "cpu":
        raise ValueError(f"no batch-invariant ops for device type {device.type!r}: use 'cpu'")
    if device.type == "cpu":
        ops = _batch_invariant_ops() if batch_invariant else _cpu_ops()
    else:
        ops = _cuda_ops()
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
        add_rms_norm_fp8=rms_norm_reference.add_rms_norm_fp8,
        rotary_kv_write=rotary_kv_write_cpu.rotary_kv_write,
        silu_mul=silu_mul_reference.silu_mul,
        silu_mul_fp8=silu_mul_reference.silu_mul_fp8,
        gelu_mul=gelu_mul_reference.gelu_mul,
        embedding=embedding_reference.embedding,
        grouped_linear=grouped_linear_reference.grouped_linear,
        add_lora=lora_reference.add_lora,
        paged_attention=paged_attention_cpu.paged_attention,
        pack_linear=linear_cpu.pack_linear,
        linear=linear_cpu.linear,
        linear_onto=linear_cpu.linear_onto,
        silu_linear=silu_linear_cpu.silu_linear,
        pack_fp8_linear=fp8_linear_cpu.pack_fp8_linear,
        fp8_linear=fp8_linear_cpu.fp8_linear,
        pack_int4_linear=int4_linear_cpu.pack_int4_linear,
        int4_linear=int4_linear_cpu.int4_linear,
        edit_logits=logits_edit_cpu.edit_logits,
        top_logprobs=logprobs_cpu.top_logprobs,
        sample=sampling_cpu.sample,
    )


def _batch_invariant_ops() -> Ops:
    products = invariant.Products()
    return Ops(
        rms_norm=invariant.rms_norm,
        add_rms_norm=invariant.add_rms_norm,
        add_rms_norm_fp8=invariant.add_rms_norm_fp8,
        rotary_kv_write=invariant.rotary_kv_write,
        silu_mul=invariant.silu_mul,
        silu_mul_fp8=invariant.silu_mul_fp8,
        gelu_mul=invariant.gelu_mul,
        embedding=embedding_reference.embedding,
        grouped_linear=products.grouped_linear,
        add_lora=invariant.add_lora,
        paged_attention=invariant.paged_attention,
        pack_linear=products.pack_linear,
        linear=products.linear,
        linear_onto=linear_cpu.linear_onto,
        silu_linear=products.silu_linear,
        pack_fp8_linear=fp8_linear_cpu.pack_fp8_linear,
        fp8_linear=invariant.fp8_linear,
        pack_int4_linear=int4_linear_cpu.pack_int4_linear,
        int4_linear=invariant.int4_linear,
        edit_logits=logits_edit_cpu.edit_logits,
        top_logprobs=invariant.top_logprobs,
        sample=invariant.sample,
    )


def _cuda_ops() -> Ops:
    """Kernels in the Triton language, which is imported here and not before: a CPU does without it."""
    return Ops(
        rms_norm=_kernel("rms_norm", "rms_norm"),
        add_rms_norm=_kernel("add_rms_norm", "rms_norm"),
        add_rms_norm_fp8=_kernel("add_rms_norm_fp8", "rms_norm"),
        rotary_kv_write=_kernel("rotary_kv_write", "rotary_kv_write"),
        silu_mul=_kernel("silu_mul", "silu_mul"),
        silu_mul_fp8=_kernel("silu_mul_fp8", "silu_mul"),
        gelu_mul=_kernel("gelu_mul", "gelu_mul"),
        embedding=_kernel("embedding", "embedding"),
        grouped_linear=_kernel("grouped_linear", "grouped_linear"),
        add_lora=_kernel("add_lora", "lora"),
        paged_attention=_kernel("paged_attention", "paged_attention"),
        pack_linear=_kernel("pack_linear", "linear"),
        linear=_kernel("linear", "linear"),
        linear_onto=_kernel("linear_onto", "linear"),
        silu_linear=_kernel("silu_linear", "silu_linear"),
        pack_fp8_linear=_kernel("pack_fp8_linear", "fp8_linear"),
        fp8_linear=_kernel("fp8_linear", "fp8_linear"),
        pack_int4_linear=_kernel("pack_int4_linear", "int4_linear"),
        int4_linear=_kernel("int4_linear", "int4_linear"),
        edit_logits=_kernel("edit_logits", "logits_edit"),
        top_logprobs=_kernel("top_logprobs", "logprobs"),
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
