"""A chat with a running server over HTTP, standard library only: for the terminal, and for the proof at start."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from pagoda.errors import ConfigError, PagodaError


class ServerError(PagodaError):
    """What the server answered instead of a stream."""


def root(url: str) -> str:
    """A server's address without its /v1. Raises ConfigError for what is no http or https URL."""
    if not _is_address(url):
        raise ConfigError(f"url = {url!r} is no address of a server: write one like http://127.0.0.1:9000")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port out of range, half of an IPv6 address
        return False


def get_json(url: str, api_key: str | None = None) -> Any:
    with _open(urllib.request.Request(url, headers=_headers(api_key)), timeout=10) as response:
        try:
            return json.load(response)
        except ValueError:
            raise ServerError(f"what answers at {url} sends no JSON: give the address of an OpenAI API") from None


def first_model(url: str, api_key: str | None = None) -> str:
    """The first of /v1/models. Raises ServerError."""
    models = get_json(f"{url}/v1/models", api_key)["data"]
    if not models:
        raise ServerError(f"the server at {url} has no model loaded; Pagoda loads one by `pagoda load NAME`")
    return str(models[0]["id"])


def stream_chat(
    url: str, model: str, messages: list[dict[str, str]], *, api_key: str | None = None, **parameters: Any
) -> Iterator[str]:
    """Pieces of the answer as they come. Raises ServerError with the server's own message."""
    body = {"model": model, "messages": messages, "stream": True, **parameters}
    headers = {**_headers(api_key), "content-type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
    with _open(request, timeout=300) as response:
        for line in _lines(response, url):
            if line.startswith(b"data: {"):
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise ServerError(chunk["error"]["message"])
                yield from (choice["delta"].get("content") or "" for choice in chunk["choices"])


def _lines(response: Any, url: str) -> Iterator[bytes]:
    """Those before the last one, which tells a whole answer from one that broke off."""
    why = "the connection was closed"
    try:
        for line in response:
            if line.startswith(b"data: [DONE]"):
                return
            yield line
    except (OSError, http.client.HTTPException) as error:
        why = str(error)
    raise ServerError(f"the answer from {url} broke off: {why}; ask again")


def _headers(api_key: str | None) -> dict[str, str]:
    return {"authorization": f"Bearer {api_key}"} if api_key else {}


def _open(request: urllib.request.Request, timeout: float) -> Any:
    try:
        return urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        raise ServerError(_message(error.read()) or f"the server answered {error.code}") from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)  # of a URLError; what comes later than the connection has none
        raise ServerError(f"no server answers at {request.full_url}: {reason}; start one with `pagoda serve`") from None


def _message(body: bytes) -> str | None:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return None
