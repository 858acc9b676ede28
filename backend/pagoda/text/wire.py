"""Messages between the Triton stub and its text worker: the standard text contract."""

from __future__ import annotations

import msgspec

from pagoda.errors import PagodaError


class TextStart(msgspec.Struct, frozen=True):
    """First line of the worker's standard input."""

    model: str
    folder: str
    engine_address: str
    requests_address: str
    replies_address: str


class TextRequest(msgspec.Struct, tag="request", frozen=True):
    """One `text_input` request; `parameters` are as the client sent them, not checked yet."""

    id: int
    text: str
    stream: bool
    parameters: dict[str, str | int | float | bool]
    parameters_json: str
    """The `sampling_parameters` tensor; replaces `parameters` when not empty."""
    exclude_input: bool | None
    return_finish_reason: bool
    return_num_input_tokens: bool
    return_num_output_tokens: bool


class TextAbort(msgspec.Struct, tag="abort", frozen=True):
    """The client is gone."""

    id: int


TextMessage = TextRequest | TextAbort


class TextReply(msgspec.Struct, frozen=True, omit_defaults=True):
    """One response: `text` is a delta when streaming. The counts are None when they were not asked for."""

    id: int
    final: bool
    text: str = ""
    finish_reason: str | None = None
    num_input_tokens: int | None = None
    num_output_tokens: int | None = None
    """Output tokens of this response alone."""
    error_code: str | None = None
    error_message: str = ""


def failed(request_id: int, error: PagodaError) -> TextReply:
    return TextReply(request_id, True, error_code=error.code, error_message=error.message)


def cancelled(request_id: int) -> TextReply:
    return TextReply(request_id, True, error_code="cancelled", error_message="the client's connection ended")
