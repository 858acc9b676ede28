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
    return_cumulative_logprob: bool = False
    return_logprobs: bool = False


class TextAbort(msgspec.Struct, tag="abort", frozen=True):
    """The client is gone."""

    id: int


TextMessage = TextRequest | TextAbort


class TextReply(msgspec.Struct, frozen=True, omit_defaults=True):
    """One response, its outputs by Triton's names: an element for each answer, None for what was not asked for."""

    id: int
    final: bool
    text_output: list[str] = []
    """New text when streaming."""
    finish_reason: list[str] | None = None
    """"None" until an answer has ended."""
    cumulative_logprob: list[float] | None = None
    """Of all tokens so far."""
    logprobs: list[str] | None = None
    """JSON, of this response's tokens alone."""
    prompt_logprobs: list[str] | None = None
    """One element, JSON; with the first tokens alone."""
    num_input_tokens: list[int] | None = None
    """One element."""
    num_output_tokens: list[int] | None = None
    """Of this response alone."""
    error_code: str | None = None
    error_message: str = ""


def failed(request_id: int, error: PagodaError) -> TextReply:
    return TextReply(request_id, True, error_code=error.code, error_message=error.message)


def cancelled(request_id: int) -> TextReply:
    return TextReply(request_id, True, error_code="cancelled", error_message="the client's connection ended")
