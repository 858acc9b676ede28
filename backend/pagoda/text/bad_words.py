"""Bad words as the engine takes them: the token sequences that write them."""

from __future__ import annotations

from collections.abc import Sequence

from pagoda import sampling_params
from pagoda.errors import InvalidRequest
from pagoda.sampling_params import Structure
from pagoda.text.tokenizer import Tokenizer

MAX_WORDS = sampling_params.MAX_BAD_WORDS // 2
"""Each may need two sequences."""
MAX_WORD_CHARS = 256


def bad_word_ids(
    tokenizer: Tokenizer, words: Sequence[str] | None, structure: Structure | None = None
) -> tuple[tuple[int, ...], ...]:
    """Token sequences of `words`, each at a text's beginning and after a space, where that differs.

    A word spelled by other tokens, or inside another word, is not found by them; neither does vLLM find it.
    Raises InvalidRequest for too many words, or one empty, too long, or not Unicode, and for any beside a structure,
    while they can be shown as the client wrote them.
    """
    if structure is not None:
        sampling_params.check_beside_structure("bad_words", words)
    words = words or ()
    if len(words) > MAX_WORDS:
        raise InvalidRequest(
            f"bad_words holds {len(words)} strings; the most allowed is {MAX_WORDS}", field="bad_words"
        )
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        if not 0 < len(word) <= MAX_WORD_CHARS:
            raise InvalidRequest(
                f"bad_words must hold words of 1 to {MAX_WORD_CHARS} characters, not {word[:40]!r}", field="bad_words"
            )
        found.update(dict.fromkeys(_sequences(tokenizer, word.lstrip(" ") or word)))
    return tuple(found)


def _sequences(tokenizer: Tokenizer, word: str) -> list[tuple[int, ...]]:
    alone = tuple(tokenizer.encode(word, add_special_tokens=False))
    spaced = tuple(tokenizer.encode(f" {word}", add_special_tokens=False))
    return [alone] if spaced[-len(alone) :] == alone else [alone, spaced]
