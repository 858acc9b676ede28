"""Time of a step's sampling, from logits to tokens on the host: what each wish of its requests costs.

    python -m pagoda.bench.sampler

On the device that the engine would take. Every request of a step has the wish, which is the dearest case; a step whose
requests have none pays for none: plain greedy stands beside its floor, an argmax and its copy to the host.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
import pagoda_kernels
import torch
from numpy.typing import NDArray

from pagoda import wishes
from pagoda.plan import Chunk
from pagoda.request import Request, Status
from pagoda.runner import resolve_device
from pagoda.sampler import Sampler
from pagoda.sampling_params import SamplingParams, Structure

VOCABULARY = 49152
PROMPT_TOKENS = 256
OUTPUT_TOKENS = 128
ROWS = (32, 256)
SECONDS = 2.0
"""Spent on each figure, beside the warm-up."""

WISHES = {
    "plain greedy": SamplingParams(temperature=0),
    "sampled": SamplingParams(),
    "top_p 0.9, top_k 50": SamplingParams(top_p=0.9, top_k=50),
    "greedy + penalties": SamplingParams(temperature=0, repetition_penalty=1.1, frequency_penalty=0.5),
    "greedy + grammar's mask": SamplingParams(temperature=0, structure=Structure("json_object")),
    "greedy + 5 logprobs": SamplingParams(temperature=0, logprobs=5),
    "greedy + all three": SamplingParams(
        temperature=0, repetition_penalty=1.1, frequency_penalty=0.5, structure=Structure("json_object"), logprobs=5
    ),
}


class HalfTheVocabulary:
    """A grammar that allows every other token and costs next to nothing itself."""

    is_finished = False

    def fill(self, row: NDArray[np.int32]) -> None:
        row.fill(0x55555555)

    def accept(self, token_id: int) -> bool:
        return token_id % 2 == 0


def make_chunks(count: int, params: SamplingParams) -> list[Chunk]:
    """Decodes of requests with random histories."""
    chance = random.Random(0)
    matcher = None if params.structure is None else HalfTheVocabulary()
    chunks = []
    for key in range(count):
        prompt = [chance.randrange(VOCABULARY) for _ in range(PROMPT_TOKENS)]
        request = Request(key, prompt, params, 1000, frozenset(), key, status=Status.RUNNING, matcher=matcher)
        request.token_ids += [chance.randrange(VOCABULARY) for _ in range(OUTPUT_TOKENS)]
        chunks.append(Chunk(request, len(request.token_ids) - 1, 1, True, False, 0))
    return chunks


def durations(step: Callable[[torch.Tensor], object], logits: torch.Tensor) -> Iterator[float]:
    """Seconds of each step over fresh logits, the first one left out, until SECONDS have been spent."""
    spent, warm = 0.0, False
    while spent < SECONDS:
        fresh = logits.clone()
        if logits.is_cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        step(fresh)
        seconds = time.perf_counter() - began
        if warm:
            yield seconds
            spent += seconds
        warm = True


@torch.inference_mode()
def measure(rows: int, params: SamplingParams, device: torch.device) -> float:
    """The median time of a step, seconds."""
    sampler = Sampler(pagoda_kernels.for_device(device), device, VOCABULARY)
    chunks = make_chunks(rows, params)
    asked = wishes.of(chunk.request for chunk in chunks)
    logits = torch.randn(rows, VOCABULARY, device=device) * 3
    return statistics.median(
        durations(lambda fresh: sampler.collect(sampler.launch(chunks, asked, fresh), None), logits),
    )


@torch.inference_mode()
def measure_argmax(rows: int, device: torch.device) -> float:
    """The median time of nothing but the largest logits' ids on the host, seconds."""
    logits = torch.randn(rows, VOCABULARY, device=device) * 3
    return statistics.median(durations(lambda fresh: fresh.argmax(dim=-1).tolist(), logits))


def main() -> None:
    """Print the median milliseconds of a step for steps of 32 and of 256 requests."""
    device = resolve_device("auto")
    print(f"{'every request':26}" + "".join(f"{f'{rows} rows':>12}" for rows in ROWS) + "   ms")
    _print("argmax alone", [measure_argmax(rows, device) for rows in ROWS])
    for name, params in WISHES.items():
        _print(name, [measure(rows, params, device) for rows in ROWS])


def _print(name: str, seconds: list[float]) -> None:
    print(f"{name:26}" + "".join(f"{figure * 1e3:12.2f}" for figure in seconds), flush=True)


if __name__ == "__main__":
    main()
