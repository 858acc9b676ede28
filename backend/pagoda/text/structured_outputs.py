"""What a request says about its output's structure: OpenAI's `response_format` and vLLM's `structured_outputs`.

Only the shape is checked here; the engine tries the grammar itself.
"""

from __future__ import annotations

from typing import Any

import msgspec

from pagoda.errors import InvalidRequest
from pagoda.sampling_params import Structure

GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}
"""vLLM's older fields and what they are called inside of structured_outputs."""

_FORMATS = ("text", "json_object", "json_schema")
KEYS = ("json", "regex", "choice", "grammar", "json_object")
"""What structured_outputs may hold, one of them."""


def structure_of(response_format: dict[str, Any] | None, structured_outputs: dict[str, Any] | None) -> Structure | None:
    """None when neither asks for anything. Raises InvalidRequest naming the field, its value and what is allowed."""
    by_format = _of_response_format(response_format) if response_format is not None else None
    by_outputs = _of_structured_outputs(structured_outputs) if structured_outputs is not None else None
    if by_format is not None and by_outputs is not None:
        raise _invalid("structured_outputs", "cannot go together with response_format: leave one of them out")
    return by_format or by_outputs


def guided_refusal(name: str) -> InvalidRequest:
    """The error for one of vLLM's older fields, a key of GUIDED."""
    return _invalid(name, f'is not available: send structured_outputs: {{"{GUIDED[name]}": …}} instead')


def _of_response_format(given: dict[str, Any]) -> Structure | None:
    match given.get("type"):
        case "text":
            return None
        case "json_object":
            return Structure("json_object")
        case "json_schema":
            return _of_json_schema(given.get("json_schema"))
        case other:
            allowed = ", ".join(map(repr, _FORMATS))
            raise _invalid("response_format", f"must have one of these as its type: {allowed}; not {_shown(other)}")


def _of_json_schema(given: Any) -> Structure:
    """OpenAI's wrapper `{"name": …, "schema": …, "strict": …}`. Every schema is followed strictly."""
    if not isinstance(given, dict) or "schema" not in given:
        raise _invalid("response_format", 'of type json_schema needs json_schema: {"name": …, "schema": {…}}')
    return Structure("json_schema", _schema("response_format", given["schema"]))


def _of_structured_outputs(given: dict[str, Any]) -> Structure | None:
    asked = {key: value for key, value in given.items() if not _asks_for_nothing(key, value)}
    unknown = [key for key in asked if key not in KEYS]
    if unknown:
        allowed = ", ".join(KEYS)
        raise _invalid("structured_outputs", f"has no key {_shown(unknown[0])}; its keys are {allowed}")
    if len(asked) > 1:
        raise _invalid("structured_outputs", f"must have one of its keys, not {' and '.join(asked)}")
    return next((_of_key(key, value) for key, value in asked.items()), None)


def _asks_for_nothing(key: str, value: Any) -> bool:
    return value is None or (key == "json_object" and value is False)


def _of_key(key: str, value: Any) -> Structure:
    match key:
        case "json":
            return Structure("json_schema", _schema("structured_outputs", value))
        case "json_object":
            if value is not True:
                raise _invalid("structured_outputs", f"needs true or false for json_object, not {_shown(value)}")
            return Structure("json_object")
        case "choice":
            return Structure("choice", _choices(value))
        case _:
            return Structure("lark" if key == "grammar" else "regex", _text(key, value))


def _schema(field: str, value: Any) -> str:
    """A schema as an object, or as JSON in a string, which vLLM allows."""
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(value)
        except (msgspec.DecodeError, RecursionError) as error:
            raise _invalid(field, f"holds a schema that is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise _invalid(field, f"needs a JSON schema as an object, not {_shown(value)}")
    return _encoded(field, value)


def _choices(value: Any) -> str:
    if not isinstance(value, list) or not value or not all(isinstance(choice, str) and choice for choice in value):
        raise _invalid("structured_outputs", f"needs a list of strings for choice, none empty, not {_shown(value)}")
    return _encoded("structured_outputs", value)


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise _invalid("structured_outputs", f"needs a string for {key}, not {_shown(value)}")
    return value


def _encoded(field: str, value: Any) -> str:
    try:
        return msgspec.json.encode(value).decode()
    except RecursionError:
        raise _invalid(field, "is nested too deeply") from None


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:80]}…"


def _invalid(field: str, what: str) -> InvalidRequest:
    return InvalidRequest(f"{field} {what}", field=field)
