"""The layout of the CUDA kernels' weights.

Inputs are taken in blocks of 512, that is four groups; the last block is filled up with codes whose scale is 0. The
int16 at (output, block, i) holds input i of each of the block's four groups, the first group in the lowest bits. So
four bits of 128 neighbours are a whole group, one product on the tensor cores; and a register, which holds two
neighbours, has the two codes of any group where two 16-bit floats have their last bits.
"""

import torch
from torch import Tensor
from torch.nn import functional

from . import GROUP, Int4Weight

BLOCK_GROUPS = 4
BLOCK = 128
"""Elements of a block: those of a group."""


def pack_codes(weight: Int4Weight) -> Tensor:
    """Return int16 [out, blocks * 128]."""
    groups = weight.zeros.shape[1]
    padding = -groups % BLOCK_GROUPS * GROUP
    codes = functional.pad(weight.codes, (0, padding)).int().reshape(len(weight.codes), -1, BLOCK_GROUPS, GROUP)
    shifts = torch.arange(0, 16, 4, dtype=torch.int32, device=codes.device)
    return (codes << shifts[:, None]).sum(dim=2).to(torch.int16).flatten(1)


def pack_scales(weight: Int4Weight) -> Tensor:
    """Return int32 [blocks * 4, out]: a group's scale as float32, and its zero in the four last bits.

    A float16 leaves the last 13 bits of a float32 at 0.
    """
    bits = weight.scales.float().view(torch.int32) | weight.zeros.int()
    return functional.pad(bits, (0, -bits.shape[1] % BLOCK_GROUPS)).T.contiguous()
