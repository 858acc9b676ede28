"""GET /health (alive, and every engine's loop is moving) and /ready (takes requests now)."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse

from pagoda_openai.state import frontend_of

router = APIRouter()


@router.get("/health")
async def health(request: Request) -> JSONResponse:
    """200 when every loaded model's engine answers and moves; 503 says which does not, and why."""
    registry = frontend_of(request).registry
    models = {n: "ok" if e.is_healthy else e.trouble for n, e in registry}
    ok = registry.is_connected and bool(models) and all(state == "ok" for state in models.values())
    status = "ok" if ok else "Triton does not answer" if not registry.is_connected else "unhealthy"
    return JSONResponse({"status": status, "models": models}, 200 if ok else 503)


@router.get("/ready")
async def ready(request: Request) -> JSONResponse:
    """200 when a request would be served: some model is healthy and this worker is not about to end."""
    frontend = frontend_of(request)
    healthy = [name for name, entry in frontend.registry if entry.is_healthy]
    ok = bool(healthy) and not frontend.is_draining
    return JSONResponse({"ready": ok, "models": healthy}, 200 if ok else 503)
