"""The parameters of a text request, as Triton's vLLM backend takes them: JSON, or the request's own parameters.

Numbers may come as strings. An unknown or unavailable parameter is refused by name.
"""

from __future__ import annotations

from typing import Any

import msgspec

from pagoda.errors import InvalidRequest
from pagoda.sampling_params import SamplingParams
from pagoda.text.wire import TextRequest

DEFAULT_MAX_TOKENS = 16
"""As vLLM's SamplingParams."""
MAX_STOPS = 16
MAX_STOP_CHARS = 1024


class TextParameters(msgspec.Struct, frozen=True):
    sampling: SamplingParams
    stop: tuple[str, ...]


class _Given(msgspec.Struct, forbid_unknown_fields=True):
    max_tokens: int = DEFAULT_MAX_TOKENS
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] = []
    ignore_eos: bool = False


def parse(request: TextRequest) -> TextParameters:
    """Raises InvalidRequest naming the parameter."""
    if request.stream and request.exclude_input is False:
        raise InvalidRequest(
            "When streaming, exclude_input_in_output = False is not allowed.", field="exclude_input_in_output"
        )
    given = _convert(_object(request.parameters_json) if request.parameters_json else dict(request.parameters))
    return TextParameters(
        SamplingParams(
            max_tokens=given.max_tokens,
            temperature=given.temperature,
            top_p=given.top_p,
            top_k=given.top_k,
            min_p=given.min_p,
            seed=given.seed,
            stop_token_ids=tuple(given.stop_token_ids),
            ignore_eos=given.ignore_eos,
        ),
        check_stops(given.stop),
    )


def check_stops(stop: str | list[str] | None) -> tuple[str, ...]:
    """The stop strings of a request. Raises InvalidRequest for empty ones, too many, or too long."""
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > MAX_STOPS:
        raise InvalidRequest(f"stop holds {len(stops)} strings, the most allowed is {MAX_STOPS}", field="stop")
    for text in stops:
        if not 0 < len(text) <= MAX_STOP_CHARS:
            raise InvalidRequest(
                f"stop strings must hold 1 to {MAX_STOP_CHARS} characters, not {len(text)}", field="stop"
            )
    return stops


def _object(raw: str) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(raw)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise InvalidRequest(f"sampling_parameters is not valid JSON: {error}", field="sampling_parameters") from None
    if not isinstance(value, dict):
        raise InvalidRequest("sampling_parameters must be a JSON object", field="sampling_parameters")
    return value


def _convert(values: dict[str, Any]) -> _Given:
    unknown = sorted(set(values) - set(_Given.__struct_fields__))
    if unknown:
        known = ", ".join(_Given.__struct_fields__)
        raise InvalidRequest(f"parameter {unknown[0]!r} is not available; available: {known}", field=unknown[0])
    try:
        return msgspec.convert(values, _Given, strict=False)
    except msgspec.ValidationError as error:
        name = str(error).rpartition("$.")[2].strip("`").partition("[")[0]
        raise InvalidRequest(f"parameter {name}={values.get(name)!r}: {error}", field=name) from None
