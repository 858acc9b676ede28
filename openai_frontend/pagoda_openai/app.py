"""The application: routes, errors, and one registry of models whose sessions last as long as the application."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pagoda
from fastapi import FastAPI
from pagoda.registry import Registry
from pagoda.triton_client import Triton

from pagoda_openai import errors
from pagoda_openai.http_metrics import HttpMetrics
from pagoda_openai.middleware import RequestGate
from pagoda_openai.model import Frontend
from pagoda_openai.routes import chat, completions, health, metrics, models
from pagoda_openai.settings import Settings, from_environment


def create_app(settings: Settings | None = None) -> FastAPI:
    """The ASGI application. Its sessions open when it starts, so it must be made inside the worker's event loop."""
    settings = settings or from_environment()
    triton = Triton(settings.triton_address, settings.triton_secret)
    registry = Registry(triton, "openai")
    frontend = Frontend(settings, registry)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(watch) for watch in (registry.run(), frontend.read_ahead())]
        yield
        for task in tasks:
            task.cancel()
        await registry.close("the server is shutting down")
        await triton.close()

    app = FastAPI(title="Pagoda", version=pagoda.__version__, lifespan=lifespan)
    app.state.frontend = frontend
    app.state.http_metrics = HttpMetrics()
    for module in (chat, completions, models, health, metrics):
        app.include_router(module.router)
    errors.install(app)
    app.add_middleware(RequestGate, frontend=frontend, http_metrics=app.state.http_metrics)
    return app
