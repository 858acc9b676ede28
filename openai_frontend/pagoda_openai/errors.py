"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import logging

import msgspec
from fastapi import FastAPI
from pagoda.errors import EngineFailure, PagodaError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

log = logging.getLogger("pagoda.openai")

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
}
RETRY_AFTER = "1"
"""Seconds, sent with every 503."""


class Unauthorized(PagodaError):
    code = "invalid_api_key"
    http_status = 401


class BodyTooLarge(PagodaError):
    code = "body_too_large"
    http_status = 413


class UnsupportedEncoding(PagodaError):
    code = "unsupported_encoding"
    http_status = 415


class ErrorBody(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(msgspec.Struct):
    error: ErrorBody


def envelope(error: PagodaError) -> ErrorEnvelope:
    kind = TYPES.get(error.http_status, "invalid_request_error" if error.http_status < 500 else "server_error")
    return ErrorEnvelope(ErrorBody(error.message, kind, getattr(error, "field", None), error.code))


def response(error: PagodaError) -> Response:
    headers = {"retry-after": RETRY_AFTER} if error.http_status == 503 else {}
    if error.http_status == 401:
        headers["www-authenticate"] = "Bearer"
    return Response(msgspec.json.encode(envelope(error)), error.http_status, headers, "application/json")


def install(app: FastAPI) -> None:
    """Every error leaves in this shape; one we did not foresee shows nothing of its inside."""

    async def pagoda_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, PagodaError)
        return response(error)

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        known = _HttpError(f"{request.method} {request.url.path[:200]}: {error.detail}")
        known.http_status = error.status_code
        answer = response(known)
        answer.headers.update(error.headers or {})
        return answer

    async def client_gone(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # for the log and the count alone: the server drops what nobody can read

    async def unforeseen(request: Request, error: Exception) -> Response:
        log.exception("a request failed by an unexpected error", exc_info=error)
        return response(EngineFailure("the server failed; its log has the reason under this request's id"))

    app.add_exception_handler(PagodaError, pagoda_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(ClientDisconnect, client_gone)
    app.add_exception_handler(Exception, unforeseen)


class _HttpError(PagodaError):
    code = "http_error"
    http_status: int = 500  # type: ignore[misc]
