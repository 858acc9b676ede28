"""A request's tokens as text: what both the text worker and the OpenAI frontend stream."""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec

from pagoda.client import RequestStream
from pagoda.protocol import Usage
from pagoda.text.stream import TextStream


class Delta(msgspec.Struct, frozen=True):
    """New text of a request. `usage` comes with the first and the last."""

    text: str
    num_tokens: int
    """Output tokens of this delta."""
    finish_reason: str | None
    usage: Usage | None


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
            stream.abort("stop_string", piece.tokens_kept)
            yield Delta(piece.text, piece.tokens_kept - shown, "stop", _kept(usage, piece.tokens_kept))
            return
        shown += len(output.token_ids)
        rest = text.finish() if output.finish_reason is not None else ""
        yield Delta(piece.text + rest, len(output.token_ids), output.finish_reason, output.usage)


def _kept(usage: Usage | None, tokens: int) -> Usage | None:
    return Usage(usage.prompt_tokens, tokens, usage.cached_tokens) if usage else None
