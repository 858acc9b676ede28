"""One frontend process: `python -m pagoda_openai.worker '{"fd": 3, "heartbeat": 4}'`, a child of `pagoda serve`.

Serves on an inherited listening socket, beats into a pipe, and ends when the pipe's reader is gone.
On SIGTERM it takes no new requests, gives those in flight a grace, ends the rest with a reason, and leaves.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from pagoda import logs

from pagoda_openai.settings import from_environment

if TYPE_CHECKING:
    from pagoda_openai.model import Frontend


BEAT_INTERVAL = 0.25
"""Seconds."""


class Server(uvicorn.Server):
    """uvicorn, with a drain that ends streams with a reason instead of cutting them."""

    def __init__(self, config: uvicorn.Config, frontend: Frontend) -> None:
        super().__init__(config)
        self._frontend = frontend
        self._loop = asyncio.get_running_loop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self._frontend.is_draining:
            self._frontend.is_draining = True
            self._drain = asyncio.run_coroutine_threadsafe(self._end(self._frontend), self._loop)

    async def _end(self, frontend: Frontend) -> None:
        deadline = self._loop.time() + frontend.settings.drain_grace
        while frontend.registry.num_requests and self._loop.time() < deadline:
            await asyncio.sleep(0.05)
        await frontend.registry.close("the server is shutting down")
        self.should_exit = True


async def beat(descriptor: int, frontend: Frontend) -> None:
    """A byte every BEAT_INTERVAL that says whether a model answers; a broken pipe means that the supervisor is gone."""
    while True:
        try:
            os.write(descriptor, b"1" if any(entry.is_healthy for _, entry in frontend.registry) else b"0")
        except BrokenPipeError:
            os.kill(os.getpid(), signal.SIGTERM)
            return
        except BlockingIOError:
            pass
        await asyncio.sleep(BEAT_INTERVAL)


async def main(arguments: dict[str, int]) -> None:
    from pagoda_openai.app import create_app

    app = create_app()
    config = uvicorn.Config(
        app, log_config=None, access_log=False, timeout_graceful_shutdown=2, lifespan="on", server_header=False
    )
    os.set_blocking(arguments["heartbeat"], False)
    heartbeat = asyncio.create_task(beat(arguments["heartbeat"], app.state.frontend))
    await Server(config, app.state.frontend).serve(sockets=[socket.socket(fileno=arguments["fd"])])
    heartbeat.cancel()


if __name__ == "__main__":
    logs.configure()
    if folder := from_environment().metrics_folder:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
    import uvloop

    uvloop.run(main(json.loads(sys.argv[1])))
