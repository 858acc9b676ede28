"""The clock of a loop that takes others for dead when they are silent: it stands still while the loop does.

When a whole machine is paused (moved to another host, say), all of it is silent, and whoever wakes first has heard from
nobody. Only silence that somebody was awake to hear counts.
"""

from __future__ import annotations

import time

LONGEST_TURN = 0.5
"""Seconds that a turn counts for at most."""


class AwakeClock:
    """Seconds since its making in which its loop turned."""

    def __init__(self) -> None:
        self.now = 0.0
        self._last_turn = time.monotonic()

    def turn(self) -> None:
        """To be called at each turn of the loop, before anything is judged."""
        began = time.monotonic()
        self.now += min(began - self._last_turn, LONGEST_TURN)
        self._last_turn = began
