"""A request's body to a typed request: size, JSON, fields nobody can serve, types; each with a clear refusal."""

from __future__ import annotations

import logging
import re
from typing import Any, TypeVar

import msgspec
from pagoda.errors import InvalidRequest
from starlette.requests import Request

from pagoda_openai.errors import BodyTooLarge, UnsupportedEncoding
from pagoda_openai.refused import IGNORED, NEUTRAL, check_refused, excerpt
from pagoda_openai.requests import SamplingFields

log = logging.getLogger("pagoda.openai")

T = TypeVar("T", bound=SamplingFields)

_HALF = re.compile(rb"(?<!\\)(?:\\\\)*\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])")
"""The first half of a character as an escape, without its second; the backslash is not escaped itself."""
_NEAR = 64
"""Bytes before an error in which to look for its cause: a whole body would take too long beside others' streams."""


async def read_body(request: Request, limit: int) -> bytes:
    """The raw body. Raises BodyTooLarge before, or at, the crossing of the limit (bytes)."""
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedEncoding("a compressed body is not accepted: send it as plain JSON")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise BodyTooLarge(f"the body has {declared} bytes; the most allowed is {limit}")
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise BodyTooLarge(f"the body passes {limit} bytes, the most allowed")
        parts.append(part)
    return b"".join(parts)


def parse(body: bytes, kind: type[T]) -> T:
    """Raises InvalidRequest naming the field, its value and what is expected."""
    if not body.strip():
        raise InvalidRequest("the body is empty: send a JSON object")
    fields = _decode(body, dict[str, msgspec.Raw], {})
    known = _field_names(kind)
    for name, raw in fields.items():
        if name not in known:
            _check_other(name, raw, kind)
    request: T = _decode(body, kind, fields)
    return request


def _field_names(kind: Any) -> frozenset[str]:
    return frozenset(kind.__struct_fields__)


def _decode(body: bytes, kind: Any, fields: dict[str, msgspec.Raw]) -> Any:
    """`fields` are the body's, as far as they are known, to show the one that is wrong."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        name = _field_of(str(error))
        given = f"; {name} was given as {excerpt(bytes(fields[name]))}" if name in fields else ""
        raise InvalidRequest(f"the request is not valid: {error}{given}", field=name) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the body is not valid JSON: {_lone_surrogate(body, str(error)) or error}") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None


def _lone_surrogate(body: bytes, message: str) -> str | None:
    """What is wrong where the decoder speaks of pairs, of an escape or, close to the body's end, of truncated data."""
    found = re.search(r"\(byte (\d+)\)", message)
    end = int(found[1]) if found else len(body)
    if "surrogate pair" not in message and _HALF.search(body[max(0, end - _NEAR) : end]) is None:
        return None
    return f"a lone surrogate before byte {end} is no text: send surrogates in pairs, or the character itself"


def _field_of(message: str) -> str | None:
    """The request's field that a message of msgspec's is about: `… - at `$.messages[0].role`` or `… field `model``."""
    found = re.search(r"`\$\.?(\w*)[^`]*`$", message) or re.search(r" field `(\w+)`$", message)
    return (found[1] or None) if found else None


def _check_other(name: str, raw: msgspec.Raw, kind: type[SamplingFields]) -> None:
    if name in NEUTRAL:
        check_refused(name, _decode(bytes(raw), Any, {}), kind.neutral.get(name, NEUTRAL[name]))
    elif name not in IGNORED:
        log.warning("a request's unknown field is ignored", extra={"field": name[:100]})
