"""`pagoda bench serve`: its loads and their pace, and the command on a real server."""

from __future__ import annotations

import asyncio
import itertools
import random
import resource
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import uvicorn
from pagoda.bench.cli import app as bench
from pagoda.bench.loads import FIRST_ID, OfflineLoad, mixed, shared
from pagoda.bench.serve import LOAD_SETS, Pace, chosen, enough_files, measure, unseen
from pagoda.errors import ConfigError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from typer.testing import CliRunner
from unit.scripted_server import DONE, NOW, VOCAB, WIRE, driven, scripted, token, usage

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
