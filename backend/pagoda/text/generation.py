"""A request's tokens as text: what both the text worker and the OpenAI frontend stream."""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec

from pagoda.client import RequestStream
from pagoda.protocol import TokenLogprob, Usage
from pagoda.text.stream import TextStream


class Delta(msgspec.Struct, frozen=True):
    """New text of a request. `usage` comes with the first and the last."""

    text: str
    num_tokens: int
    """Output tokens of this delta."""
    finish_reason: str | None
    usage: Usage | None
    logprobs: list[TokenLogprob] | None = None
    """One for each of the delta's tokens, where asked for."""
    prompt_logprobs: list[TokenLogprob] | None = None
    """With the first delta, where asked for."""
    stopped: bool = False
    """A stop string was found: text of the last tokens may be left out."""


async def deltas(stream: RequestStream, text: TextStream) -> AsyncIterator[Delta]:
    """The text as it comes; the last delta has the finish reason. A stop string aborts the request with that reason.

    Whoever stops taking early must abort the stream.
    """
    shown = 0
    usage: Usage | None = None
    async for output in stream:
        usage = output.usage or usage
        piece = text.push(output.token_ids)
        if piece.stopped:
            kept = piece.tokens_kept
            stream.abort("stop_string", kept)
            reported = None if output.logprobs is None else output.logprobs[: kept - shown]
            prompt = output.prompt_logprobs
            yield Delta(piece.text, kept - shown, "stop", _kept(usage, kept), reported, prompt, True)
            return
        shown += len(output.token_ids)
        rest = text.finish() if output.finish_reason is not None else ""
        yield Delta(
            piece.text + rest,
            len(output.token_ids),
            output.finish_reason,
            output.usage,
            output.logprobs,
            output.prompt_logprobs,
        )


def _kept(usage: Usage | None, tokens: int) -> Usage | None:
    return Usage(usage.prompt_tokens, tokens, usage.cached_tokens) if usage else None
