"""Where a request finds the frontend it belongs to."""

from __future__ import annotations

from starlette.requests import Request

from pagoda_openai.model import Frontend


def frontend_of(request: Request) -> Frontend:
    frontend: Frontend = request.app.state.frontend
    return frontend
