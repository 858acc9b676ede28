"""A request's tokens as text: what both the text worker and the OpenAI frontend stream."""

from __future__ import annotations

import msgspec

from pagoda.client import RequestStream
from pagoda.protocol import Output, TokenLogprob, Usage
from pagoda.text.stream import TextDelta, TextStream


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


class DeltaReader:
    """One request's outputs to text, one after the other. A stop string aborts the request with that reason."""

    def __init__(self, stream: RequestStream, text: TextStream) -> None:
        self._stream = stream
        self._text = text
        self._shown = 0
        self._usage: Usage | None = None

    def push(self, output: Output) -> Delta:
        """What the next output adds."""
        self._usage = output.usage or self._usage
        piece = self._text.push(output.token_ids)
        if piece.stopped:
            return self._stop(output, piece)
        self._shown += len(output.token_ids)
        return Delta(
            piece.text if output.finish_reason is None else piece.text + self._text.finish(),
            len(output.token_ids),
            output.finish_reason,
            output.usage,
            output.logprobs,
            output.prompt_logprobs,
        )

    def _stop(self, output: Output, piece: TextDelta) -> Delta:
        kept = piece.tokens_kept
        self._stream.abort("stop_string", kept)
        reported = None if output.logprobs is None else output.logprobs[: kept - self._shown]
        usage = _kept(self._usage, kept)
        return Delta(piece.text, kept - self._shown, "stop", usage, reported, output.prompt_logprobs, True)


def _kept(usage: Usage | None, tokens: int) -> Usage | None:
    return Usage(usage.prompt_tokens, tokens, usage.cached_tokens) if usage else None
