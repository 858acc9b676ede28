"""embedding: a row of the table for each token."""

from typing import Protocol

from torch import Tensor


class Embedding(Protocol):
    def __call__(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        """Return weight[token_ids], [T, H], contiguous, for token_ids [T] int64 or int32 and weight [V, H], contiguous.

        Ids lie in [0, V); on a GPU nothing checks that.
        """
