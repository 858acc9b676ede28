"""add_lora: low-rank adapters (Hu et al. 2021, arXiv:2106.09685), a different one for each row."""

from typing import Protocol

from torch import Tensor


class AddLora(Protocol):
    def __call__(self, out: Tensor, x: Tensor, a: Tensor, b: Tensor, adapters: Tensor, scales: Tensor) -> None:
        """Add scales[i] * (x @ a[i].T) @ b[i].T to each row of out in place, where i is the row's adapter.

        out: [M, N], rows contiguous, any stride between them (columns of a fused projection). x: [M, K], rows
        contiguous. a: [L, r, K], b: [L, N, r], contiguous; an adapter of a smaller rank is padded with zeros.
        adapters: [M] int32, -1 for a row without one. scales: [L] float32.
        The products accumulate in float32, nothing is rounded between them, and the sum with out is rounded once.
        """
