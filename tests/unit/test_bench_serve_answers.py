"""What `pagoda bench serve` makes of answers: figures from known times, and what a stream says, whole or broken."""

from __future__ import annotations

import re

import pytest
from pagoda.bench import serve_stream
from pagoda.bench.loads import Load
from pagoda.bench.serve_figures import Latencies, Spread, latencies, spread, summarise
from pagoda.bench.serve_stream import Answer
from unit.scripted_server import DONE, event, token, usage


def answered(*times: float, began: float = 0.0, tokens: int | None = None) -> Answer:
    count = len(times) if tokens is None else tokens
    return Answer(began, status=200, times=list(times), num_tokens=count, is_done=True)


# ── arithmetic ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_latencies_are_those_of_the_definitions() -> None:
    three, merged, one = answered(1.5, 1.75, 2.75, began=1.0), answered(4.0, 6.0, began=2.0, tokens=5), answered(0.5)
    assert latencies([three, merged, one]) == Latencies(
        ttft=[500.0, 2000.0, 500.0],
        tpot=[625.0, 500.0],  # two tokens after the first, then four; an answer of one token has none
        itl=[250.0, 1000.0, 2000.0],
        end_to_end=[1750.0, 4000.0, 500.0],
    )


def numbers(of: Spread | None) -> tuple[float, ...]:
    assert of is not None
    return (of.mean, of.p50, of.p95, of.p99)


def test_percentiles_are_interpolated() -> None:
    assert spread([float(i) for i in range(101)]) == Spread(50.0, 50.0, 95.0, 99.0)
    assert numbers(spread([1.0, 3.0])) == pytest.approx((2.0, 2.0, 2.9, 2.98))
    assert spread([]) is None


def test_only_full_answers_count_and_failures_are_told_apart() -> None:
    requests = [Load([1] * 10, 2), Load([1] * 20, 3), Load([1] * 40, 2), Load([1] * 40, 2), Load([1] * 80, 9)]
    answers = [answered(1.0, 2.0), answered(0.5, 1.0, 1.5), *(Answer(0.0, problem=p) for p in ("gone", "gone", "full"))]
    result, taken = summarise("five", requests, answers, seconds=4.0, cpu_seconds=1.0)
    assert (result.requests, result.failures) == (5, {"gone": 2, "full": 1})
    assert (result.input_tokens, result.output_tokens, result.client_share) == (30, 5, 0.25)
    assert (result.request_rate, result.output_rate, result.total_rate) == (0.5, 1.25, 8.75)
    assert taken.ttft == [1000.0, 500.0]
    assert numbers(result.spreads["ttft"]) == pytest.approx((750.0, 750.0, 975.0, 995.0))


def test_nothing_answered_has_no_spread() -> None:
    result, _ = summarise("none", [Load([1], 1)], [Answer(0.0, problem="gone")], seconds=1.0, cpu_seconds=0.0)
    assert set(result.spreads.values()) == {None}
    assert result.output_rate == 0


# ── a stream's bytes ──────────────────────────────────────────────────────────────────────────────────────────────────


def fed(*pieces: bytes) -> Answer:
    """Pieces that arrive at 0, 1, 2 … seconds."""
    answer = Answer(0.0, status=200)
    for now, piece in enumerate(pieces):
        answer.feed(piece, float(now))
    return answer


def test_an_event_has_the_time_of_the_read_that_ends_it_wherever_it_is_cut() -> None:
    first, second = token("ä"), token("b")
    whole = first + second + usage(2) + DONE
    for cut in range(1, len(whole)):
        answer = fed(whole[:cut], whole[cut:])
        line_ends = (len(first) - 1, len(first + second) - 1)  # the blank line after an event is not waited for
        assert answer.times == [0.0 if end <= cut else 1.0 for end in line_ends], cut
        answer.close(2)
        assert answer.problem is None


def test_bytes_may_come_one_by_one() -> None:
    whole = token() + token() + usage(2) + DONE
    answer = fed(*(whole[i : i + 1] for i in range(len(whole))))
    assert answer.times == [len(token()) - 2.0, 2 * len(token()) - 2.0]
    answer.close(2)
    assert answer.problem is None


def test_events_of_one_read_have_one_time() -> None:
    answer = fed(token() + token(), token() + usage(3) + DONE)
    assert answer.times == [0.0, 0.0, 1.0]
    assert latencies([answer]).itl == [0.0, 1000.0]


def test_other_lines_and_line_ends_of_the_format_are_understood() -> None:
    plain = token() + token() + usage(2) + DONE
    answer = fed(b": keep-alive\n\nevent: x\nid: 1\n" + plain.replace(b"\n", b"\r\n").replace(b"data: ", b"data:"))
    answer.close(2)
    assert (answer.problem, answer.times) == (None, [0.0, 0.0])


@pytest.mark.parametrize(
    ("stream", "problem"),
    [
        (token() + token() + usage(2), r"the stream broke off before its \[DONE\]"),
        (token() + b"data: {", r"the stream broke off before its \[DONE\]"),
        (token() + DONE, "the stream has no usage: the server does not know stream_options.include_usage"),
        (token() + usage(1) + DONE, "the answer has 1 tokens, not the 2 asked for with ignore_eos"),
        (usage(2) + DONE, "the stream has a usage, and no choice before it"),
        (token() + event({"error": {"message": "it died"}}) + DONE, "the stream ended with an error: it died"),
        (token() + event({"error": "overloaded"}), "the stream ended with an error: overloaded"),
        (token() + event(b"{no json}") + usage(2) + DONE, "the stream holds an event that .*: b'{no json}'"),
        (event({"choices": 3}) + usage(2) + DONE, "the stream holds an event that .*: Expected `array`, .*"),
        (event(b"\xff") + usage(2) + DONE, "the stream holds an event that .*"),
    ],
)
def test_a_broken_stream_says_what_is_wrong(stream: bytes, problem: str) -> None:
    answer = fed(stream)
    answer.close(2)
    assert answer.problem is not None
    assert re.fullmatch(problem, answer.problem)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b'{"error": {"message": "the queue is full", "code": 503}}', "503: the queue is full"),
        (b'{"error": "no"}', "503: no"),
        (b'{"detail": "no"}', '503: {"detail": "no"}'),
        (b"<html>busy</html>", "503: <html>busy</html>"),
        (b"", "503: "),
        (b"x" * 1000, "503: " + "x" * serve_stream.SHOWN),
    ],
)
def test_a_refusal_is_told_in_the_servers_words(body: bytes, problem: str) -> None:
    answer = Answer(0.0, status=503)
    answer.feed(body[:5], 0.0)
    answer.feed(body[5:], 0.0)
    answer.close(2)
    assert answer.problem == problem
