"""A child process that cannot outlive its parent: it lives as long as its standard input stays open."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import msgspec

SPIN_COUNT = "2000"
"""Turns that a thread of OpenMP's spins at a barrier before it sleeps, a few µs. Its default is milliseconds: beside
any other busy process on the same cores, two engines among them, each barrier then costs a time slice."""


class Child:
    """`python -m module`, told `start` as one line of JSON on its standard input."""

    def __init__(self, module: str, start: msgspec.Struct, directory: Path) -> None:
        # sys.executable is the stub's own binary inside Triton; the prefix is right in both places.
        python = Path(sys.prefix) / "bin" / "python3"
        command = [str(python), "-m", module]
        environment = {"GOMP_SPINCOUNT": SPIN_COUNT, **os.environ}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=directory, env=environment)
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(start) + b"\n")
        self._process.stdin.flush()
        self.pidfd = os.pidfd_open(self._process.pid)
        """Readable once the process has ended."""

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_status(self) -> int | None:
        """None while it runs; negative for a signal."""
        return self._process.poll()

    def kill(self) -> None:
        self._process.kill()

    def end(self, grace: float) -> None:
        """Close its standard input, wait `grace` seconds, then kill; returns when it is gone."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=grace)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self.pidfd)


def die_with_parent() -> None:
    """In the child, once its start is read: end at once when standard input does."""

    def watch() -> None:
        while sys.stdin.buffer.read(4096):
            pass
        os._exit(0)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def describe_exit(status: int) -> str:
    return f"by signal {-status}" if status < 0 else f"with status {status}"
