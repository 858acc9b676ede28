"""What every request passes: a request id, the key check, the drain, one log line, one count.

Plain ASGI, so that streams and disconnects pass through untouched.
"""

from __future__ import annotations

import hmac
import logging
import re
import secrets
import time
from typing import TYPE_CHECKING

from pagoda.errors import EngineUnavailable
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pagoda_openai.errors import Unauthorized, response
from pagoda_openai.http_metrics import HttpMetrics

if TYPE_CHECKING:
    from pagoda_openai.model import Frontend

log = logging.getLogger("pagoda.openai.access")

OPEN_PATHS = frozenset({"/health", "/ready"})
"""Routes that load balancers ask without a key. Everything else is denied by default."""
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class RequestGate:
    """The outermost layer."""

    def __init__(self, app: ASGIApp, *, frontend: Frontend, http_metrics: HttpMetrics) -> None:
        self._app = app
        self._frontend = frontend
        self._metrics = http_metrics
        self._key = (frontend.settings.api_key or "").encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        record = _Record(_request_id(headers), time.monotonic())

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = record.request_id
            await send(message)

        try:
            refusal = self._refusal(scope["path"], headers)
            await (refusal or self._app)(scope, receive, send_marked)
        finally:
            self._account(scope, record)

    def _refusal(self, path: str, headers: Headers) -> ASGIApp | None:
        if path in OPEN_PATHS:
            return None
        if self._key and not _has_key(headers, self._key):
            return response(Unauthorized("a valid API key is needed: send it as 'Authorization: Bearer KEY'"))
        if self._frontend.is_draining:
            return response(EngineUnavailable("the server is shutting down: try another one"))
        return None

    def _account(self, scope: Scope, record: _Record) -> None:
        path = getattr(scope.get("route"), "path", "other")  # a pattern, never what a client wrote
        seconds = time.monotonic() - record.started
        self._metrics.count(scope["method"][:16], path, record.status, seconds)
        log.info(
            "request",
            extra={
                "request_id": record.request_id,
                "method": scope["method"][:16],
                "path": path,
                "status": record.status,
                "seconds": round(seconds, 4),
                "client": (scope.get("client") or ("-",))[0],
            },
        )


class _Record:
    def __init__(self, request_id: str, started: float) -> None:
        self.request_id = request_id
        self.started = started
        self.status = 499  # stays when the client left before an answer began


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if REQUEST_ID.fullmatch(given) else secrets.token_hex(12)


def _has_key(headers: Headers, key: bytes) -> bool:
    scheme, _, given = headers.get("authorization", "").partition(" ")
    return hmac.compare_digest(given.strip().encode(), key) and scheme.lower() == "bearer"
