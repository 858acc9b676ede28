"""The specification of top_logprobs, in plain torch: sorts, and sums in float64."""

from torch import Tensor

from . import TopLogprobs, check_k


def top_logprobs(logits: Tensor, tokens: Tensor, k: int) -> TopLogprobs:
    """See GetTopLogprobs."""
    check_k(k, logits.shape[1])
    logprobs = logits.double().log_softmax(dim=-1).float()
    rank = (logits > logits.gather(1, tokens.unsqueeze(1))).sum(dim=-1) + 1
    top_ids = logits.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return TopLogprobs(
        logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1), rank, top_ids.contiguous(), logprobs.gather(1, top_ids)
    )
