"""The loads that measurements share: seeded, so that every contender gets the same requests."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

FIRST_ID = 100
"""Token ids below it are in no prompt: control tokens are among them."""


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
        prompt = [draw.randrange(FIRST_ID, vocab_size) for _ in range(length)]
        loads.append(Load(prompt, draw.randint(*outputs)))
    return loads


def equal(count: int, length: int, output: int, *, vocab_size: int, seed: int = 0) -> list[Load]:
    """`count` requests of `length` tokens in and `output` out."""
    return mixed(count, inputs=(length, length), outputs=(output, output), vocab_size=vocab_size, seed=seed)


def shared(count: int, *, prefix: int, own: int, output: int, vocab_size: int, seed: int = 0) -> list[Load]:
    """`count` requests that begin with the same `prefix` tokens, and go on with `own` ones."""
    draw = random.Random(seed)
    first = [draw.randrange(FIRST_ID, vocab_size) for _ in range(prefix)]
    return [Load(first + [draw.randrange(FIRST_ID, vocab_size) for _ in range(own)], output) for _ in range(count)]


@dataclass(frozen=True)
class OfflineLoad:
    name: str
    """Requests × input → output tokens."""
    make: Callable[[int], list[Load]]
    """The requests, for a vocabulary's size."""
    peers_seconds: float | None = None
    """What vLLM took for it, its best of two runs, on a machine of its own."""
    at_once: int | None = None
    """Most requests that a client has on their way at once; None: no bound."""


def typed(name: str) -> str:
    """A load's name as a keyboard has it."""
    for sign, ascii_sign in (("×", "x"), ("→", "->"), ("…", ".."), (" ", "")):
        name = name.replace(sign, ascii_sign)
    return name


def is_named(load: OfflineLoad, start: str) -> bool:
    """Whether the load's name begins so, with x for × and -> for → allowed."""
    return typed(load.name).startswith(typed(start))


def _equal(count: int, length: int, output: int) -> Callable[[int], list[Load]]:
    return lambda vocab_size: equal(count, length, output, vocab_size=vocab_size)


GPU_LOADS = (
    OfflineLoad("1 × 128 → 256", _equal(1, 128, 256), 256 / 204),
    OfflineLoad("64 × 128 → 256", _equal(64, 128, 256), 64 * 256 / 9448),
    OfflineLoad("256 × 128 → 256", _equal(256, 128, 256), 256 * 256 / 18344),
    OfflineLoad("64 × 2048 → 1", _equal(64, 2048, 1), 64 * 2048 / 42478),
    OfflineLoad(
        "1000 × 64…1024 → 32…512",
        lambda vocab_size: mixed(1000, inputs=(64, 1024), outputs=(32, 512), vocab_size=vocab_size),
        30.5,
    ),
    OfflineLoad(
        "512 × (1024 shared + 64) → 64",
        lambda vocab_size: shared(512, prefix=1024, own=64, output=64, vocab_size=vocab_size),
        2.90,
    ),
    OfflineLoad("32 × 8000 → 128", _equal(32, 8000, 128), 8.33),
)
"""The peer's figures are those of Llama-3.1-8B's shapes in bfloat16 on an H200 (vLLM 0.26.0, its defaults)."""

HTTP_LOADS = (OfflineLoad("1000 × 512 → 128 at 256", _equal(1000, 512, 128), at_once=256),)
"""For a GPU behind HTTP only: the engine alone gets all its requests at once."""

CPU_LOADS = (
    OfflineLoad("1 × 64 → 64", _equal(1, 64, 64), 64 / 15.5),
    OfflineLoad("8 × 64 → 64", _equal(8, 64, 64), 8 * 64 / 73.9),
    OfflineLoad("32 × 64 → 64", _equal(32, 64, 64), 32 * 64 / 130.8),
    OfflineLoad(
        "32 × 16…256 → 32…256",
        lambda vocab_size: mixed(32, inputs=(16, 256), outputs=(32, 256), vocab_size=vocab_size),
    ),
)
"""The peer's figures are those of SmolLM2-135M in float32 on 2 cores (vLLM 0.32.0's build for CPUs)."""
