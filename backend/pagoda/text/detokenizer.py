"""Token ids to text as they come, exactly what decoding them all at once gives.

Where tokens stand for bytes (decoding.py), the bytes of an incomplete character wait for the rest of it, three at most,
and everything before them is final: no look-back, nothing decoded twice. Other tokenizers go through `_Windows`.
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Sequence

from pagoda.text.decoding import REPLACEMENT, TokenBytes
from pagoda.text.tokenizer import Tokenizer

_LONGEST_CHARACTER = 4
"""Bytes of UTF-8's longest character."""
_LONGEST_WAIT = 16
"""Tokens after which `_Windows` shows what it has, complete or not, so that its windows stay small."""


class IncrementalDetokenizer:
    """The text of one continuation.

    `"".join(push...) + finish()` is what `decode(prompt + all)` adds to `decode(prompt)`; alone, `decode(all)`.
    A character that the prompt's last bytes begin belongs to the continuation that completes it.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, prompt_ids: Sequence[int] = ()
    ) -> None:
        table = tokenizer.token_bytes(skip_special_tokens=skip_special_tokens)
        self._decoder = (
            _Windows(tokenizer, skip_special_tokens, prompt_ids) if table is None else _Bytes(table, prompt_ids)
        )

    def push(self, ids: Sequence[int]) -> str:
        """The text that `ids` complete: whole characters only, never shown before and never taken back."""
        return self._decoder.push(ids)

    def finish(self) -> str:
        """What is left: U+FFFD where the last character never became complete, as in one-shot decoding."""
        return self._decoder.finish()


class _Bytes:
    """For tokens that stand for bytes."""

    def __init__(self, table: TokenBytes, prompt_ids: Sequence[int]) -> None:
        self._table = table
        self._errors = table.rules.errors
        before = _last_bytes(table, prompt_ids)
        self._tail = before[utf_8_decode(before, self._errors, False)[1] :]
        self._shown = self._tail.decode("utf-8", self._errors)
        """What the prompt's own decoding already shows for its incomplete last character."""
        self._strip = b"" if before else table.rules.strip

    def push(self, ids: Sequence[int]) -> str:
        data = self._tail + self._table.join(ids)
        if self._strip and data:
            data = data.removeprefix(self._strip)
            self._strip = b""
        return self._decode(data, False)

    def finish(self) -> str:
        return self._decode(self._tail, True)

    def _decode(self, data: bytes, final: bool) -> str:
        text, used = utf_8_decode(data, self._errors, final)
        self._tail = data[used:]
        if self._shown and text:
            text = text.removeprefix(self._shown)
            self._shown = ""
        return text


def _last_bytes(table: TokenBytes, ids: Sequence[int]) -> bytes:
    """The bytes of the last ids, a character's worth at least; none only if no id stands for any."""
    data = b""
    for token_id in reversed(ids):
        data = table[token_id] + data
        if len(data) >= _LONGEST_CHARACTER:
            break
    return data


class _Windows:
    """For decoders that look at neighbours (WordPiece, Metaspace, CTC): the new text is what a window of tokens gains.

    A window begins with the tokens of the last text shown, so that nothing new is at the start of what is decoded.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window = list(prompt_ids[-_LONGEST_WAIT:])
        self._num_shown = len(self._window)

    def push(self, ids: Sequence[int]) -> str:
        self._window += ids
        text = self._gain()
        waiting = len(self._window) - self._num_shown < _LONGEST_WAIT
        return "" if waiting and (not text or text.endswith(REPLACEMENT)) else self._show(text)

    def finish(self) -> str:
        return self._show(self._gain())

    def _gain(self) -> str:
        before = self._decode(self._window[: self._num_shown])
        return self._decode(self._window)[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)

    def _show(self, text: str) -> str:
        if text:
            self._window = self._window[self._num_shown :]
        self._num_shown = len(self._window)
        return text
