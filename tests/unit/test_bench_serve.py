"""`pagoda bench serve`: its arithmetic on known times, its client on real sockets, the command on a real server."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import re
import resource
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import uvicorn
from pagoda.bench import serve_client, serve_stream
from pagoda.bench.cli import app as bench
from pagoda.bench.loads import FIRST_ID, Load, OfflineLoad, mixed, shared
from pagoda.bench.serve import LOAD_SETS, Pace, Run, Target, chosen, drive, enough_files, measure, unseen
from pagoda.bench.serve_figures import Latencies, Spread, latencies, spread, summarise
from pagoda.bench.serve_stream import Answer
from pagoda.errors import ConfigError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from typer.testing import CliRunner

VOCAB = 300
NOW = Pace(None, None, 0)


def event(body: object) -> bytes:
    return b"data: " + (body if isinstance(body, bytes) else json.dumps(body).encode()) + b"\n\n"


def token(text: str = "a") -> bytes:
    return event({"id": "1", "choices": [{"index": 0, "text": text, "finish_reason": None}], "usage": None})


def usage(count: int) -> bytes:
    return event({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": count, "total_tokens": 3 + count}})


DONE = event(b"[DONE]")


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


# ── the client, on sockets that say exactly this ──────────────────────────────────────────────────────────────────────

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"
STREAM = [token(), token(), usage(2) + DONE]


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class Scripted:
    """Answers every request with the same reads, and then closes or waits for the next one."""

    def __init__(self, reads: list[bytes], *, keep: bool) -> None:
        self.reads, self.keep = reads, keep
        self.num_connections = 0
        self.bodies: list[dict[str, Any]] = []
        self.heads: list[bytes] = []

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while await self._request(reader):
                for data in self.reads:
                    writer.write(data)
                    await writer.drain()
                    await asyncio.sleep(0.01)
                if not self.keep:
                    break
        finally:
            writer.close()

    async def _request(self, reader: asyncio.StreamReader) -> bool:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return False
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        self.heads.append(head)
        self.bodies.append(json.loads(await reader.readexactly(length)))
        return True


@asynccontextmanager
async def scripted(*reads: bytes, keep: bool = False, path: str = "") -> AsyncIterator[tuple[Scripted, Target]]:
    script = Scripted(list(reads), keep=keep)
    server = await asyncio.start_server(script.answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        yield script, Target(f"http://127.0.0.1:{port}{path}", "m", VOCAB, "secret")
    finally:
        server.close()


def requests(count: int) -> list[Load]:
    return mixed(count, inputs=(3, 3), outputs=(2, 2), vocab_size=VOCAB)


async def driven(target: Target, count: int = 1, pace: Pace = NOW) -> Run:
    return await drive(target, requests(count), pace, done=lambda _: None)


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


WIRE = HEAD + b"".join(map(chunk, STREAM)) + END


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


# ── loads and their pace ──────────────────────────────────────────────────────────────────────────────────────────────


def test_departures_are_a_poisson_process() -> None:
    times = Pace(None, 50.0, 3).departures(2001)
    assert times[0] == 0
    assert times == sorted(times)
    assert times[-1] == pytest.approx(2000 / 50.0, rel=0.1)
    gaps = sorted(later - earlier for earlier, later in itertools.pairwise(times))
    assert gaps[1000] == pytest.approx(0.6931 / 50.0, rel=0.1)
    assert Pace(None, 50.0, 3).departures(5) == times[:5]
    assert NOW.departures(3) == [0.0, 0.0, 0.0]


async def test_requests_leave_at_their_rate() -> None:
    pace = Pace(None, 100.0, 1)
    async with scripted(WIRE) as (_, target):
        run = await driven(target, 8, pace)
    began = [answer.began - run.answers[0].began for answer in run.answers]
    for due, at in zip(pace.departures(8), began, strict=True):
        assert at > due - 0.005


def test_prompts_that_no_server_has_seen_have_the_same_lengths_and_shared_parts() -> None:
    made = shared(4, prefix=10, own=3, output=2, vocab_size=VOCAB)
    turned = unseen(made, VOCAB, 7)
    assert [(len(r.prompt_ids), r.num_output) for r in turned] == [(13, 2)] * 4
    assert len({tuple(r.prompt_ids[:10]) for r in turned}) == 1
    assert len({tuple(r.prompt_ids) for r in turned}) == 4
    assert turned[0].prompt_ids != made[0].prompt_ids
    assert turned == unseen(made, VOCAB, 7) != unseen(made, VOCAB, 8)
    assert all(FIRST_ID <= i < VOCAB for r in turned for i in r.prompt_ids)


async def test_two_loads_of_one_run_share_no_prompt() -> None:
    loads = [OfflineLoad(name, lambda size: mixed(2, inputs=(9, 9), outputs=(2, 2), vocab_size=size)) for name in "ab"]
    async with scripted(WIRE) as (script, target):
        for load in loads:
            result, _ = await measure(target, load, NOW, done=lambda _: None)
            assert result.failures == {}
    assert len({tuple(body["prompt"]) for body in script.bodies}) == 4


def test_loads_are_chosen_by_set_or_by_what_a_keyboard_has() -> None:
    assert chosen(["gpu"]) == list(LOAD_SETS["gpu"])
    assert [load.name for load in chosen(["1000x512"])] == ["1000 × 512 → 128 at 256"]
    assert [load.name for load in chosen(["8 × 64", "8x64->64", "1x64"])] == ["8 × 64 → 64", "1 × 64 → 64"]
    with pytest.raises(ConfigError, match="'7x' is none: take a set, cpu or gpu, or one of 1x64->64"):
        chosen(["7x"])


def test_a_bounded_load_is_bounded_for_http_alone() -> None:
    [load] = chosen(["1000x512"])
    assert load.at_once == 256
    assert {one.at_once for loads in LOAD_SETS.values() for one in loads if one is not load} == {None}


def test_the_bound_on_open_files_is_raised_for_a_while() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with enough_files(before[0] + 1 if before[0] < before[1] else 1):
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= min(before[0] + 1, before[1])
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == before


# ── the command, on uvicorn ───────────────────────────────────────────────────────────────────────────────────────────


class Fake:
    """A model that says one token every two milliseconds, and refuses a share of its requests."""

    def __init__(self, refused: float) -> None:
        self._refused = refused
        self._draw = random.Random(0)
        self._seen = 0
        self.app = Starlette(
            routes=[
                Route("/v1/models", self.models),
                Route("/v1/completions", self.completions, methods=["POST"]),
            ]
        )

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "fake"}]})

    async def completions(self, request: Request) -> Response:
        count = (await request.json())["max_tokens"]
        self._seen += 1
        if self._seen > 1 and self._draw.random() < self._refused:
            return JSONResponse({"error": {"message": "[busy] now"}}, 503)

        async def stream() -> AsyncIterator[bytes]:
            for _ in range(count):
                await asyncio.sleep(0.002)
                yield token()
            yield usage(count) + DONE

        return StreamingResponse(stream(), media_type="text/event-stream")


@contextmanager
def running(fake: Fake) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(fake.app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


Command = Callable[..., Any]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: CliRunner().invoke(bench, ["serve", "--vocab-size", str(VOCAB), *arguments])


def test_the_command_prints_tables_and_writes_json(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    with running(Fake(refused=0.0)) as url:
        ran = command("--url", f"{url}/v1", "--load", "8x64->64", "--seed", "5", "--json", str(file))
    assert ran.exit_code == 0, ran.output
    assert "8 × 64 → 64" in ran.output
    report = msgspec.json.decode(file.read_bytes())
    assert report["parameters"] == {
        "url": url, "model": "fake", "loads": ["8 × 64 → 64"], "concurrency": None, "request_rate": None, "seed": 5,
        "vocab_size": VOCAB,
    }  # fmt: skip
    [result] = report["results"]
    assert (result["requests"], result["failures"]) == (8, {})
    assert (result["input_tokens"], result["output_tokens"]) == (8 * 64, 8 * 64)
    assert result["output_rate"] == pytest.approx(8 * 64 / result["seconds"])
    assert result["spreads"]["tpot"]["p50"] > 1.9
    assert result["spreads"]["end_to_end"]["mean"] > 64 * 1.9


def test_a_plot_is_drawn(command: Command, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with running(Fake(refused=0.0)) as url:
        ran = command("--url", url, "--load", "8x64->64", "--plot", str(tmp_path / "plot.png"))
    assert ran.exit_code == 0, ran.output
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_curve_climbs_to_all_of_its_values() -> None:
    curve = pytest.importorskip("pagoda.bench.serve_plot", exc_type=ImportError).curve
    assert curve([3.0, 1.0, 2.0, 9.0]) == ([1.0, 1.0, 2.0, 3.0, 9.0], [0.0, 25.0, 50.0, 75.0, 100.0])
    assert curve([7.0]) == ([7.0, 7.0], [0.0, 100.0])
    assert curve([]) == ([], [])


def test_failures_are_shown_and_end_with_status_1(command: Command) -> None:
    with running(Fake(refused=0.5)) as url:
        ran = command("--url", url, "--load", "8x64->64", "--concurrency", "2")
    assert ran.exit_code == 1
    assert "503: [busy] now" in ran.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--url", "127.0.0.1:9000"), "url = '127.0.0.1:9000' is no address of a server"),
        (("--url", "http://127.0.0.1:1"), "no server answers at http://127.0.0.1:1/v1/models"),
        (("--url", "http://127.0.0.1:1", "--model", "m"), "the first request to http://127.0.0.1:1 failed: no conn"),
        (("--load", "7x"), "load = '7x' is none"),
        (("--vocab-size", "100", "--model", "m"), "vocab_size = 100: prompts are drawn from the ids from 100 on"),
        (("--plot", "figure"), "plot = 'figure' has no format: end its name with one of .png, .svg, .pdf"),
    ],
)
def test_what_cannot_be_measured_is_a_sentence(command: Command, arguments: tuple[str, ...], said: str) -> None:
    ran = command(*arguments)
    assert ran.exit_code == 1
    assert f"error: {said}" in ran.output
