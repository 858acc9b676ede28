"""Steps of made-up requests, which an engine tries before it serves: for what they take of memory, and to compile.

They use block 0 alone.
"""

from __future__ import annotations

from collections.abc import Iterator

from pagoda.plan import Chunk, Plan
from pagoda.request import Request, Status
from pagoda.sampling_params import MAX_LOGPROBS, SamplingParams

HEAVIEST = SamplingParams(temperature=1.0, top_k=50, top_p=0.9, repetition_penalty=1.1, logprobs=MAX_LOGPROBS)
"""Every parameter of sampling that takes memory."""
DRAWS = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=1.0, top_k=50),
    SamplingParams(temperature=1.0, top_p=0.9),
)
"""One for each set of kernels that draws."""
EDITS = (
    SamplingParams(repetition_penalty=1.1, logprobs=0),
    SamplingParams(logit_bias={0: 1.0}),
    SamplingParams(allowed_token_ids=(0,)),
    SamplingParams(logit_bias={0: 1.0}, allowed_token_ids=(0,)),
)
"""One for each kernel that edits logits, and what kinds of draws then read."""


def largest_steps(max_num_seqs: int, budget: int, max_model_len: int, block_size: int) -> Iterator[Plan]:
    """The steps that take the most memory: of as many requests as there can be, and of one as long as it can be."""
    for count in (min(max_num_seqs, budget), 1):
        length = min(budget // count, max_model_len)
        yield from _step([HEAVIEST] * count, length, block_size)


def kinds_of_draws(max_num_seqs: int) -> Iterator[list[Chunk]]:
    """Chunks that sample, a list for each set of kernels that the sampler calls."""
    for count in sorted({1, max_num_seqs}):
        for params in (*DRAWS, *EDITS, HEAVIEST):
            for plan in _step([params] * count, 1, 1):
                yield plan.chunks


def _step(params: list[SamplingParams], length: int, block_size: int) -> Iterator[Plan]:
    """A step that computes prompts of this length and samples; afterwards the requests have ended."""
    requests = [_request(i, length, block_size, wanted) for i, wanted in enumerate(params)]
    yield Plan(0, [Chunk(request, 0, length, True, False, 0) for request in requests])
    for request in requests:
        request.status = Status.FINISHED


def _request(key: int, length: int, block_size: int, params: SamplingParams) -> Request:
    request = Request(key, [0] * length, params, 1, frozenset(), key)
    request.status = Status.RUNNING
    request.block_ids = [0] * -(-length // block_size)
    return request
