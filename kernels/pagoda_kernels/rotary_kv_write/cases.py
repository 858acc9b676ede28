"""Shared cases of rotary_kv_write: q, k and v are views of one fused tensor, as the model has them."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Inputs:
    """In the order of the op's arguments."""

    q: Tensor
    k: Tensor
    v: Tensor
    cos: Tensor
    sin: Tensor
    positions: Tensor
    k_cache: Tensor
    v_cache: Tensor
    slots: Tensor


@dataclass(frozen=True)
class Case:
    name: str
    tokens: int
    num_heads: int = 9
    num_kv_heads: int = 3
    head_size: int = 64
    rotary_size: int = 64
    block_size: int = 16
    unwritten: tuple[int, ...] = ()
    """Tokens with slot -1."""
    fused: bool = True

    def make(self, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        heads = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        fused = torch.randn(self.tokens, sum(heads), self.head_size, generator=generator).to(device, dtype)
        q, k, v = (part if self.fused else part.contiguous() for part in torch.split(fused, heads, dim=1))
        cos, sin = rotary_tables(512, self.rotary_size)
        positions = torch.randint(512, (self.tokens,), generator=generator)
        num_blocks = self.tokens // self.block_size + 3
        slots = torch.randperm(num_blocks * self.block_size, generator=generator)[: self.tokens]
        slots[list(self.unwritten)] = -1
        shape = (num_blocks, self.block_size, self.num_kv_heads, self.head_size)
        k_cache, v_cache = (torch.full(shape, float("nan"), dtype=dtype, device=device) for _ in range(2))
        tables = (cos.to(device), sin.to(device), positions.to(device))
        return Inputs(q, k, v, *tables, k_cache, v_cache, slots.to(device))


def rotary_tables(positions: int, rotary_size: int, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Return the cos and sin tables, [positions, rotary_size / 2] float32."""
    frequencies = base ** -(torch.arange(0, rotary_size, 2, dtype=torch.float64) / rotary_size)
    angles = torch.outer(torch.arange(positions, dtype=torch.float64), frequencies)
    return angles.cos().float(), angles.sin().float()


CASES = (
    Case("one_token", 1),
    Case("no_tokens", 0),
    Case("decode_batch", 33),
    Case("prefill", 130),
    Case("separate_tensors", 6, fused=False),
    Case("padding_unwritten", 8, unwritten=(0, 5, 6, 7)),
    Case("nothing_written", 3, unwritten=(0, 1, 2)),
    Case("partial_rotary", 9, num_heads=4, num_kv_heads=2, rotary_size=32),
    Case("head_80_partial", 9, num_heads=4, num_kv_heads=4, head_size=80, rotary_size=20),
    Case("mqa_block_8", 17, num_heads=4, num_kv_heads=1, block_size=8),
)
