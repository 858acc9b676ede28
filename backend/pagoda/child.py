"""A child process that cannot outlive its parent: it lives as long as its standard input stays open."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import NoReturn

import msgspec

from pagoda import gpus

SPIN_COUNT = "2000"
"""Turns that a thread of OpenMP's spins at a barrier before it sleeps, a few µs. Its default is milliseconds: beside
any other busy process on the same cores, two engines among them, each barrier then costs a time slice."""


class Child:
    """`python -m module`, told `start` as one line of JSON on its standard input.

    It sees the service's GPUs, or `gpu` alone of them.
    """

    def __init__(self, module: str, start: msgspec.Struct, directory: Path, gpu: int | None = None) -> None:
        # sys.executable is the stub's own binary inside Triton; the prefix is right in both places.
        python = Path(sys.prefix) / "bin" / "python3"
        self._words, its_end = os.pipe()
        os.set_blocking(self._words, False)
        command = [str(python), "-m", module, str(its_end), str(os.getppid())]
        environment = {"GOMP_SPINCOUNT": SPIN_COUNT, **gpus.shown(os.environ, gpu)}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, cwd=directory, env=environment, pass_fds=[its_end]
        )
        os.close(its_end)
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(start) + b"\n")
        self._process.stdin.flush()
        self.pidfd = os.pidfd_open(self._process.pid)
        """Readable once the process has ended."""

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def ending(self) -> str:
        """Once it has ended: "by signal 9", "with status 2"."""
        status = self._process.wait()
        return f"by signal {-status}" if status < 0 else f"with status {status}"

    def last_words(self) -> str | None:
        """Once it has ended: why, if it could say so (`leave`). Nothing on the way can lose them."""
        try:
            return os.read(self._words, select.PIPE_BUF).decode(errors="replace") or None
        except BlockingIOError:  # silent, and a process of its own still holds the other end
            return None

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
        os.close(self._words)


def die_with_parent() -> None:
    """In the child, once its start is read: end at once when standard input does, or when our parent's parent does.

    A stub that waits for tritonserver, for a metric, say, when that is killed would wait for ever, and hold us: so it
    is ended from here.
    """
    parent = os.pidfd_open(os.getppid())

    def watch() -> None:
        poller = select.poll()
        poller.register(sys.stdin, select.POLLIN)
        with contextlib.suppress(ProcessLookupError):
            poller.register(grandparent := os.pidfd_open(int(sys.argv[2])), select.POLLIN)
            while grandparent not in dict(poller.poll()):
                if not os.read(sys.stdin.fileno(), 4096):
                    os._exit(0)
            signal.pidfd_send_signal(parent, signal.SIGKILL)
        os._exit(0)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def leave(reason: str, status: int) -> NoReturn:
    """In the child: end now and leave the parent the reason, its first 4096 bytes.

    Without Python's own shutdown, which is slow and can hang while torch's threads run.
    """
    with contextlib.suppress(OSError):  # the parent is gone
        os.write(int(sys.argv[1]), reason.encode()[: select.PIPE_BUF])
    sys.stderr.flush()
    os._exit(status)
