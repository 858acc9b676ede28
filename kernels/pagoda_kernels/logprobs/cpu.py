"""top_logprobs for CPUs: no sort of the vocabulary unless equal logits leave their order open."""

from torch import Tensor

from . import TopLogprobs, check_k


def top_logprobs(logits: Tensor, tokens: Tensor, k: int) -> TopLogprobs:
    """See GetTopLogprobs."""
    check_k(k, logits.shape[1])
    own = logits.gather(1, tokens.unsqueeze(1))
    normaliser = logits.logsumexp(dim=-1, keepdim=True)
    top_ids = _top_ids(logits, k)
    return TopLogprobs(
        (own - normaliser).squeeze(1),
        (logits > own).sum(dim=-1) + 1,
        top_ids,
        logits.gather(1, top_ids) - normaliser,
    )


def _top_ids(logits: Tensor, k: int) -> Tensor:
    """Return the ids of the k largest, [R, k]; topk alone leaves the order of equals open."""
    best = logits.topk(min(k + 1, logits.shape[1]))
    ids = best.indices[:, :k]
    if k > 0:
        equal = (best.values[:, 1:] == best.values[:, :-1]).any(dim=-1)
        tied = equal.nonzero().squeeze(1)
        if len(tied) > 0:
            ids[tied] = logits[tied].sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return ids.contiguous()
