"""The layout of the CUDA kernels' weights.

Inputs are taken in blocks of 1024, that is eight groups; the last block is filled up with codes whose scale is 0. The
int32 at (output, block, i) holds input i of each of the block's eight groups, the first group in the lowest bits. So
four bits of 128 neighbouring words are a whole group: one product on the tensor cores, with one scale an output.
"""

import torch
from torch import Tensor
from torch.nn import functional

from . import GROUP, Int4Weight

BLOCK_GROUPS = 8


def pack_words(weight: Int4Weight) -> Tensor:
    """Return int32 [out, blocks * 128]."""
    groups = weight.zeros.shape[1]
    padding = -groups % BLOCK_GROUPS * GROUP
    codes = functional.pad(weight.codes, (0, padding)).int().reshape(len(weight.codes), -1, BLOCK_GROUPS, GROUP)
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=codes.device)
    return (codes << shifts[:, None]).sum(dim=2).to(torch.int32).flatten(1)


def pack_scales(weight: Int4Weight) -> Tensor:
    """Return int32 [blocks * 8, out]: a group's scale, the bits of its float16, and above them its zero."""
    bits = weight.scales.view(torch.int16).int() & 0xFFFF
    padding = -bits.shape[1] % BLOCK_GROUPS
    return functional.pad(bits | (weight.zeros.int() << 16), (0, padding)).T.contiguous()
