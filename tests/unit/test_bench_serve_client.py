"""The client of `pagoda bench serve` on sockets that say exactly this: reads cut anywhere, ends too early, reuse."""

from __future__ import annotations

import socket

import pytest
from pagoda.bench import serve_client
from pagoda.bench.serve import Pace, Target
from pagoda.bench.serve_figures import latencies
from unit.scripted_server import END, HEAD, STREAM, VOCAB, WIRE, chunk, driven, requests, scripted, token


async def test_a_request_asks_for_what_its_load_says() -> None:
    async with scripted(HEAD, *map(chunk, STREAM), END, path="/proxy") as (script, target):
        [answer] = (await driven(target)).answers
    assert answer.problem is None
    assert script.heads[0].startswith(b"POST /proxy/v1/completions HTTP/1.1\r\nhost: 127.0.0.1:")
    assert b"authorization: Bearer secret\r\n" in script.heads[0]
    assert script.bodies == [
        {
            "model": "m",
            "prompt": requests(1)[0].prompt_ids,
            "max_tokens": 2,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]


async def test_times_are_those_of_the_reads() -> None:
    async with scripted(HEAD, *map(chunk, STREAM), END) as (_, target):
        [answer] = (await driven(target)).answers
    [gap] = latencies([answer]).itl
    assert gap > 8, "the server waited 10 ms between its tokens"


@pytest.mark.parametrize(
    "reads",
    [
        pytest.param([WIRE], id="all in one read"),
        pytest.param([WIRE[:200], WIRE[200:]], id="cut in the middle"),
        pytest.param([WIRE[:17], WIRE[17:150], WIRE[150:153], WIRE[153:]], id="cut in head, size and event"),
        pytest.param([HEAD, chunk(token()[:9]), chunk(token()[9:] + token()), chunk(STREAM[2]), END], id="cut events"),
        pytest.param([b"HTTP/1.1 200 OK\r\n\r\n", *STREAM], id="until the connection's end"),
    ],
)
async def test_reads_may_be_cut_anywhere(reads: list[bytes]) -> None:
    async with scripted(*reads) as (_, target):
        [answer] = (await driven(target)).answers
    assert answer.problem is None
    assert len(answer.times) == answer.num_tokens == 2


@pytest.mark.parametrize(
    ("reads", "problem"),
    [
        ([], "the server closed the connection without an answer"),
        ([HEAD[:30]], "the server closed the connection without an answer"),
        ([HEAD, chunk(token()), chunk(token())[:20]], "the stream broke off before its [DONE]"),
        ([b"220 mail.example ready\r\n"], "the answer is no HTTP: "),
        ([HEAD, b"no size\r\n"], "the answer is no HTTP: "),
        ([b"HTTP/1.1 503 Busy\r\ncontent-length: 29\r\n\r\n", b'{"error": {"message": "full"}}'[:-1]], "503: "),
        ([b"HTTP/1.1 503 Busy\r\ncontent-length: 30\r\n\r\n", b'{"error": {"message": "full"}}'], "503: full"),
        ([b"HTTP/1.1 307 x\r\nlocation: /\r\ncontent-length: 0\r\n\r\n"], "307: "),
    ],
)
async def test_a_broken_connection_is_a_failure_of_its_request(reads: list[bytes], problem: str) -> None:
    async with scripted(*reads) as (_, target):
        [answer] = (await driven(target)).answers
    assert answer.problem is not None
    assert answer.problem.startswith(problem)


async def test_nobody_there_is_a_failure_too() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        target = Target(f"http://127.0.0.1:{taken.getsockname()[1]}", "m", VOCAB, None)
        [answer] = (await driven(target)).answers
    assert answer.problem is not None
    assert answer.problem.startswith("no connection: ")


async def test_an_answer_without_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_client, "ANSWER_SECONDS", 0.05)
    async with scripted(HEAD, chunk(token()), keep=True) as (_, target):
        [answer] = (await driven(target)).answers
    assert answer.problem == "no end of the answer after 0 s"


async def test_connections_are_used_again_and_bounded() -> None:
    async with scripted(WIRE, keep=True) as (script, target):
        run = await driven(target, 12, Pace(3, None, 0))
    assert [a.problem for a in run.answers] == [None] * 12
    assert script.num_connections == 3


async def test_a_connection_that_the_server_closed_is_not_used_again() -> None:
    async with scripted(WIRE) as (script, target):
        run = await driven(target, 3, Pace(1, 40.0, 0))
    assert [a.problem for a in run.answers] == [None] * 3
    assert script.num_connections == 3


async def test_an_idle_connection_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_client, "IDLE_SECONDS", 0.0)
    async with scripted(WIRE, keep=True) as (script, target):
        run = await driven(target, 3, Pace(1, None, 0))
    assert [a.problem for a in run.answers] == [None] * 3
    assert script.num_connections == 3
