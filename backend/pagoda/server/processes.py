"""The processes of a running service: tritonserver with everything below it, and the frontend's workers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from pagoda import gpus
from pagoda.awake import AwakeClock
from pagoda.server.settings import ServeSettings
from pagoda.server.triton_runtime import TritonRuntime
from pagoda.triton_client import RESTRICTED, SECRET_NAME

log = logging.getLogger("pagoda.supervisor")

FOLLOWING = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execv(sys.argv[1], sys.argv[1:])"
"""Becomes another program, tritonserver, say, that watches nobody: with PR_SET_PDEATHSIG the kernel kills it when its
parent is gone. Within `subprocess` it would take a fork, with gRPC's threads in it."""

HEARTBEAT_TIMEOUT = 10.0
"""Seconds without a heartbeat after which a frontend worker counts as frozen."""


class TritonServer:
    """tritonserver in a session and process group of its own, so that a terminal's Ctrl-C does not reach it."""

    def __init__(self, runtime: TritonRuntime, settings: ServeSettings, scratch: Path, secret: str) -> None:
        self._runtime = runtime
        self._settings = settings
        self._scratch = scratch
        self._secret = secret
        self._log = settings.logs / "tritonserver.log"
        self._log_start = 0
        self._process: subprocess.Popen[bytes] | None = None

    def said(self) -> str:
        """Its log since it was started last."""
        return self._log.read_bytes()[self._log_start :].decode(errors="replace")

    @property
    def pid(self) -> int:
        return self._process.pid if self._process else -1

    @property
    def exit_status(self) -> int | None:
        return self._process.poll() if self._process else 0

    def start(self) -> None:
        environment = {**self._runtime.environment, "PAGODA_RUNTIME_DIR": str(self._scratch)}
        if self._settings.hide_gpus:
            environment = gpus.hidden(environment)
        with open(self._log, "ab") as log_file:
            self._log_start = log_file.tell()
            self._process = subprocess.Popen(
                self._command(),
                env=environment,
                cwd=self._scratch,
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _command(self) -> list[str]:
        s = self._settings
        restricted = f"{','.join(RESTRICTED)}:{SECRET_NAME}={self._secret}"
        http = (
            ["--http-address=127.0.0.1", f"--http-port={s.http_port}", f"--http-restricted-api={restricted}"]
            if s.triton_http
            else ["--allow-http=false"]
        )
        configs = ["--disable-auto-complete-config"] if s.configs_are_complete else []
        pinned = ["--pinned-memory-pool-byte-size=0"] if s.hide_gpus else []  # of no use without a GPU
        return [
            *(sys.executable, "-I", "-S", "-c", FOLLOWING),
            str(self._runtime.binary),
            f"--model-repository={s.model_repository.resolve()}",
            f"--backend-directory={self._runtime.backends}",
            f"--backend-config=python,shm-region-prefix-name={self._scratch.name}",
            "--model-control-mode=explicit",
            "--load-model=*",
            "--exit-on-error=false",
            "--exit-timeout-secs=3",
            "--grpc-address=127.0.0.1",
            f"--grpc-port={s.grpc_port}",
            f"--grpc-restricted-protocol={restricted}",
            "--metrics-address=127.0.0.1",
            f"--metrics-port={s.metrics_port}",
            "--allow-gpu-metrics=false",
            *http,
            *configs,
            *pinned,
        ]

    async def stop(self, grace: float) -> None:
        """Ask it to end, then end its whole process group, then sweep what a killed group leaves behind."""
        if self._process is None:
            return
        if grace > 0:
            self._process.send_signal(signal.SIGTERM)
            await _wait(self._process, grace)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await asyncio.to_thread(self._process.wait)
        self.sweep()
        self._process = None

    def sweep(self) -> None:
        """Remove the group's shared-memory regions, sockets and locks."""
        sweep_regions(self._scratch)
        for folder in self._scratch.glob("server-*"):
            for file in folder.iterdir():
                file.unlink(missing_ok=True)
            folder.rmdir()


def sweep_regions(scratch: Path) -> None:
    """Remove the shared-memory regions of a tritonserver that is gone."""
    for region in Path("/dev/shm").glob(f"{scratch.name}*"):
        region.unlink(missing_ok=True)


class FrontendWorker:
    """One uvicorn process on the listening socket that all share; it beats through a pipe."""

    def __init__(self, index: int, listener: socket.socket, environment: dict[str, str], logs: Path, cwd: Path) -> None:
        self.index = index
        self._listener = listener
        self._environment = environment
        self._log = logs / f"frontend-{index}.log"
        self._cwd = cwd
        self._process: subprocess.Popen[bytes] | None = None
        self._heartbeat = -1
        self._clock = AwakeClock()
        self._last_beat = 0.0
        self.is_ready = False
        """The worker can reach a model."""

    @property
    def pid(self) -> int:
        return self._process.pid if self._process else -1

    def start(self) -> None:
        self._heartbeat, theirs = os.pipe()
        os.set_blocking(self._heartbeat, False)
        self._last_beat = self._clock.now + 20  # starting takes a while
        self.is_ready = False
        arguments = {"fd": self._listener.fileno(), "heartbeat": theirs}
        with open(self._log, "ab") as log_file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pagoda_openai.worker", json.dumps(arguments)],
                env=self._environment,
                cwd=self._cwd,
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                pass_fds=(self._listener.fileno(), theirs),
                start_new_session=True,
            )
        os.close(theirs)

    def trouble(self) -> str | None:
        """Why the worker must be started again, or None."""
        assert self._process is not None
        self._clock.turn()
        if (status := self._process.poll()) is not None:
            return f"it ended with status {status}"
        with contextlib.suppress(BlockingIOError):
            if beats := os.read(self._heartbeat, 4096):
                self.is_ready = beats.endswith(b"1")
                self._last_beat = max(self._last_beat, self._clock.now)
        if self._clock.now - self._last_beat > HEARTBEAT_TIMEOUT:
            return f"no heartbeat for {HEARTBEAT_TIMEOUT:.0f} s"
        return None

    def terminate(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)

    async def stop(self, grace: float) -> None:
        """Wait for its end, then kill it."""
        if self._process is None:
            return
        await _wait(self._process, grace)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await asyncio.to_thread(self._process.wait)
        os.close(self._heartbeat)
        self._process = None


async def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
