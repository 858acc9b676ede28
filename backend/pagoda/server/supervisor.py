"""`pagoda serve`: starts tritonserver and the frontend, watches them, and restarts the smallest thing that is dead.

    a frontend worker   dead, or without a heartbeat        that worker
    the engine          dead or frozen                      by its host in the stub, not from here
    a stub              no sign of life in the session      tritonserver's process group: a dead stub stays dead
    tritonserver        dead                                its process group

Ctrl-C and SIGTERM drain for a bounded time and end everything.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from pagoda.errors import ConfigError
from pagoda.registry import LOST_SILENCE, Registry
from pagoda.server.doctor import port_owner
from pagoda.server.processes import FrontendWorker, TritonServer, sweep_regions
from pagoda.server.settings import Instance, ServeSettings, holding, instance_file, write_instance, written_instance
from pagoda.server.triton_runtime import assemble
from pagoda.triton_client import Triton

log = logging.getLogger("pagoda.supervisor")

WATCH_INTERVAL = 0.25
MAX_BACKOFF = 30.0


class Supervisor:
    """One running service. `announce` is called once, when it answers."""

    def __init__(self, settings: ServeSettings, announce: Callable[[Supervisor], None]) -> None:
        self.settings = settings
        self.secret = secrets.token_hex(16)
        self.started = time.monotonic()
        self._announce = announce
        self._scratch = Path()
        """Sockets, locks and copies of this run; short, because a Unix socket's path may hold 107 bytes."""
        self._stop = asyncio.Event()
        self._restarts = 0
        self._reported: set[tuple[str, str]] = set()
        """Models that could not be loaded, and why, as far as it was said."""
        self._triton_started = 0.0

    async def run(self) -> None:
        """Serve until a signal. Raises ConfigError when the service cannot start."""
        with holding(self.settings.run_folder):
            if (killed := written_instance(self.settings.run_folder)) is not None:
                sweep_regions(Path(killed.scratch))
                shutil.rmtree(killed.scratch, ignore_errors=True)
            await self._run()

    async def _run(self) -> None:
        self.settings.logs.mkdir(parents=True, exist_ok=True)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, self._stop.set)
        self._scratch = Path(tempfile.mkdtemp(prefix="pagoda-"))
        try:
            await self._serve()
        finally:
            shutil.rmtree(self._scratch, ignore_errors=True)

    async def _serve(self) -> None:
        with self._listen() as listener:
            s = self.settings
            _check_port(s.grpc_port, "--grpc-port")
            _check_port(s.metrics_port, "--metrics-port")
            if s.triton_http:
                _check_port(s.http_port, "--http-port")
            self.triton = TritonServer(assemble(self._scratch / "triton"), self.settings, self._scratch, self.secret)
            self._client = Triton(f"127.0.0.1:{self.settings.grpc_port}", self.secret)
            self.registry = Registry(self._client, "supervisor")
            self.workers = [
                FrontendWorker(i, listener, self._frontend_environment(), self.settings.logs, self._scratch)
                for i in range(self.settings.workers)
            ]
            watch = asyncio.create_task(self.registry.run())
            try:
                self._start_triton()
                for worker in self.workers:
                    worker.start()
                write_instance(self.settings.run_folder, self.instance())
                await self._first_model()
                if not self._stop.is_set():
                    self._announce(self)
                    self._report(self._unread())
                await self._watch()
            finally:
                watch.cancel()
                await self._end()

    def instance(self) -> Instance:
        s = self.settings
        return Instance(
            pid=os.getpid(),
            url=s.url,
            grpc_address=f"127.0.0.1:{s.grpc_port}",
            metrics_url=f"http://127.0.0.1:{s.metrics_port}/metrics",
            http_url=f"http://127.0.0.1:{s.http_port}" if s.triton_http else None,
            scratch=str(self._scratch),
            secret=self.secret,
        )

    def _listen(self) -> socket.socket:
        listener = socket.socket(socket.AF_INET6 if ":" in self.settings.host else socket.AF_INET)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((self.settings.host, self.settings.port))
        except OSError as error:
            listener.close()
            raise _unusable(self.settings.port, "--port", error) from None
        listener.listen(4096)
        return listener

    def _frontend_environment(self) -> dict[str, str]:
        settings = {
            "triton_address": f"127.0.0.1:{self.settings.grpc_port}",
            "triton_secret": self.secret,
            "api_key": self.settings.api_key,
            "metrics_folder": str(self._scratch / "metrics"),
            "drain_grace": self.settings.drain_grace,
        }
        (self._scratch / "metrics").mkdir(exist_ok=True)
        return {**os.environ, "PAGODA_FRONTEND": json.dumps(settings)}

    # ── the watch ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _start_triton(self) -> None:
        self._triton_started = time.monotonic()
        self.triton.start()
        log.info("tritonserver started, process %d", self.triton.pid)

    async def _first_model(self) -> None:
        """Until a model is healthy. Raises ConfigError when every model failed to load, or Triton ended."""
        while not self._stop.is_set():
            if any(entry.is_healthy for _, entry in self.registry) and self._workers_ready():
                return
            if self.triton.exit_status is not None:
                tail = _tail(self.settings.logs / "tritonserver.log")
                raise ConfigError(f"tritonserver ended with status {self.triton.exit_status} while it started:\n{tail}")
            if self.registry.is_connected and not list(self.registry):
                failed = {**self._unread(), **self.registry.failed}
                if failed:
                    reasons = "\n".join(f"  {name}: {reason}" for name, reason in failed.items())
                    raise ConfigError(f"no model could be loaded:\n{reasons}")
            await asyncio.sleep(0.05)

    def _workers_ready(self) -> bool:
        """Raises ConfigError when a worker ended while it started."""
        for worker in self.workers:
            if trouble := worker.trouble():
                tail = _tail(self.settings.logs / f"frontend-{worker.index}.log")
                raise ConfigError(f"frontend worker {worker.index} did not start: {trouble}\n{tail}")
        return all(worker.is_ready for worker in self.workers)

    async def _watch(self) -> None:
        while not self._stop.is_set():
            for worker in self.workers:
                if trouble := worker.trouble():
                    log.error("frontend worker %d is started again: %s", worker.index, trouble)
                    await worker.stop(grace=0)
                    worker.start()
            if trouble := self._triton_trouble():
                await self._restart_triton(trouble)
            self._report(self.registry.failed)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._stop.wait(), WATCH_INTERVAL)

    def _report(self, failed: dict[str, str]) -> None:
        """Beside models that serve, one that could not be loaded is easily overlooked."""
        for name, reason in failed.items() - self._reported:
            log.error("model %s could not be loaded: %s", name, reason)
        self._reported = set(failed.items())

    def _triton_trouble(self) -> str | None:
        if self.triton.exit_status is not None:
            return f"tritonserver ended with status {self.triton.exit_status}"
        for name, entry in self.registry:
            if entry.session.seconds_silent > LOST_SILENCE - 1:
                return f"the stub of model {name} gave no sign of life for {entry.session.seconds_silent:.0f} s"
        return None

    def _unread(self) -> dict[str, str]:
        """Folders that tritonserver made no model of, and why. It gives them no state and no reason: its log does."""
        said, found = self.triton.said(), {}
        for folder in sorted(self.settings.model_repository.iterdir()):
            about = rf"(?:model directory|failed to load model) '{re.escape(folder.name)}': (.*?)\"?$"
            for reason in re.findall(about, said, re.MULTILINE):
                found[folder.name] = reason
        return found

    async def _restart_triton(self, trouble: str) -> None:
        lived = time.monotonic() - self._triton_started
        self._restarts = 0 if lived > 60 else self._restarts + 1
        wait = 0.0 if self._restarts <= 1 else min(2.0**self._restarts, MAX_BACKOFF)
        log.error("tritonserver is started again in %.0f s: %s", wait, trouble)
        await self.triton.stop(grace=0)
        self.registry.forget(trouble)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._stop.wait(), wait)
        self._start_triton()

    async def _end(self) -> None:
        """Frontends first: they finish or end their streams with a reason; then Triton; then nothing is left."""
        for worker in self.workers:
            worker.terminate()
        await asyncio.gather(*(worker.stop(self.settings.drain_grace + 1.5) for worker in self.workers))
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self.registry.close("the server is shutting down"), 1.0)
        await self.triton.stop(grace=2.0)
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self._client.close(), 0.5)
        instance_file(self.settings.run_folder).unlink(missing_ok=True)


def _check_port(port: int, option: str) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise _unusable(port, option, error) from None


def _unusable(port: int, option: str, error: OSError) -> ConfigError:
    holder = f" by {port_owner(port)[0]}" if error.errno == errno.EADDRINUSE else ""
    return ConfigError(f"port {port} cannot be used: {error.strerror}{holder}; choose another with {option}")


def _tail(file: Path, lines: int = 15) -> str:
    return "\n".join(file.read_text("utf-8", "replace").splitlines()[-lines:])
