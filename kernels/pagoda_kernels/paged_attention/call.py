"""What the launches of a call of paged_attention share: its arguments, scaled for base 2, and the shapes they imply."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .batch import AttentionBatch

_LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class Tiles:
    """The sizes of a launch: rows of queries, positions of a tile, warps of a program, tiles on their way."""

    rows: int
    positions: int
    warps: int
    stages: int


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of a call, and the output that its launches share."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    out: Tensor
    batch: AttentionBatch
    scale: float
    """From products of entries to scores, as exponents of 2."""
    window: int
    softcap: float
    """As an exponent of 2; 0: none."""
    v_scale: float

    @classmethod
    def of(
        cls,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        batch: AttentionBatch,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
    ) -> "Call":
        """Raise ValueError for a scale that is not positive."""
        if scale * k_scale <= 0:
            raise ValueError(f"scale and k_scale must be positive, not {scale} and {k_scale}")
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        return cls(q, k_cache, v_cache, out, batch, scale * k_scale * _LOG2E, window, softcap * _LOG2E, v_scale)

    @property
    def num_heads(self) -> int:
        return self.q.shape[1]

    @property
    def block_size(self) -> int:
        return self.k_cache.shape[1]

    @property
    def num_kv_heads(self) -> int:
        return self.k_cache.shape[2]

    @property
    def head_size(self) -> int:
        return self.k_cache.shape[3]

    @property
    def group(self) -> int:
        """The query heads of a KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def head_padded(self) -> int:
        return max(16, int(triton.next_power_of_2(self.head_size)))

    def constants(self) -> dict[str, int | bool]:
        """Return the compile-time arguments that all kernels of attention take."""
        return {
            "GROUP": self.group,
            "NUM_KV_HEADS": self.num_kv_heads,
            "HEAD_SIZE": self.head_size,
            "HEAD_PADDED": self.head_padded,
            "BLOCK_SIZE": self.block_size,
            "SOFTCAP": self.softcap != 0,
            "WINDOW": self.window != 0,
        }
