"""rotary_kv_write: rotary position embedding (Su et al. 2021, arXiv:2104.09864) and the KV-cache write, in one pass."""

from typing import Protocol

from torch import Tensor


class RotaryKvWrite(Protocol):
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slots: Tensor,
    ) -> None:
        """Rotate q and k in place, then write k and v into the paged caches.

        q: [T, Hq, D]; k, v: [T, Hkv, D]; last dimension contiguous, otherwise any strides (views of a fused qkv).
        cos, sin: [P, Drot/2] float32 tables with Drot <= D; dimensions past Drot are left as they are.
        positions: [T] int64, the table row of each token.
        k_cache, v_cache: [num_blocks, block_size, Hkv, D], contiguous.
        slots: [T] int64, block_id * block_size + offset; distinct, or -1 where nothing is written (padding).

        The half style ("neox"): dimension i is paired with i + Drot/2. The arithmetic is float32, the result is
        rounded to the tensor's dtype, and the cache holds the rounded k.
        """
