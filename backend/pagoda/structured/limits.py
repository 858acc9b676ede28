"""What one structure may cost: the only bounds between a hostile grammar and everybody else's tokens.

A text is first tried in a child process (trial.py), which the kernel ends at its bounds of processor time and memory:
llguidance bounds most of its work by fuel, but not the building of a regular expression (`.?` 8,000 times over takes
nine seconds, `multipleOf: 999983` eight, and 366 MB). What has passed costs the engine the same again, once a
request. What a grammar may cost later, step by step, is bounded by fuel and by `Budget`.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLParserLimits

MAX_TEXT_BYTES = 64 * 1024
TRIAL_CPU_SECONDS = 1.0
TRIAL_MEMORY_BYTES = 64 * 2**20
TRIAL_STEPS = 64
"""Tokens of a random walk through the grammar that a trial takes."""
TRIAL_WALL_SECONDS = 10.0
"""A trial that has not ended by then waits for a busy machine, or behind other trials."""

STEP_ALLOWANCE = 0.25
"""Seconds of processor time that all steps of one request may take, beside SECONDS_A_TOKEN for each: automata are
built on the way, so single steps may be slow."""
SECONDS_A_TOKEN = 1e-7
"""For each token of the vocabulary, all of which a step may have to look at: 5 ms with 49,152 tokens, 13 with 128,256.
The slowest of harmless steps, `[a-z ]{5,600}`, take a tenth to a third of that."""


def parser_limits(vocab_size: int) -> LLParserLimits:
    """llguidance's own bounds, for building a grammar and for each step of it.

    Ordinary schemas need at most half of each. A step that uses up its fuel takes about 0.1 s. Where many tokens
    may come, each of them takes an item: `[a-z ]{5,60}` needs 0.3 of a vocabulary's size.
    """
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=40_000,
        step_max_items=max(20_000, vocab_size),
        max_items_in_row=2_000,
        max_lexer_states=250_000,
        max_grammar_size=100_000,
        verbose_errors=False,  # or an error would quote the whole grammar and the text so far
    )


class Exceeded(Exception):
    """A structure's steps have taken more processor time than they may."""


class Budget:
    """The processor time of one request's steps. Its own thread's time, so that a busy machine refuses nothing that
    an idle one serves."""

    def __init__(self, vocab_size: int) -> None:
        self._step = SECONDS_A_TOKEN * vocab_size
        self._left = STEP_ALLOWANCE

    def next_step(self) -> None:
        self._left = min(STEP_ALLOWANCE, self._left + self._step)

    def start(self) -> float:
        return time.thread_time()

    def spend(self, began: float) -> None:
        """Raises Exceeded once the steps have used up the allowance."""
        self._left -= time.thread_time() - began
        if self._left < 0:
            raise Exceeded(f"following it takes more than {self._step * 1000:.0f} ms a token")
