"""The specification of embedding, in plain torch."""

from torch import Tensor
from torch.nn import functional


def embedding(token_ids: Tensor, weight: Tensor) -> Tensor:
    """See Embedding."""
    return functional.embedding(token_ids, weight)
