"""rotary_kv_write: QK norm, rotary embedding (Su et al. 2021, arXiv:2104.09864) and KV-cache write, in one pass."""

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
        *,
        interleaved: bool = False,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 1e-6,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
    ) -> None:
        """Normalise (if asked) and rotate q and k in place, then write k and v into the paged caches.

        q: [T, Hq, D]; k, v: [T, Hkv, D]; last dimension contiguous, otherwise any strides (views of a fused qkv).
        cos, sin: [P, Drot/2] float32 tables with Drot <= D; dimensions past Drot are not rotated.
        positions: [T] int64, the table row of each token.
        k_cache, v_cache: [num_blocks, block_size, Hkv, D], contiguous, in k's dtype or both in float8_e4m3fn.
        slots: [T] int64, block_id * block_size + offset; distinct, or -1 where nothing is written (padding).
        interleaved: dimension 2i is paired with 2i + 1 (GPT-J); otherwise i with i + Drot/2 (GPT-NeoX, Llama).
        q_norm, k_norm: [D] weights of an RMS norm over each head, before the rotation (Qwen3, Gemma 3); both or
        neither. eps is that norm's.
        k_scale, v_scale: a float8_e4m3fn cache holds x / scale, saturated at ±448; other caches hold x itself.

        The arithmetic is float32, the result is rounded once to the tensor's dtype, and the cache holds the rounded k.
        """
