"""edit_logits: penalties, biases and grammar masks, on the logits in place."""

from typing import Protocol

from torch import Tensor

from .edits import AllowedTokens, Bias, LogitsEdits, Penalties

__all__ = ["AllowedTokens", "Bias", "EditLogits", "LogitsEdits", "Penalties"]


class EditLogits(Protocol):
    def __call__(self, logits: Tensor, edits: LogitsEdits) -> None:
        """Edit logits [R, V] float32, rows contiguous, in place.

        In vLLM's order, with the definitions of transformers and of OpenAI's reference:

        1. repetition, for every seen token: l / r if l > 0, l * r otherwise.
        2. frequency: minus frequency * count.
        3. presence: minus presence where count > 0.
        4. bias: plus value.
        5. what the bits do not allow becomes -inf.

        Computed in float32. Only seen, biased and masked tokens are touched: the others may hold anything.
        """
