"""What a step changes in its logits before it samples: three independent groups, each absent when no request uses it.

The tensors are on the device of the logits. Rows are those of the logits, [R, V]; the pairs (row, token) of a group
are distinct and in any order.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Penalties:
    """For the N tokens that the requests have seen, by row."""

    repetition: Tensor
    """[R] float32; 1 = off. Divides positive and multiplies negative logits (Keskar et al. 2019, arXiv:1909.05858)."""
    presence: Tensor
    """[R] float32; 0 = off. Subtracted once for a token of the output."""
    frequency: Tensor
    """[R] float32; 0 = off. Subtracted for each occurrence in the output."""
    rows: Tensor
    """[N] int32."""
    tokens: Tensor
    """[N] int32."""
    counts: Tensor
    """[N] int32: occurrences in the output; 0 for a token that only the prompt has."""


@dataclass(frozen=True, eq=False)
class Bias:
    """OpenAI's logit_bias, and single tokens that are forbidden."""

    rows: Tensor
    """[M] int32."""
    tokens: Tensor
    """[M] int32."""
    values: Tensor
    """[M] float32, added to the logits; -inf forbids a token."""


@dataclass(frozen=True, eq=False)
class AllowedTokens:
    """The masks of grammars."""

    bits: Tensor
    """[B, ceil(V / 32)] int32: bit j of word i is token 32 i + j, 1 = allowed. Contiguous."""
    rows: Tensor
    """[R] int32: the row of `bits` that holds for a row of the logits, -1 for none."""


@dataclass(frozen=True, eq=False)
class LogitsEdits:
    penalties: Penalties | None = None
    bias: Bias | None = None
    allowed: AllowedTokens | None = None
