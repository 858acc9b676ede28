"""paged_attention: softmax attention over a KV cache of fixed-size blocks (Kwon et al. 2023, arXiv:2309.06180)."""

from typing import Protocol

from torch import Tensor

from .batch import AttentionBatch

__all__ = ["AttentionBatch", "PagedAttention"]


class PagedAttention(Protocol):
    def __call__(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        batch: AttentionBatch,
        scale: float,
        *,
        window: int = 0,
        softcap: float = 0.0,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
    ) -> Tensor:
        """Return the attention output, [T, Hq, D], contiguous and in q.dtype.

        q: [T, Hq, D], last dimension contiguous, T = sum of the query lengths.
        k_cache, v_cache: [num_blocks, block_size, Hkv, D], contiguous, in q.dtype or float8_e4m3fn; Hq is a multiple of
        Hkv, and query head h reads KV head h // (Hq / Hkv). This step's keys and values are already written.
        Beside float8_e4m3fn, a bfloat16 q may be cut off at ±65504.
        scale: factor on the dot products, usually D ** -0.5; positive.
        window: each query sees at most this many positions, the most recent, its own included; 0: all.
        softcap: scores become softcap * tanh(score / softcap) before the mask (Gemma 2, arXiv:2408.00118); 0: none.
        k_scale, v_scale: a key is its entry in the cache times k_scale, a value likewise; positive.

        Query i of a request with query length n and context length c sits at position p = c - n + i and attends to
        positions 0..p. Cache slots outside a request's context are never used: they may hold NaN.
        """
