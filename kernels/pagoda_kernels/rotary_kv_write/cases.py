"""Shared cases of rotary_kv_write: q, k and v are views of one fused tensor, as the model has them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bench_loads import BenchLoad, Calls, bench_model
from ..dispatch import Ops
from . import RotaryKvWrite, reference


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
    interleaved: bool = False
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    k_scale: float = 1.0
    v_scale: float = 1.0

    def run(self, op: RotaryKvWrite) -> None:
        op(
            self.q, self.k, self.v, self.cos, self.sin, self.positions, self.k_cache, self.v_cache, self.slots,
            interleaved=self.interleaved, q_norm=self.q_norm, k_norm=self.k_norm, eps=EPS,
            k_scale=self.k_scale, v_scale=self.v_scale,
        )  # fmt: skip


EPS = 1e-5


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
    interleaved: bool = False
    norm: bool = False
    fp8_cache: bool = False
    """In float8_e4m3fn, with scales that let some values saturate."""

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
        cache_dtype = torch.float8_e4m3fn if self.fp8_cache else dtype
        k_cache, v_cache = (torch.full(shape, float("nan"), device=device).to(cache_dtype) for _ in range(2))
        tables = (cos.to(device), sin.to(device), positions.to(device))
        weights = (1 + torch.randn(2, self.head_size, generator=generator) / 4).to(device, dtype)
        q_norm, k_norm = (weights[0], weights[1]) if self.norm else (None, None)
        scales = (0.004, 0.3) if self.fp8_cache else (1.0, 1.0)
        return Inputs(
            q, k, v, *tables, k_cache, v_cache, slots.to(device), self.interleaved, q_norm, k_norm, *scales
        )  # fmt: skip


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
    Case("interleaved", 17, num_heads=4, num_kv_heads=2, interleaved=True),
    Case("interleaved_partial", 9, num_heads=4, num_kv_heads=2, rotary_size=16, interleaved=True, unwritten=(3,)),
    Case("qk_norm", 17, num_heads=4, num_kv_heads=2, norm=True),
    Case("qk_norm_head_80_partial", 9, num_heads=3, num_kv_heads=1, head_size=80, rotary_size=20, norm=True),
    Case("qk_norm_interleaved", 9, num_heads=3, num_kv_heads=1, interleaved=True, norm=True),
    Case("fp8_cache", 17, num_heads=4, num_kv_heads=2, fp8_cache=True),
    Case("fp8_cache_everything", 9, 4, 2, 96, 32, unwritten=(3,), interleaved=True, norm=True, fp8_cache=True),
)


def bench_loads(device: torch.device) -> Iterator[BenchLoad]:
    """The model's heads, and on a GPU Qwen3-8B's, which have a QK norm."""
    model = bench_model(device)

    def load(rows: int, norm: bool) -> BenchLoad:
        case = Case(
            "bench", rows, model.heads, model.kv_heads, model.head_size, model.head_size, norm=norm
        )  # fmt: skip

        def make(ops: Ops, seed: int) -> Calls:
            inputs = case.make(model.dtype, str(device), seed)
            inputs.k_cache.zero_()
            inputs.v_cache.zero_()

            def run(op: RotaryKvWrite) -> tuple[Tensor, ...]:
                inputs.run(op)
                return inputs.q, inputs.k, inputs.k_cache, inputs.v_cache

            return Calls(lambda: run(ops.rotary_kv_write), lambda: run(reference.rotary_kv_write))

        # q is read and written, k read and written twice, v read and written.
        moved = rows * (2 * model.heads + 5 * model.kv_heads) * model.head_size * model.dtype.itemsize
        return BenchLoad(f"{rows} tokens{', QK norm' * norm}", make, moved, bounds=model.bounds)

    return (load(rows, norm) for norm in (False, True) for rows in model.rows)
