"""Steps of made-up requests, which an engine tries before it serves: for what they take of memory, and to compile."""

from __future__ import annotations

from collections.abc import Iterator

from pagoda.plan import Chunk, Plan
from pagoda.request import Request, Status
from pagoda.sampling_params import MAX_LOGPROBS, SamplingParams

HEAVIEST = SamplingParams(temperature=1.0, top_k=50, top_p=0.9, repetition_penalty=1.1, logprobs=MAX_LOGPROBS)
"""Every parameter of sampling that takes memory."""
GREEDY = SamplingParams(temperature=0.0)
DRAWS = (
    GREEDY,
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=1.0, top_k=50),
    SamplingParams(temperature=1.0, top_p=0.9),
)
"""One for each set of kernels that draws."""
EDITS = (
    SamplingParams(repetition_penalty=1.1, logprobs=0),
    SamplingParams(temperature=0.0, repetition_penalty=1.1),
    SamplingParams(logit_bias={0: 1.0}),
    SamplingParams(allowed_token_ids=(0,)),
    SamplingParams(logit_bias={0: 1.0}, allowed_token_ids=(0,)),
)
"""One for each kernel that edits logits, and what kinds of draws then read."""


def largest_steps(max_num_seqs: int, budget: int, max_model_len: int, block_size: int) -> Iterator[Plan]:
    """The steps that take the most memory: of as many requests as there can be, and of one as long as it can be.

    They use block 0 alone.
    """
    for count in (min(max_num_seqs, budget), 1):
        length = min(budget // count, max_model_len)
        yield from _step([_request(i, length, block_size, HEAVIEST) for i in range(count)])


def mixed_steps(max_num_seqs: int, budget: int, max_model_len: int, block_size: int) -> Iterator[Plan]:
    """Streams beside a prompt: few and many, short and long. Each stream has a block of its own, all through."""
    for count in sorted(n for n in {1, max_num_seqs // 8, max_num_seqs - 1} if 0 < n < max_num_seqs):
        for context in sorted({min(length, max_model_len) for length in (2, 1024, 8192)}):
            streams = [_request(i, context, block_size, GREEDY, block=i) for i in range(count)]
            prompt = _request(count, min(budget - count, max_model_len), block_size, GREEDY, block=count)
            yield from _step([*streams, prompt], num_decodes=count)


def kinds_of_draws(max_num_seqs: int) -> Iterator[list[Chunk]]:
    """Chunks that sample, a list for each set of kernels that the sampler calls."""
    for count in sorted({1, max_num_seqs}):
        for params in (*DRAWS, *EDITS, HEAVIEST):
            for plan in _step([_request(i, 1, 1, params) for i in range(count)]):
                yield plan.chunks


def _step(requests: list[Request], num_decodes: int = 0) -> Iterator[Plan]:
    """A step that computes the last token of the first requests and all of the others'; then they have ended."""
    starts = [r.num_tokens - 1 if i < num_decodes else 0 for i, r in enumerate(requests)]
    yield Plan(0, [Chunk(r, s, r.num_tokens - s, True, False, 0) for r, s in zip(requests, starts, strict=True)])
    for request in requests:
        request.status = Status.FINISHED


def _request(key: int, length: int, block_size: int, params: SamplingParams, block: int = 0) -> Request:
    request = Request(key, [0] * length, params, 1, frozenset(), key)
    request.status = Status.RUNNING
    request.block_ids = [block] * -(-length // block_size)
    return request
