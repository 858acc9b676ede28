"""What stands before every route: the key, the drain, the body's bounds. No Triton is needed to refuse."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import subprocess
import sys
from collections.abc import AsyncIterator

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from pagoda_openai.app import create_app
from pagoda_openai.settings import Settings

KEY = "correct-horse"
ROUTES = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/x"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/metrics"),
    ("GET", "/docs"),
    ("GET", "/openapi.json"),
    ("GET", "/no/such/route"),
    ("GET", "/health/../v1/models"),
    ("GET", "//health"),
    ("GET", "/health/"),
]


@pytest.fixture
async def app() -> FastAPI:
    return create_app(Settings(api_key=KEY, triton_address="127.0.0.1:1"))


def client_of(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://pagoda")


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer wrong", "Bearer correct-hors", "Basic correct-horse"])
@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_no_route_answers_without_the_key(app: FastAPI, method: str, path: str, header: str | None) -> None:
    headers = {} if header is None else {"authorization": header}
    async with client_of(app) as client:
        answer = await client.request(method, path, headers=headers)
    assert answer.status_code == 401
    assert answer.json()["error"]["type"] == "authentication_error"
    assert "x-request-id" in answer.headers


async def test_health_needs_no_key_and_tells_that_triton_is_away(app: FastAPI) -> None:
    async with client_of(app) as client:
        answer = await client.get("/health")
    assert answer.status_code == 503
    assert answer.json()["status"] == "Triton does not answer"


async def test_the_right_key_passes(app: FastAPI) -> None:
    async with client_of(app) as client:
        answer = await client.get("/v1/models", headers={"authorization": f"Bearer {KEY}"})
    assert answer.status_code == 200
    assert answer.json() == {"object": "list", "data": []}


async def test_a_draining_worker_refuses_new_work(app: FastAPI) -> None:
    app.state.frontend.is_draining = True
    async with client_of(app) as client:
        answer = await client.get("/v1/models", headers={"authorization": f"Bearer {KEY}"})
        ready = await client.get("/ready")
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    assert ready.status_code == 503


@contextlib.asynccontextmanager
async def listening(app: FastAPI) -> AsyncIterator[int]:
    """The port at which uvicorn serves the application in this event loop."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, access_log=False, lifespan="off"))
    serving = asyncio.create_task(server._serve())  # `serve` would take the signals of the test's process
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await serving


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    ("length", "begun"),
    [("content-length: 100", b'{"model"'), ("transfer-encoding: chunked", b"no size\r\n")],
    ids=["half a body", "broken chunk"],
)
async def test_a_client_that_leaves_while_it_sends_is_no_error(
    caplog: pytest.LogCaptureFixture, path: str, length: str, begun: bytes
) -> None:
    caplog.set_level(logging.INFO)
    async with listening(create_app(Settings(triton_address="127.0.0.1:1"))) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"POST {path} HTTP/1.1\r\nhost: pagoda\r\n{length}\r\n\r\n".encode())
        await asyncio.sleep(0.1)  # the request runs before the rest comes
        writer.write(begun)
        await asyncio.sleep(0.1)
        writer.close()
        seen: list[logging.LogRecord] = []
        for _ in range(1000):
            seen = seen or [r for r in caplog.records if r.name == "pagoda.openai.access"]
            await asyncio.sleep(0 if seen else 0.01)
    assert [r.__dict__["status"] for r in seen] == [499]
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR] == []


def test_the_frontend_needs_no_torch() -> None:
    """Also not where torch is installed."""
    code = "import sys; sys.modules['torch'] = None; import pagoda_openai.app, pagoda_openai.worker"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
