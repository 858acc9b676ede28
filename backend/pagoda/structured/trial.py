"""`python -m pagoda.structured.trial`: builds grammars where they can hurt nobody, and walks a little through each.

Standard input: a line with the Vocabulary, then a Structure a line; standard output: a Verdict a line. Each trial runs
in a fork of this process, which holds the vocabulary, has a single thread, and ends when its standard input does. The
kernel ends the fork at its bounds; the verdict then says which.
"""

from __future__ import annotations

import gc
import os
import random
import resource
import signal
import sys
from typing import TYPE_CHECKING, NoReturn

import msgspec

from pagoda.sampling_params import Structure
from pagoda.structured.grammar import grammar_of
from pagoda.structured.limits import (
    TRIAL_CPU_SECONDS,
    TRIAL_MEMORY_BYTES,
    TRIAL_STEPS,
    Budget,
    Exceeded,
)
from pagoda.structured.prover import Verdict
from pagoda.structured.vocabulary import Vocabulary, open_matcher, reason

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

NICE = 10
"""Behind the engine, whose steps other users wait for."""
_TOO_LONG = f"it takes more than {TRIAL_CPU_SECONDS:g} s to compile. Simplify it"
_TOO_LARGE = f"it needs more than {TRIAL_MEMORY_BYTES >> 20} MB to compile, or is nested too deeply. Simplify it"


def main() -> None:
    os.nice(NICE)
    vocabulary = msgspec.json.decode(sys.stdin.buffer.readline(), type=Vocabulary)
    try:
        tokenizer = vocabulary.load()
    except ValueError as error:
        _refuse_all(f"this model's tokenizer is not fit for it: {error}")
        return
    gc.freeze()
    for line in sys.stdin.buffer:
        _try_apart(tokenizer, vocabulary, line)


def _refuse_all(why: str) -> None:
    for _ in sys.stdin.buffer:
        _answer(Verdict(error=why))


def _answer(verdict: Verdict) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(verdict) + b"\n")
    sys.stdout.buffer.flush()


def _try_apart(tokenizer: LLTokenizer, vocabulary: Vocabulary, line: bytes) -> None:
    pid = os.fork()
    if pid == 0:
        _in_fork(tokenizer, frozenset(vocabulary.eos_token_ids), line)
    _, status = os.waitpid(pid, 0)
    if status != 0:
        _answer(Verdict(error=_TOO_LONG if os.WTERMSIG(status) == signal.SIGPROF else _TOO_LARGE))


def _in_fork(tokenizer: LLTokenizer, eos: frozenset[int], line: bytes) -> NoReturn:
    status = 1
    try:
        _bound()
        verdict = _try(tokenizer, eos, line)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _answer(verdict)
        status = 0
    finally:
        os._exit(status)


def _bound() -> None:
    """SIGPROF's own action is to end the process, in the middle of whatever it does."""
    with open("/proc/self/statm") as statm:
        size = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + TRIAL_MEMORY_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # Rust tells at length where its memory ran out
    signal.setitimer(signal.ITIMER_PROF, TRIAL_CPU_SECONDS)


def _try(tokenizer: LLTokenizer, eos: frozenset[int], line: bytes) -> Verdict:
    try:
        grammar = grammar_of(msgspec.json.decode(line, type=Structure))
        _walk(open_matcher(tokenizer, grammar), tokenizer.vocab_size, eos)
    except (ValueError, Exceeded) as error:
        return Verdict(error=reason(str(error)))
    except (MemoryError, RecursionError):
        return Verdict(error=_TOO_LARGE)
    except BaseException as error:  # a panic of Rust's is no Exception
        return Verdict(error=f"the compiler failed on it: {reason(str(error))}")
    return Verdict(grammar=grammar)


def _walk(matcher: LLMatcher, vocab_size: int, eos: frozenset[int]) -> None:
    """A random text of TRIAL_STEPS tokens or to the structure's end. Raises ValueError when there is no way on, and
    Exceeded when the way is too slow."""
    budget, rng = Budget(vocab_size), random.Random(0)
    for _ in range(TRIAL_STEPS):
        budget.next_step()
        began = budget.start()
        mask = bytearray(matcher.compute_bitmask())
        budget.spend(began)
        for end in eos:
            mask[end // 8] &= ~(1 << end % 8)
        token = _any(mask, rng)
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        if token is None:
            if not matcher.is_accepting():
                raise ValueError("no text can satisfy it")
            return
        began = budget.start()
        matcher.consume_token(token)
        budget.spend(began)
    if matcher.is_error():
        raise ValueError(matcher.get_error())


def _any(mask: bytearray, rng: random.Random) -> int | None:
    """A token of the mask, the first at or after a random place."""
    start = rng.randrange(len(mask))
    for begin, part in ((start, mask[start:]), (0, mask[:start])):
        rest = part.lstrip(b"\0")
        if rest:
            bits = [bit for bit in range(8) if rest[0] >> bit & 1]
            return (begin + len(part) - len(rest)) * 8 + rng.choice(bits)
    return None


if __name__ == "__main__":
    main()
