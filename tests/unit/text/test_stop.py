"""Stop strings: the same wherever the text is cut, and the same as a naive search."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pagoda.errors import InvalidRequest
from pagoda.text.stop import StopStrings

letters = st.text("ab", max_size=30)
some_stops = st.lists(st.text("ab", min_size=1, max_size=6), max_size=5)


def naive(text: str, stops: list[str]) -> tuple[str, str] | None:
    """Text before the first complete stop string, and that string: the longest of those that end there."""
    found = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in stops if stop in text]
    if not found:
        return None
    _, start, stop = min(found)
    return text[:start], stop


@given(pieces=st.lists(letters, max_size=8), stops=some_stops, include=st.booleans())
def test_equals_a_naive_search(pieces: list[str], stops: list[str], include: bool) -> None:
    stopper, text = StopStrings(stops, include=include), "".join(pieces)
    shown = "".join([stopper.push(piece)[0] for piece in pieces])
    expected = naive(text, stops)
    if expected is None:
        assert stopper.matched is None
        assert shown + stopper.flush() == text
    else:
        before, stop = expected
        assert stopper.matched == stop
        assert shown == before + (stop if include else "")
        assert stopper.flush() == ""


@given(text=letters, stops=some_stops)
def test_holds_back_no_more_than_it_must(text: str, stops: list[str]) -> None:
    stopper = StopStrings(stops)
    shown = ""
    for n, char in enumerate(text, start=1):
        piece, stopped = stopper.push(char)
        shown += piece
        if stopped:
            return
        starts = (size for size in range(n, 0, -1) if any(stop.startswith(text[n - size : n]) for stop in stops))
        assert shown == text[: n - next(starts, 0)]


def test_across_borders() -> None:
    stopper = StopStrings(["\n\nUser:"])
    assert [stopper.push(piece) for piece in ("Hi\n", "\nUs", "er: x")] == [("Hi", False), ("", False), ("", True)]
    assert stopper.matched == "\n\nUser:"


def test_after_a_match_nothing_more() -> None:
    stopper = StopStrings(["."])
    assert stopper.push("a.b") == ("a", True)
    assert stopper.push("c") == ("", True)
    assert stopper.flush() == ""


def test_a_false_start_is_shown_when_it_is_known_to_be_false() -> None:
    stopper = StopStrings(["<end>"])
    assert stopper.push("a <en") == ("a ", False)
    assert stopper.push("ough") == ("<enough", False)


def test_the_first_complete_one_wins() -> None:
    assert StopStrings(["abcdef", "cd"]).push("abcdef") == ("ab", True)
    assert StopStrings(["cd", "bcd"]).push("abcdef") == ("a", True)


def test_no_stops() -> None:
    assert StopStrings([]).push("anything") == ("anything", False)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="empty string"):
        StopStrings(["a", ""])


def test_hostile_stop_strings_cost_no_more() -> None:
    """Sixteen long ones that almost match everywhere: about a microsecond a character."""
    stopper = StopStrings([("a" * 1000) + chr(65 + n) for n in range(16)])
    start = time.thread_time()
    for _ in range(10_000):
        stopper.push("aaaa")
    assert time.thread_time() - start < 1


def test_the_stop_strings_of_many_answers_are_prepared_once() -> None:
    stops = [chr(97 + n) * 1024 for n in range(16)]
    start = time.thread_time()
    answers = [StopStrings(stops) for _ in range(1024)]
    assert time.thread_time() - start < 0.5
    assert answers[0].push("x" + "a" * 1023) == ("x", False)
    assert answers[1].push("a") == ("", False), "each answer has a place of its own in them"
    assert answers[1].push("x") == ("ax", False)
