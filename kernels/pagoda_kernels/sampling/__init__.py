"""sample: one token id for each row of logits, by counter-based random numbers."""

from typing import Protocol

from torch import Tensor

from .batch import SamplingBatch
from .levels import GROUP, TILE
from .philox import uniforms

__all__ = ["GROUP", "TILE", "Sample", "SamplingBatch", "uniforms"]


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

        The vocabulary, in order, is cut in tiles of TILE tokens, and these in groups of GROUP. The token is drawn in
        three levels: a tile by its share of the kept mass, a group by its share of the tile, a token by its share of
        the group; the product of the shares is p. At each level it is the first at which the cumulative share exceeds
        that level's number, u = uniforms(seed, position). So (seed, position, logits, parameters) give the same token
        in any batch. And logits that differ in their last bits seldom give another one: a number has to lie where such
        a border between two shares moved, and few borders, of few logits each, move less than one row of them all.
        Rows with NaN or +inf, or without a finite logit, give an unspecified id in [0, V).
        """
