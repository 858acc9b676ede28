"""edit_logits for CPUs: a mask is unpacked a row at a time, so that its bytes are in the cache when they are used.

Penalties and biases touch few tokens, and are the reference's.
"""

import numpy as np
import torch
from torch import Tensor

from . import reference
from .edits import AllowedTokens, LogitsEdits

# The bits of float32's minus infinity.
_NEVER = 0xFF800000 - 2**32


def edit_logits(logits: Tensor, edits: LogitsEdits) -> None:
    """See EditLogits."""
    reference.edit_logits(logits, LogitsEdits(edits.penalties, edits.bias))
    if edits.allowed is not None:
        _mask(logits, edits.allowed)


def _mask(logits: Tensor, allowed: AllowedTokens) -> None:
    # The lowest bit of the first byte is the first token's: words are little-endian, as on every CPU with torch.
    words = allowed.bits.numpy().view(np.uint8)
    for row, mask in enumerate(allowed.rows.tolist()):
        if mask >= 0:
            bits = np.unpackbits(words[mask], count=logits.shape[1], bitorder="little")
            kept = torch.from_numpy(bits).to(torch.int32).neg_()
            # An exclusive or twice gives the logit back, and with nothing between the two, minus infinity. A fill by
            # condition takes up to three times as long, where the mask changes too often for the branch to be guessed.
            logits[row].view(torch.int32).bitwise_xor_(_NEVER).bitwise_and_(kept).bitwise_xor_(_NEVER)
