"""The loads that measurements share: seeded, so that every contender gets the same requests."""

from __future__ import annotations

import random

import msgspec


class Load(msgspec.Struct, frozen=True):
    """One request: a prompt of random token ids and the number of tokens to generate, end-of-text ignored."""

    prompt_ids: list[int]
    num_output: int


def mixed(
    count: int, *, inputs: tuple[int, int], outputs: tuple[int, int], vocab_size: int, seed: int = 0
) -> list[Load]:
    """`count` requests with lengths drawn uniformly from `inputs` and `outputs` (tokens, bounds included)."""
    draw = random.Random(seed)
    loads = []
    for _ in range(count):
        length = draw.randint(*inputs)
        prompt = [draw.randrange(100, vocab_size) for _ in range(length)]
        loads.append(Load(prompt, draw.randint(*outputs)))
    return loads
