"""The text of one answer: detokenizer and stop strings together, and how many tokens the shown text took."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pagoda.text.stream import TextDelta, TextStream
from pagoda.text.tokenizer import Tokenizer


def test_without_stops_all_is_kept(smol: Tokenizer) -> None:
    stream, ids = TextStream(smol), smol.encode("Hello wide world")
    assert stream.push(ids[:2]) == TextDelta(smol.decode(ids[:2]), 2, False)
    assert stream.push(ids[2:]).tokens_kept == len(ids)
    assert stream.finish() == ""
    assert stream.matched is None


def test_tokens_after_the_stop_string_are_not_kept(smol: Tokenizer) -> None:
    ids = smol.encode("one two three four five")
    needed = next(n for n in range(len(ids) + 1) if "three" in smol.decode(ids[:n]))
    stream = TextStream(smol, stops=["three"])
    assert stream.push(ids) == TextDelta("one two ", needed, True)
    assert stream.push(ids) == TextDelta("", needed, True)
    assert stream.finish() == ""
    assert stream.matched == "three"


def test_the_stop_string_may_be_shown(smol: Tokenizer) -> None:
    stream = TextStream(smol, stops=["three"], include_stop=True)
    assert stream.push(smol.encode("one two three four")).text == "one two three"


def test_min_tokens_lets_earlier_stop_strings_pass(smol: Tokenizer) -> None:
    ids = smol.encode("a. b. c. d.")
    first = next(n for n in range(len(ids) + 1) if "." in smol.decode(ids[:n]))
    delta = TextStream(smol, stops=["."], min_tokens=first).push(ids)
    assert delta.text == "a. b"
    assert first < delta.tokens_kept < len(ids)


def test_what_was_held_back_comes_at_the_end(smol: Tokenizer) -> None:
    stream = TextStream(smol, stops=["<end>"])
    shown = stream.push(smol.encode("so it is <en")).text
    assert shown == "so it is "
    assert stream.finish() == "<en"


def test_a_newline_of_a_byte_token_stops_at_once(llama: Tokenizer) -> None:
    ids = llama.encode("hello\nworld", add_special_tokens=False)
    newline = ids.index(3 + 0x0A)
    stream = TextStream(llama, stops=["\n"])
    assert stream.push(ids) == TextDelta("hello", newline + 1, True)


@pytest.mark.parametrize(("include", "text"), [(False, "one two"), (True, "one two three")])
@pytest.mark.parametrize("stops", [[], ["<end>", "three"]], ids=["no stops", "stops"])
def test_the_token_that_ends_an_answer_counts_and_has_no_text(
    smol: Tokenizer, stops: list[str], include: bool, text: str
) -> None:
    """Not even where its text would complete a stop string."""
    ids = smol.encode("one two three")
    stream = TextStream(smol, stops=stops, include_stop=include, ends={ids[-1]})
    deltas = [stream.push(ids[:-1]), stream.push(ids[-1:])]
    assert "".join([delta.text for delta in deltas]) + stream.finish() == text
    assert deltas[-1].tokens_kept == 3
    assert deltas[-1].stopped == (include and bool(stops))


@pytest.mark.parametrize(("skip", "text"), [(True, "one"), (False, "one<|im_end|>")])
def test_a_control_token_that_ends_an_answer_is_shown_with_the_others(smol: Tokenizer, skip: bool, text: str) -> None:
    ids = smol.encode("one<|im_end|>")
    assert TextStream(smol, skip_special_tokens=skip, ends={ids[-1]}).push(ids).text == text


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_pieces_change_nothing(smol: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, 400), max_size=40))
    stops = data.draw(st.lists(st.text("abet \n!", min_size=1, max_size=3), max_size=3))
    whole, single = TextStream(smol, stops=stops), TextStream(smol, stops=stops)
    at_once = whole.push(ids)
    one_by_one = [single.push([token_id]) for token_id in ids]
    assert at_once.text + whole.finish() == "".join([delta.text for delta in one_by_one]) + single.finish()
    assert not one_by_one or one_by_one[-1][1:] == at_once[1:]
    if at_once.stopped:
        kept = smol.decode(ids[: at_once.tokens_kept])
        assert any(stop in kept for stop in stops)
        assert not any(stop in smol.decode(ids[: at_once.tokens_kept - 1]) for stop in stops)
