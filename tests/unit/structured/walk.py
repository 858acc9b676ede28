"""Random ways through a grammar, over the real vocabulary: what a model at an endless temperature would write."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pagoda.sampling_params import Structure
from pagoda.structured import Compiler, Grammar, Matcher

VOCAB, PADDED, EOS = 49152, 49280, 2
"""SmolLM2's vocabulary; the padding is ours."""

CLOSERS = ('"}', '"]', '"', "}", "]", ")", ".", "/", "@")
WANDER = 40
"""Steps after which a walk goes for the end."""
MAX_STEPS = 4000


class Walker:
    def __init__(self, grammar: Grammar, vocab_size: int, eos: int) -> None:
        self.grammar = grammar
        self.row: NDArray[np.int32] = np.zeros(-(-vocab_size // 32), np.int32)
        self.eos = eos
        single = [grammar.tokenizer.tokenize_str(text) for text in CLOSERS]
        self.closers = [ids[0] for ids in single if len(ids) == 1]

    def allowed(self, matcher: Matcher) -> NDArray[np.int64]:
        matcher.fill(self.row)
        return np.flatnonzero(np.unpackbits(self.row.view(np.uint8), bitorder="little"))

    def walk(self, seed: int, prefer: NDArray[np.bool_] | None = None) -> str:
        """The text of a walk to the structure's end, of which each token was allowed. `prefer`: tokens to take where
        they may come, marked."""
        matcher, rng, ids = self.grammar.matcher(), random.Random(seed), []
        for step in range(MAX_STEPS):
            allowed = self.allowed(matcher)
            assert len(allowed), "a walk has no way on"
            token = self.closer(rng) if step > WANDER else self.preferred(allowed, rng, prefer)
            token = rng.choice(allowed).item() if token is None else token
            assert matcher.accept(token)
            if token == self.eos:
                assert matcher.is_finished
                assert not len(self.allowed(matcher))
                return self.grammar.tokenizer.decode_bytes(ids).decode()
            ids.append(token)
        raise AssertionError(f"a walk does not end: …{self.grammar.tokenizer.decode_str(ids[-100:])}")

    def closer(self, rng: random.Random) -> int | None:
        """A token that leads to the end, if one may come: the end itself, if it may."""
        may = [t for t in (self.eos, *self.closers) if self.row[t // 32] >> (t % 32) & 1]
        return self.eos if self.eos in may else rng.choice(may or [None])

    def preferred(self, allowed: NDArray[np.int64], rng: random.Random, prefer: NDArray[np.bool_] | None) -> int | None:
        liked = allowed[prefer[allowed]] if prefer is not None else allowed[:0]
        return rng.choice(liked).item() if len(liked) else None


def walker(compiler: Compiler, kind: Any, text: str = "") -> Walker:
    return Walker(compiler.compile(Structure(kind, text)), PADDED, EOS)
