"""From a structure to a grammar: tried in a child process first, then built where it is used."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pagoda.errors import InvalidRequest, Overloaded
from pagoda.sampling_params import Structure
from pagoda.structured.limits import MAX_TEXT_BYTES, TRIAL_WALL_SECONDS
from pagoda.structured.matcher import FIELD, Matcher
from pagoda.structured.prover import Prover
from pagoda.structured.vocabulary import Vocabulary, open_matcher, reason

if TYPE_CHECKING:
    from llguidance import LLTokenizer

NUM_VERDICTS = 128
"""Structures whose trials are remembered, refusals among them."""

_NAMES = {
    "json_schema": "the JSON schema",
    "json_object": "the JSON object",
    "regex": "the regular expression",
    "choice": "the list of choices",
    "lark": "the grammar",
}


@dataclass(frozen=True, slots=True)
class Grammar:
    """A structure that has passed its trial. Cheap to keep: it holds the grammar's text."""

    text: str
    tokenizer: LLTokenizer
    eos_token_ids: frozenset[int]

    def matcher(self) -> Matcher:
        """A matcher of its own for each request: nothing that one request's text makes grow is shared with another.

        Builds the automaton anew: 0.5 to 10 ms as a rule, and never more than TRIAL_CPU_SECONDS; call it off the loop.
        Lets other threads run. Raises InvalidRequest when the grammar cannot be built after all.
        """
        try:
            inner = open_matcher(self.tokenizer, self.text)
        except ValueError as error:
            raise InvalidRequest(f"{FIELD}: the grammar cannot be used: {reason(str(error))}", field=FIELD) from None
        return Matcher(inner, self.eos_token_ids, self.tokenizer.vocab_size)


class Compiler:
    """A model's structures. Safe to share between threads; costs nothing before its first use, which takes a second.

    The engine process and a child hold the vocabulary from then on, 60 MB each for 49,152 tokens.
    """

    def __init__(self, tokenizer_folder: Path, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._vocabulary = Vocabulary(str(tokenizer_folder), vocab_size, tuple(eos_token_ids))
        self._tokenizer: LLTokenizer | None = None
        self._prover = Prover(self._vocabulary)
        self._verdicts: OrderedDict[Structure, str | InvalidRequest] = OrderedDict()
        self._trial_lock = threading.Lock()
        self._load_lock = threading.Lock()

    def compile(self, structure: Structure) -> Grammar:
        """Raises InvalidRequest, saying what is wrong, and Overloaded when too many others wait for theirs.

        A structure seen lately takes microseconds, a new one some 10 ms, and a hostile one up to TRIAL_CPU_SECONDS of
        a child's processor time. Blocks; other threads run meanwhile.
        """
        _check_size(structure)
        verdict = self._verdicts.get(structure) or self._try(structure)
        if isinstance(verdict, InvalidRequest):
            raise InvalidRequest(verdict.message, field=verdict.field)
        return Grammar(verdict, self._loaded(), frozenset(self._vocabulary.eos_token_ids))

    def close(self) -> None:
        """End the child process, if there is one."""
        self._prover.close()

    def _try(self, structure: Structure) -> str | InvalidRequest:
        """One at a time: a flood of grammars takes one core, at a low priority, from the engine."""
        if not self._trial_lock.acquire(timeout=TRIAL_WALL_SECONDS):
            raise Overloaded("too many grammars wait to be compiled: try again in a moment")
        try:
            return self._verdicts.get(structure) or self._remember(structure)
        finally:
            self._trial_lock.release()

    def _remember(self, structure: Structure) -> str | InvalidRequest:
        found = self._prover.prove(structure)
        verdict = found.grammar if not found.error else _refusal(structure, found.error)
        self._verdicts[structure] = verdict
        while len(self._verdicts) > NUM_VERDICTS:
            self._verdicts.popitem(last=False)
        return verdict

    def _loaded(self) -> LLTokenizer:
        with self._load_lock:
            if self._tokenizer is None:
                self._tokenizer = self._vocabulary.load()
            return self._tokenizer


def _check_size(structure: Structure) -> None:
    size = len(structure.text.encode())
    if size > MAX_TEXT_BYTES:
        raise _refusal(structure, f"it has {size} bytes; at most {MAX_TEXT_BYTES} are allowed")


def _refusal(structure: Structure, why: str) -> InvalidRequest:
    return InvalidRequest(f"{FIELD}: {_NAMES[structure.kind]} cannot be used: {why}", field=FIELD)
