"""What stands before every route: the key, the drain, the body's bounds. No Triton is needed to refuse."""

from __future__ import annotations

import subprocess
import sys

import httpx
import pytest
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


def test_the_frontend_needs_no_torch() -> None:
    """Also not where torch is installed."""
    code = "import sys; sys.modules['torch'] = None; import pagoda_openai.app, pagoda_openai.worker"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
