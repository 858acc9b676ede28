"""sample: one token id for each row of logits, by counter-based random numbers."""

from typing import Protocol

from torch import Tensor

from .batch import SamplingBatch
from .philox import uniform

__all__ = ["Sample", "SamplingBatch", "uniform"]


class Sample(Protocol):
    def __call__(self, logits: Tensor, params: SamplingBatch) -> Tensor:
        """Return token ids, [R] int64, for logits [R, V] of any float type (not changed; -inf: a forbidden token).

        The steps for a row are those of vLLM and of transformers, in their order; p is the softmax of what is left:

        1. temperature t: logits / t. t = 0 takes the largest logit (the lowest id among equals) and nothing below.
        2. top_k: keeps the tokens with a logit at least as large as the k-th largest.
        3. top_p: keeps a token if the tokens strictly more probable than it have less than top_p of the mass.
        4. min_p: keeps the tokens with p >= min_p * max(p).

        Equal logits share their fate in 2 to 4, so more than k tokens can be kept, and the kept set does not depend on
        any sorting order; logits that float32 arithmetic cannot tell apart may count as equal. The most probable
        token is always kept. Logits of 16 bits give the tokens of the same numbers in float32, but for the
        rounding of sums.

        The token is the first id, in the order of the vocabulary, at which the cumulative mass of the kept tokens
        exceeds u = uniform(seed, position). So (seed, position, logits, parameters) give the same token in any batch.
        Rows with NaN or +inf, or without a finite logit, give an unspecified id in [0, V).
        """
