"""The specification of edit_logits, in plain torch."""

import torch
from torch import Tensor

from .edits import AllowedTokens, LogitsEdits, Penalties


def edit_logits(logits: Tensor, edits: LogitsEdits) -> None:
    """See EditLogits."""
    if edits.penalties is not None:
        _penalise(logits, edits.penalties)
    if edits.bias is not None:
        logits[edits.bias.rows.long(), edits.bias.tokens.long()] += edits.bias.values
    if edits.allowed is not None:
        _mask(logits, edits.allowed)


def _penalise(logits: Tensor, penalties: Penalties) -> None:
    rows, tokens, counts = penalties.rows.long(), penalties.tokens.long(), penalties.counts
    seen = logits[rows, tokens]
    repetition = penalties.repetition[rows]
    seen = torch.where(seen > 0, seen / repetition, seen * repetition)
    seen -= penalties.frequency[rows] * counts
    seen -= penalties.presence[rows] * (counts > 0)
    logits[rows, tokens] = seen


def _mask(logits: Tensor, allowed: AllowedTokens) -> None:
    masked = (allowed.rows >= 0).nonzero().squeeze(1)
    bits = unpack(allowed.bits[allowed.rows[masked].long()], logits.shape[1])
    logits[masked] = logits[masked].masked_fill(~bits, float("-inf"))


def unpack(words: Tensor, count: int) -> Tensor:
    """Return the first `count` bits, [B, count] bool, of words [B, W] int32, the lowest bit first."""
    bits = (words.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32, device=words.device)) & 1
    return bits.flatten(1)[:, :count].bool()
