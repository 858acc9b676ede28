"""The published layouts of 4-bit weights, and our own quantiser.

All pack eight codes into an int32, four bits each, the first in the lowest bits.

- AWQ (Lin et al. 2023, arXiv:2306.00978; the "GEMM" version of its checkpoints): eight outputs to an int32, in the
  order 0 2 4 6 1 3 5 7. qweight [in, out / 8], qzeros [in / 128, out / 8], scales float16 [in / 128, out].
- GPTQ (Frantar et al. 2022, arXiv:2210.17323; checkpoint_format "gptq"): eight inputs to an int32, in their order.
  qweight [in / 8, out]; qzeros [in / 128, out / 8] hold zero - 1, modulo 16, eight outputs in their order; g_idx [in]
  names the group of each input; scales as AWQ's.
- compressed-tensors' format "pack-quantized": weight_packed [out, in / 8], eight inputs in their order; weight_scale
  [out, in / 128]; weight_zero_point [out / 8, in / 128], eight outputs in their order, or none where all zeros are 8.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import GROUP, Int4Weight

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_IN_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)
_NO_ZERO = 8
"""The code of 0 in a layout without zeros: the codes are a signed number's, moved by 8."""


@dataclass(frozen=True, eq=False)
class PublishedInt4:
    """The tensors of a quantised matrix in a checkpoint; see this module for their shapes."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor | None = None
    """GPTQ's alone."""


@dataclass(frozen=True, eq=False)
class PackedInt4:
    """The tensors of a matrix in compressed-tensors' layout; see this module for their shapes."""

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None


def quantise(weight: Tensor) -> Int4Weight:
    """Quantise a weight [out, in]: in each group the codes 0 and 15 are its smallest and largest value, or zero."""
    groups = weight.float().reshape(len(weight), -1, GROUP)
    low, high = groups.amin(dim=2).clamp(max=0), groups.amax(dim=2).clamp(min=0)
    scales = ((high - low) / 15).clamp(min=2.0**-14).half()
    zeros = (-low / scales.float()).round().clamp(0, 15)
    codes = (groups / scales.float()[..., None] + zeros[..., None]).round().clamp(0, 15)
    return Int4Weight(codes.flatten(1).to(torch.uint8), zeros.to(torch.uint8), scales)


def to_awq(weight: Int4Weight) -> PublishedInt4:
    """Return the weight in AWQ's layout."""
    return PublishedInt4(
        _pack(weight.codes.T, _AWQ_ORDER), _pack(weight.zeros.T, _AWQ_ORDER), weight.scales.T.contiguous()
    )


def from_awq(published: PublishedInt4) -> Int4Weight:
    """Read AWQ's layout."""
    return Int4Weight(
        _unpack(published.qweight, _AWQ_ORDER).T.contiguous(),
        _unpack(published.qzeros, _AWQ_ORDER).T.contiguous(),
        published.scales.half().T.contiguous(),
    )


def to_gptq(weight: Int4Weight) -> PublishedInt4:
    """Return the weight in GPTQ's layout."""
    in_features = weight.codes.shape[1]
    return PublishedInt4(
        _pack(weight.codes, _IN_ORDER).T.contiguous(),
        _pack((weight.zeros.T.int() - 1) & 15, _IN_ORDER),
        weight.scales.T.contiguous(),
        torch.arange(in_features, dtype=torch.int32, device=weight.codes.device) // GROUP,
    )


def from_gptq(published: PublishedInt4) -> Int4Weight:
    """Read GPTQ's layout. Raises ValueError if its groups are not consecutive inputs (quantised with desc_act)."""
    in_features = published.qweight.shape[0] * 8
    consecutive = torch.arange(in_features, device=published.qweight.device) // GROUP
    if published.g_idx is not None and not torch.equal(published.g_idx.long(), consecutive):
        raise ValueError(
            f"g_idx: groups must be {GROUP} consecutive inputs: quantise with desc_act false and group_size {GROUP}"
        )
    zeros = (_unpack(published.qzeros, _IN_ORDER).int() + 1) & 15
    return Int4Weight(
        _unpack(published.qweight.T, _IN_ORDER),
        zeros.to(torch.uint8).T.contiguous(),
        published.scales.half().T.contiguous(),
    )


def to_pack_quantised(weight: Int4Weight, *, zeros: bool = True) -> PackedInt4:
    """Return the weight in compressed-tensors' layout. Raises ValueError if it has other zeros than 8 without zeros."""
    if not zeros and bool((weight.zeros != _NO_ZERO).any()):
        raise ValueError(f"zeros: without a tensor of them all are {_NO_ZERO}: pack them, too")
    packed_zeros = _pack(weight.zeros.T, _IN_ORDER).T.contiguous() if zeros else None
    return PackedInt4(_pack(weight.codes, _IN_ORDER), weight.scales, packed_zeros)


def from_pack_quantised(packed: PackedInt4) -> Int4Weight:
    """Read compressed-tensors' layout."""
    scales = packed.weight_scale.half().contiguous()
    if packed.weight_zero_point is None:
        zeros = torch.full(scales.shape, _NO_ZERO, dtype=torch.uint8, device=scales.device)
    else:
        zeros = _unpack(packed.weight_zero_point.T, _IN_ORDER).T.contiguous()
    return Int4Weight(_unpack(packed.weight_packed, _IN_ORDER), zeros, scales)


def _pack(codes: Tensor, order: tuple[int, ...]) -> Tensor:
    """Return int32 [rows, columns / 8] of codes [rows, columns]; order names the code in each four bits."""
    eights = codes.int().reshape(len(codes), -1, 8)[..., list(order)]
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=codes.device)
    return (eights << shifts).sum(dim=2).to(torch.int32)


def _unpack(packed: Tensor, order: tuple[int, ...]) -> Tensor:
    """Return the uint8 codes [rows, columns] of int32 [rows, columns / 8]."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)
    eights = (packed[..., None] >> shifts) & 15
    codes = torch.empty_like(eights)
    codes[..., list(order)] = eights
    return codes.flatten(1).to(torch.uint8)
