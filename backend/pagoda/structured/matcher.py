"""One request's way through its grammar: which tokens may come next."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pagoda.errors import InvalidRequest
from pagoda.structured.limits import Budget, Exceeded
from pagoda.structured.vocabulary import reason

if TYPE_CHECKING:
    import numpy as np
    from llguidance import LLMatcher
    from numpy.typing import NDArray

FIELD = "structured_outputs"


class Matcher:
    """Not for several threads at once."""

    def __init__(self, inner: LLMatcher, eos_token_ids: frozenset[int], tokenizer_size: int) -> None:
        """`tokenizer_size`: tokens of llguidance's vocabulary, at least the model's."""
        self._inner = inner
        self._eos = eos_token_ids
        self._num_words = -(-tokenizer_size // 32)
        self._budget = Budget(tokenizer_size)
        self._ended = False

    @property
    def is_finished(self) -> bool:
        """True when nothing but the end may follow, and after it. The text satisfies the structure then."""
        return self._ended or (self._inner.is_stopped() and not self._inner.is_error())

    def fill(self, row: NDArray[np.int32]) -> None:
        """Write the next token's mask: bit j of word i is set when token 32 i + j may come.

        End tokens may come where the structure may end, and nothing may come after one of them. `row` holds
        ceil(vocabulary / 32) words and is contiguous. Lets other threads run. Raises InvalidRequest when the grammar
        passes its limits on the way: this request cannot go on.
        """
        if self._ended:
            row.fill(0)
            return
        self._budget.next_step()
        began = self._budget.start()
        if row.size == self._num_words:
            self._inner.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        else:  # logits for fewer tokens than the tokenizer has
            row.view("uint8")[:] = bytearray(self._inner.compute_bitmask()[: row.nbytes])
        self._check(began)
        self._bar_an_early_end(row)

    def _bar_an_early_end(self, row: NDArray[np.int32]) -> None:
        """A grammar that names tokens by number may ask for an end token where its text may not end."""
        words = row.view("uint32")
        open_ends = [end for end in self._eos if end < 32 * words.size and words[end // 32] >> (end % 32) & 1]
        if open_ends and not self._inner.is_accepting():
            for end in open_ends:
                words[end // 32] &= ~(1 << end % 32) & 0xFFFFFFFF

    def accept(self, token_id: int) -> bool:
        """Go on by a token; False when the mask did not allow it, after which the request cannot go on.

        Raises InvalidRequest as `fill` does.
        """
        if self.is_finished:
            taken = not self._ended and token_id in self._eos
            self._ended |= taken
            return taken
        began = self._budget.start()
        taken = self._inner.try_consume_tokens([token_id]) == 1
        self._check(began)
        self._ended = taken and token_id in self._eos
        return taken

    def _check(self, began: float) -> None:
        try:
            self._budget.spend(began)
        except Exceeded as error:
            raise _failure(str(error)) from None
        if self._inner.is_error():
            raise _failure(reason(self._inner.get_error()))


def _failure(why: str) -> InvalidRequest:
    return InvalidRequest(f"{FIELD}: the grammar cannot be followed any further: {why}. Simplify it.", field=FIELD)
