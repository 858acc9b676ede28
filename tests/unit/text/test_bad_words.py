"""Bad words become the token sequences that write them at a beginning and after a space."""

from __future__ import annotations

import pytest
from pagoda.errors import InvalidRequest
from pagoda.text.bad_words import MAX_WORDS, bad_word_ids
from pagoda.text.tokenizer import Tokenizer


def plain(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def test_a_word_has_two_spellings(smol: Tokenizer) -> None:
    both = (plain(smol, "Paris"), plain(smol, " Paris"))
    assert both[0] != both[1]
    assert bad_word_ids(smol, ["Paris"]) == both
    assert bad_word_ids(smol, [" Paris", "Paris"]) == both


def test_a_spelling_that_ends_with_the_other_says_nothing_new(smol: Tokenizer) -> None:
    for word in ("日本", "\n"):
        bare, spaced = plain(smol, word), plain(smol, f" {word}")
        expected = (bare,) if spaced[-len(bare) :] == bare else (bare, spaced)
        assert bad_word_ids(smol, [word]) == expected


def test_control_tokens_of_the_tokenizer_are_not_in_them(llama: Tokenizer) -> None:
    assert all(llama.special_ids.isdisjoint(word) for word in bad_word_ids(llama, ["hello", "world"]))


@pytest.mark.parametrize("words", [[""], ["a" * 257], ["a"] * (MAX_WORDS + 1), ["\ud800"]])
def test_words_out_of_bounds(smol: Tokenizer, words: list[str]) -> None:
    with pytest.raises(InvalidRequest):
        bad_word_ids(smol, words)
