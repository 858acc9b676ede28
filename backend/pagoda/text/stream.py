"""One answer's text as its tokens come: detokenized, and ended by the first stop string."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import NamedTuple

from pagoda.text.detokenizer import IncrementalDetokenizer
from pagoda.text.stop import StopStrings
from pagoda.text.tokenizer import Tokenizer


class TextDelta(NamedTuple):
    """What one push adds."""

    text: str
    tokens_kept: int
    """Tokens of the answer so far; once stopped, those up to the one that completed the stop string."""
    stopped: bool


class TextStream:
    """The text of one answer. After a stop string, tokens and text count no more.

    `min_tokens`: stop strings are looked for only in the text of later tokens. `ends`: tokens that end an answer; they
    count and, unless `include_stop`, have no text, but for control tokens, which are `skip_special_tokens`' matter.
    Raises InvalidRequest for an empty stop.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stops: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        prompt_ids: Sequence[int] = (),
        min_tokens: int = 0,
        ends: Set[int] = frozenset(),
    ) -> None:
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, skip_special_tokens=skip_special_tokens, prompt_ids=prompt_ids
        )
        self._stops = StopStrings(stops, include=include_stop) if stops else None
        self._min_tokens = min_tokens
        self._hidden = frozenset() if include_stop else ends - tokenizer.special_ids
        self._num_tokens = 0

    @property
    def matched(self) -> str | None:
        """The stop string that ended the answer."""
        return self._stops.matched if self._stops else None

    def push(self, ids: Sequence[int]) -> TextDelta:
        """The text that may be shown after `ids`, the next tokens."""
        if self._stops is None:
            self._num_tokens += len(ids)
            return TextDelta(self._decode(ids), self._num_tokens, False)
        text = "".join([self._push_one(token_id, self._stops) for token_id in ids])
        return TextDelta(text, self._num_tokens, self._stops.matched is not None)

    def _push_one(self, token_id: int, stops: StopStrings) -> str:
        """One token at a time, so that the token that completes a stop string is known."""
        if stops.matched is not None:
            return ""
        self._num_tokens += 1
        text = self._decode((token_id,))
        return text if self._num_tokens <= self._min_tokens else stops.push(text)[0]

    def _decode(self, ids: Sequence[int]) -> str:
        """Nothing comes after a token that ends the answer."""
        return self._detokenizer.push(ids[:-1] if ids and ids[-1] in self._hidden else ids)

    def finish(self) -> str:
        """The rest, when no more tokens come: an incomplete character, and what could have begun a stop string."""
        rest = self._detokenizer.finish()
        if self._stops is None:
            return rest
        return self._stops.push(rest)[0] + self._stops.flush()
