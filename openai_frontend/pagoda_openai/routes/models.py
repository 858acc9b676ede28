"""GET /v1/models and /v1/models/{name}."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from pagoda.errors import ModelNotFound
from pagoda.registry import Entry
from starlette.requests import Request

from pagoda_openai.state import frontend_of

router = APIRouter()


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """Every loaded model, as of now."""
    registry = frontend_of(request).registry
    await registry.poll()
    return {"object": "list", "data": [_card(n, e) for n, e in registry]}


@router.get("/v1/models/{name}")
async def model(request: Request, name: str) -> dict[str, Any]:
    registry = frontend_of(request).registry
    await registry.poll()
    for known, entry in registry:
        if known == name:
            return _card(name, entry)
    known_names = ", ".join(registry.names()) or "none"
    raise ModelNotFound(f"the model {name[:200]!r} does not exist; loaded models: {known_names}")


def _card(name: str, entry: Entry) -> dict[str, Any]:
    facts = entry.session.facts
    card = {"id": name, "object": "model", "created": int(entry.opened), "owned_by": "pagoda"}
    return {**card, "max_model_len": facts.max_model_len} if facts else card
