"""The answers to one text request as Triton's text outputs hold them: arrays, with an element for each answer.

As in Triton's vLLM backend: a response brings what is new of every answer, log-probabilities are JSON in a string.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence

import msgspec

from pagoda.client import Arrivals, RequestStream
from pagoda.errors import PagodaError
from pagoda.protocol import TokenLogprob
from pagoda.text.generation import Delta, DeltaReader
from pagoda.text.parameters import TextParameters
from pagoda.text.stream import TextStream
from pagoda.text.tokenizer import Tokenizer
from pagoda.text.wire import TextReply, TextRequest

FLOOR = -9999.0
"""Stands for minus infinity, which JSON cannot write; OpenAI's and vLLM's own convention."""
NOTHING_NEW = Delta("", 0, None, None)


async def rounds(streams: Sequence[RequestStream], texts: Sequence[TextStream]) -> AsyncIterator[dict[int, Delta]]:
    """What is new, by answer, until all have ended: tokens of one engine step come together.

    The error of one ends all, after what came before it. Whoever stops taking early must abort the streams.
    """
    readers = [DeltaReader(stream, text) for stream, text in zip(streams, texts, strict=True)]
    arrivals = Arrivals(streams)
    while not arrivals.are_over:
        await arrivals.wait()
        new: dict[int, Delta] = {}
        failure: PagodaError | None = None
        try:
            while (arrived := arrivals.take()) is not None:
                index, output = arrived
                new[index] = readers[index].push(output)
        except PagodaError as error:
            failure = error
        if new:
            yield new
        if failure is not None:
            raise failure


async def gathered(news: AsyncIterator[dict[int, Delta]], count: int) -> list[Delta]:
    """The `count` whole answers, from all rounds."""
    parts: list[list[Delta]] = [[] for _ in range(count)]
    async for new in news:
        for index, delta in new.items():
            parts[index].append(delta)
    return [_merged(deltas) for deltas in parts]


def _merged(parts: Sequence[Delta]) -> Delta:
    """One answer from all its deltas."""
    reports = [part.logprobs for part in parts if part.logprobs is not None]
    return Delta(
        "".join([part.text for part in parts]),
        sum([part.num_tokens for part in parts]),
        parts[-1].finish_reason,
        parts[-1].usage,
        [report for group in reports for report in group] if reports else None,
        parts[0].prompt_logprobs,
    )


def _likeliest(answers: Sequence[Delta], count: int) -> Sequence[Delta]:
    """By the mean log-probability of a token, the best first; in their own order when all are wanted."""
    return answers if count == len(answers) else sorted(answers, key=_mean_logprob, reverse=True)[:count]


def _mean_logprob(answer: Delta) -> float:
    reports = answer.logprobs or []
    return sum([report.logprob for report in reports]) / max(1, len(reports))


class Replies:
    """Makes a request's responses; remembers what they have said of each answer."""

    def __init__(
        self, request: TextRequest, parameters: TextParameters, tokenizer: Tokenizer, num_input_tokens: int
    ) -> None:
        self._request = request
        self._tokenizer = tokenizer
        self._num_input_tokens = num_input_tokens
        self._reasons = ["None"] * parameters.n
        self._sums = [0.0] * parameters.n

    def part(self, new: Mapping[int, Delta]) -> TextReply:
        """The next response of a stream; final once every answer has ended."""
        for index, delta in new.items():
            self._reasons[index] = delta.finish_reason or self._reasons[index]
            self._sums[index] += sum([report.logprob for report in delta.logprobs or ()])
        return self._reply([new.get(index, NOTHING_NEW) for index in range(len(self._reasons))])

    def whole(self, answers: Sequence[Delta]) -> TextReply:
        """The one response: the likeliest of the answers, each after the prompt unless that is left out."""
        prefix = "" if self._request.exclude_input else self._request.text
        scores = answers[0].prompt_logprobs
        chosen = _likeliest(answers, len(self._reasons))
        shown = [msgspec.structs.replace(a, text=prefix + a.text, prompt_logprobs=scores) for a in chosen]
        return self.part(dict(enumerate(shown)))

    def _reply(self, new: Sequence[Delta]) -> TextReply:
        asked = self._request
        return TextReply(
            id=asked.id,
            final="None" not in self._reasons,
            text_output=[delta.text for delta in new],
            finish_reason=list(self._reasons) if asked.return_finish_reason else None,
            cumulative_logprob=list(self._sums) if asked.return_cumulative_logprob else None,
            logprobs=[self._json(delta.logprobs or ()) for delta in new] if asked.return_logprobs else None,
            prompt_logprobs=self._prompt(new),
            num_input_tokens=[self._num_input_tokens] if asked.return_num_input_tokens else None,
            num_output_tokens=[delta.num_tokens for delta in new] if asked.return_num_output_tokens else None,
        )

    def _prompt(self, new: Sequence[Delta]) -> list[str] | None:
        """With the first answer's first tokens, for all of them. The first token, with nothing before it, has null."""
        reports = new[0].prompt_logprobs
        return None if reports is None else [self._json(reports, before=[None])]

    def _json(self, reports: Sequence[TokenLogprob], before: Sequence[None] = ()) -> str:
        return msgspec.json.encode([*before, *map(self._token, reports)]).decode()

    def _token(self, report: TokenLogprob) -> dict[str, dict[str, object]]:
        """By token id: the token itself first, then the alternatives."""
        ranked = [(report.token_id, report.logprob, report.rank)]
        ranked += [(token, value, rank) for rank, (token, value) in enumerate(report.top, start=1)]
        return {str(token): self._described(token, value, rank) for token, value, rank in ranked}

    def _described(self, token: int, logprob: float, rank: int) -> dict[str, object]:
        text = self._tokenizer.decode([token], skip_special_tokens=False)
        return {"logprob": max(logprob, FLOOR), "rank": rank, "decoded_token": text}
