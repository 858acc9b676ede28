"""The parent's end of the trials: a child process, started at the first and again whenever it is gone."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from pagoda.errors import EngineFailure, Overloaded
from pagoda.sampling_params import Structure
from pagoda.structured.limits import TRIAL_WALL_SECONDS
from pagoda.structured.vocabulary import Vocabulary

START_WALL_SECONDS = 60.0


class Verdict(msgspec.Struct, frozen=True, omit_defaults=True):
    """Either the grammar that llguidance reads, or what is wrong, in words for the user."""

    grammar: str = ""
    error: str = ""


class Prover:
    """One trial at a time: the caller sees to it."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._child: subprocess.Popen[bytes] | None = None

    def prove(self, structure: Structure) -> Verdict:
        """Raises Overloaded when no answer comes in time, and EngineFailure when the child ends without one."""
        started = self._child is not None and self._child.poll() is None
        if not started:
            self.close()
            self._child = _start(self._vocabulary)
        try:
            return self._ask(structure, TRIAL_WALL_SECONDS if started else START_WALL_SECONDS)
        except BaseException:
            self.close()  # its answer would be taken for the next one's
            raise

    def _ask(self, structure: Structure, seconds: float) -> Verdict:
        child = self._child
        assert child is not None
        assert child.stdin is not None
        with contextlib.suppress(OSError):  # a child that has ended shows at its other end
            child.stdin.write(msgspec.json.encode(structure) + b"\n")
            child.stdin.flush()
        return msgspec.json.decode(_line(child, seconds), type=Verdict)

    def close(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                assert pipe is not None
                with contextlib.suppress(OSError):
                    pipe.close()


def _start(vocabulary: Vocabulary) -> subprocess.Popen[bytes]:
    # sys.executable is the stub's own binary inside Triton; the prefix is right in both places.
    command = [str(Path(sys.prefix) / "bin" / "python3"), "-m", "pagoda.structured.trial"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/", start_new_session=True)
    assert child.stdin is not None
    with contextlib.suppress(OSError):
        child.stdin.write(msgspec.json.encode(vocabulary) + b"\n")
        child.stdin.flush()
    return child


def _line(child: subprocess.Popen[bytes], seconds: float) -> bytes:
    assert child.stdout is not None
    deadline = time.monotonic() + seconds
    answer = b""
    while not answer.endswith(b"\n"):
        left = max(0.0, deadline - time.monotonic())
        if not select.select([child.stdout], [], [], left)[0]:
            raise Overloaded("the machine is too busy to compile a grammar: try again in a moment")
        part = os.read(child.stdout.fileno(), 65536)
        if not part:
            raise EngineFailure("the process that compiles grammars has ended; the server's log has the reason")
        answer += part
    return answer
