"""Log-probabilities as clients read them: which reported tokens are shown, where their text begins, how they are named.

A token's name is its text; one that holds a part of a character is named by its bytes, as OpenAI does, so that no two
tokens of a list look alike by accident.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from pagoda.protocol import TokenLogprob
from pagoda.text.detokenizer import IncrementalDetokenizer
from pagoda.text.generation import Delta
from pagoda.text.tokenizer import Tokenizer

from pagoda_openai.responses import (
    ChatLogprobs,
    ChatTokenLogprob,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TopLogprob,
)

FLOOR = -9999.0
"""Stands for minus infinity, which JSON cannot write; OpenAI's and vLLM's own convention."""


class Placed(NamedTuple):
    """A shown token."""

    report: TokenLogprob
    offset: int
    """Characters of the answer before the character that holds the token's first byte."""


class LogprobTrace:
    """Follows one answer and lets a token's report through once a character of the token is shown.

    A token that only a stop string held is thus never reported. Control tokens that the text leaves out count as
    shown with the text before them.
    """

    def __init__(self, tokenizer: Tokenizer, *, prompt_ids: Sequence[int], skip_special_tokens: bool) -> None:
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, skip_special_tokens=skip_special_tokens, prompt_ids=prompt_ids
        )
        self._hidden = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._decoded = 0
        self._shown = 0
        self._waiting: deque[tuple[int, Placed]] = deque()
        """With each, the number of shown characters it waits for."""

    def push(self, delta: Delta) -> list[Placed]:
        """The reports that `delta` and those before it let through."""
        for report in delta.logprobs or ():
            width = 0 if report.token_id in self._hidden else 1
            self._waiting.append((self._decoded + width, Placed(report, self._decoded)))
            self._decoded += len(self._detokenizer.push((report.token_id,)))
        self._shown += len(delta.text)
        ended = delta.finish_reason is not None and not delta.stopped
        through = []
        while self._waiting and (ended or self._waiting[0][0] <= self._shown):
            through.append(self._waiting.popleft()[1])
        return through


class TokenNames:
    """Names tokens for a response."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._table = tokenizer.token_bytes(skip_special_tokens=False)

    def completion(self, shown: Iterable[Placed], *, base: int, top: int) -> CompletionLogprobs:
        """`base`: characters of the choice's text before the answer. `top`: alternatives to list."""
        lists = CompletionLogprobs([], [], [], [])
        for report, offset in shown:
            lists.text_offset.append(base + offset)
            lists.tokens.append(self._name(report.token_id, "bytes:"))
            lists.token_logprobs.append(_finite(report.logprob))
            lists.top_logprobs.append(self._candidates(report, top))
        return lists

    def echoed(self, ids: Sequence[int], reports: Sequence[TokenLogprob], text: str, top: int) -> CompletionLogprobs:
        """The prompt's part of a completion's lists. `text` is the prompt as shown; its first token has no number."""
        shown = [Placed(report, offset) for report, offset in zip(reports, self._offsets(ids, text)[1:], strict=True)]
        rest = self.completion(shown, base=0, top=top)
        return CompletionLogprobs(
            [0, *rest.text_offset],
            [None, *rest.token_logprobs],
            [self._name(ids[0], "bytes:"), *rest.tokens],
            [None, *rest.top_logprobs],
        )

    def chat(self, shown: Iterable[Placed], *, top: int) -> ChatLogprobs:
        return ChatLogprobs([self._chat_token(placed.report, top) for placed in shown])

    def prompt(self, reports: Sequence[TokenLogprob], *, top: int) -> PromptLogprobs:
        """vLLM's shape: by token id, the token itself first, then the alternatives."""
        return [None, *(self._prompt_token(report, top) for report in reports)]

    def _chat_token(self, report: TokenLogprob, top: int) -> ChatTokenLogprob:
        alternatives = [TopLogprob(*self._chat_parts(token, value)) for token, value in report.top[:top]]
        return ChatTokenLogprob(*self._chat_parts(report.token_id, report.logprob), alternatives)

    def _chat_parts(self, token_id: int, logprob: float) -> tuple[str, float, list[int]]:
        return self._name(token_id, ""), _finite(logprob), list(self._bytes(token_id))

    def _candidates(self, report: TokenLogprob, top: int) -> dict[str, float]:
        pairs = [*report.top[:top], (report.token_id, report.logprob)]
        return {self._name(token, "bytes:"): _finite(value) for token, value in pairs}

    def _prompt_token(self, report: TokenLogprob, top: int) -> dict[str, PromptLogprob]:
        ranked = [(report.token_id, report.logprob, report.rank)]
        ranked += [(token, value, rank) for rank, (token, value) in enumerate(report.top[:top], start=1)]
        return {str(t): PromptLogprob(_finite(value), rank, self._name(t, "bytes:")) for t, value, rank in ranked}

    def _offsets(self, ids: Sequence[int], text: str) -> list[int]:
        """Where each prompt token begins in `text`, which may lack the control tokens put before it."""
        detokenizer = IncrementalDetokenizer(self._tokenizer, skip_special_tokens=False)
        ends = [0]
        decoded = ""
        for token_id in ids:
            decoded += detokenizer.push((token_id,))
            ends.append(len(decoded))
        decoded += detokenizer.finish()
        added = len(decoded) - len(text) if decoded.endswith(text) else 0
        return [min(max(0, start - added), len(text)) for start in ends[:-1]]

    def _bytes(self, token_id: int) -> bytes:
        if self._table is not None:
            return self._table[token_id]
        return self._tokenizer.decode([token_id], skip_special_tokens=False).encode()

    def _name(self, token_id: int, prefix: str) -> str:
        data = self._bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return prefix + "".join([f"\\x{byte:02x}" for byte in data])


def _finite(logprob: float) -> float:
    return max(logprob, FLOOR)
