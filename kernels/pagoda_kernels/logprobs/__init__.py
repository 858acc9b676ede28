"""top_logprobs: the log-probabilities that the OpenAI API returns beside a token."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, eq=False)
class TopLogprobs:
    """R rows; on the device of the logits. Log-probabilities are natural logarithms of the softmax."""

    logprob: Tensor
    """[R] float32, of the row's token."""
    rank: Tensor
    """[R] int64: one more than the number of strictly larger logits; 1 is the best."""
    top_ids: Tensor
    """[R, k] int64, best first, and the lower id first among equals."""
    top_logprobs: Tensor
    """[R, k] float32, in the order of top_ids."""


class GetTopLogprobs(Protocol):
    def __call__(self, logits: Tensor, tokens: Tensor, k: int) -> TopLogprobs:
        """Return the log-probabilities of one token and of the k best tokens of each row.

        logits: [R, V] float32, not changed; -inf marks a forbidden token, whose log-probability is -inf.
        tokens: [R] int64. k: 0 to 20, at most V; ValueError otherwise.
        Rows with NaN or +inf, or without a finite logit, give unspecified numbers and ids in [0, V).
        """


def check_k(k: int, vocabulary: int) -> None:
    """Raise ValueError unless 0 <= k <= 20 and k <= vocabulary."""
    if not 0 <= k <= min(20, vocabulary):
        raise ValueError(f"k {k}: use 0 to {min(20, vocabulary)}, for a vocabulary of {vocabulary}")
