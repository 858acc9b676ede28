"""Memory and schedule through the real server: small pools, full queues, deadlines, priorities, several answers."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import psutil
import pytest
from greedy import GreedyJudge
from pagoda.client import RequestStream, Session
from pagoda.errors import Overloaded
from pagoda.sampling_params import SamplingParams
from pagoda.triton_client import GrpcSession, Triton
from service import MODEL, Service, running, wait_for, write_model

POOL = "pool"
"""A pool that a few of its requests fill."""
QUEUE = "queue"
"""One request at a time, and a queue of two requests or 200 tokens."""
INVARIANT = "invariant"
LONGEST = 320


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    repository = tmp_path_factory.mktemp("repository")
    write_model(repository, MODEL, kv_cache_gib="1.0")
    write_model(repository, POOL, max_model_len=str(LONGEST), num_kv_blocks="20")
    write_model(
        repository,
        QUEUE,
        max_model_len="2048",
        max_num_seqs="1",
        max_num_queued_requests="2",
        max_num_queued_tokens="200",
        kv_cache_gib="0.2",
    )
    write_model(repository, INVARIANT, max_model_len="512", batch_invariant="true", num_kv_blocks="64")
    with running(repository, tmp_path_factory.mktemp("service")) as started:
        yield started


@asynccontextmanager
async def session_of(service: Service, model: str) -> AsyncIterator[Session]:
    """A session of our own with the engine, as the frontend's workers have."""
    triton = Triton(service.instance.grpc_address, service.instance.secret)
    transport = GrpcSession(triton, model, "test")
    task = asyncio.create_task(transport.run())
    try:
        await transport.session.wait_ready(30)
        yield transport.session
    finally:
        transport.session.close("the test is over")
        await task
        await triton.close()


@dataclass
class Answer:
    prompt_ids: list[int]
    token_ids: list[int]
    finish_reasons: list[str]
    aborted: bool


async def take(stream: RequestStream, prompt_ids: list[int], keep: int | None) -> Answer:
    """Read a stream to its end, or abort it once it has given `keep` tokens."""
    answer = Answer(prompt_ids, [], [], False)
    if keep == 0:
        await asyncio.sleep(0.05)
        stream.abort("client_gone")
        answer.aborted = True
        return answer
    async for output in stream:
        assert output.index == len(answer.token_ids), "tokens are lost or come twice"
        answer.token_ids += output.token_ids
        if output.finish_reason is not None:
            answer.finish_reasons.append(output.finish_reason)
        if keep is not None and len(answer.token_ids) >= keep and output.finish_reason is None:
            stream.abort("client_gone")
            answer.aborted = True
            break
    return answer


async def test_300_drawn_requests_over_a_pool_that_preempts(service: Service) -> None:
    """Shared and own prompts, one to three answers each, aborts at every phase: all is freed, answers are greedy."""
    rng = random.Random(3)
    shared = [rng.randrange(100, 40_000) for _ in range(32)]

    async def request(session: Session) -> list[Answer]:
        own = [rng.randrange(100, 40_000) for _ in range(rng.randint(1, 8))]
        prompt = shared[: rng.choice([0, 20, 32])] + own
        n = rng.choice([1, 1, 1, 1, 2, 3])
        params = SamplingParams(max_tokens=rng.choice([2, 4, 8, 48]), temperature=0, ignore_eos=True)
        keeps = [rng.choice([None, None, None, 0, 1, rng.randint(2, 24)]) for _ in range(n)]
        await asyncio.sleep(rng.random() * 8)
        streams = session.generate(prompt, params, n=n, priority=rng.choice([0, 0, 0, 1, -1]))
        return list(await asyncio.gather(*(take(s, prompt, k) for s, k in zip(streams, keeps, strict=True))))

    async with session_of(service, POOL) as session:
        groups = await asyncio.gather(*(request(session) for _ in range(300)))
        answers = [answer for group in groups for answer in group]
        wait_for(lambda: service.is_idle(POOL), 20, "all blocks to be free")
    assert all(len(a.finish_reasons) == (0 if a.aborted else 1) for a in answers)
    preemptions = service.metric("num_preemptions_total", POOL)
    longest: dict[tuple[int, ...], list[int]] = {}
    for a in sorted(answers, key=lambda a: -len(a.token_ids)):
        known = longest.setdefault(tuple(a.prompt_ids), a.token_ids)
        assert a.token_ids == known[: len(a.token_ids)], "two greedy answers to one prompt differ"
    near_ties = GreedyJudge().check_ids([(list(prompt), tokens) for prompt, tokens in longest.items() if tokens])
    tokens_checked = sum(map(len, longest.values()))
    ends = Counter(a.finish_reasons[0] if a.finish_reasons else "aborted" for a in answers)
    print(f"{len(answers)} answers {dict(ends)}, {preemptions:.0f} preemptions, ", end="")
    print(f"{near_ties} near ties among {tokens_checked} distinct tokens")
    assert preemptions > 0
    assert near_ties <= 0.001 * tokens_checked
    assert min(ends["aborted"], ends["length"]) > 50


async def test_1000_requests_at_once(service: Service) -> None:
    """Most of them wait; none is refused or lost, and three hundred more take no more memory."""

    async def one(client: httpx.AsyncClient, i: int) -> dict[str, Any]:
        body = {"model": MODEL, "prompt": f"Item {i}:", "max_tokens": 2, "temperature": 0, "ignore_eos": True}
        response = await client.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        return dict(response.json())

    async def at_once(count: int) -> list[dict[str, Any]]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=service.url, timeout=300, limits=limits) as client:
            return list(await asyncio.gather(*(one(client, i) for i in range(count))))

    first = await at_once(1000)
    before = _memory(service)
    second = await at_once(300)
    assert [a["usage"]["completion_tokens"] for a in first] == [2] * 1000
    assert len([1 for a, b in zip(first, second, strict=False) if a["choices"] != b["choices"]]) <= 3, "near ties aside"
    growth = {pid: after - before[pid] for pid, after in _memory(service).items() if pid in before}
    print(f"memory after three hundred more requests: {max(growth.values()) >> 20} MiB more at most in a process")
    assert max(growth.values()) < 64 << 20


def _memory(service: Service) -> dict[int, int]:
    """Resident bytes by process."""
    return {pid: psutil.Process(pid).memory_info().rss for pid in service.pids(".")}


@dataclass
class Busy:
    """Somebody who keeps the one-at-a-time model busy."""

    session: Session
    stream: RequestStream

    async def end(self) -> None:
        self.stream.abort("client_gone")
        await asyncio.sleep(0)


@asynccontextmanager
async def busy(service: Service) -> AsyncIterator[Busy]:
    async with session_of(service, QUEUE) as session:
        (stream,) = session.generate([1], SamplingParams(max_tokens=1500, temperature=0, ignore_eos=True))
        await anext(aiter(stream))
        yield Busy(session, stream)
        stream.abort("client_gone")


async def test_a_full_queue_refuses_at_once_with_503(service: Service) -> None:
    params = SamplingParams(max_tokens=2, temperature=0)
    async with busy(service) as occupied:
        waiting = [occupied.session.generate([5], params)[0] for _ in range(2)]
        await asyncio.sleep(0.3)
        began = time.monotonic()
        body = {"model": QUEUE, "prompt": "hello", "max_tokens": 2}
        async with httpx.AsyncClient(base_url=service.url) as client:
            response = await client.post("/v1/completions", json=body)
        assert time.monotonic() - began < 1.0
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["code"] == "overloaded"
        assert "max_num_queued_requests 2" in response.json()["error"]["message"]
        await occupied.end()
        assert [(await take(s, [5], None)).finish_reasons for s in waiting] == [["length"]] * 2


async def test_waiting_tokens_are_bounded(service: Service) -> None:
    params = SamplingParams(max_tokens=2, temperature=0)
    async with busy(service) as occupied:
        (long,) = occupied.session.generate([5] * 300, params)  # alone in the queue it is never too long
        await asyncio.sleep(0.2)
        (refused,) = occupied.session.generate([6], params)
        with pytest.raises(Overloaded, match="max_num_queued_tokens 200"):
            await take(refused, [6], None)
        await occupied.end()
        assert (await take(long, [], None)).finish_reasons == ["length"]


async def test_a_lower_priority_number_runs_first(service: Service) -> None:
    params = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
    ended = []

    async def follow(name: str, stream: RequestStream) -> None:
        await take(stream, [], None)
        ended.append(name)

    async with busy(service) as occupied:
        late = occupied.session.generate([5], params, priority=1)[0]
        await asyncio.sleep(0.1)
        early = occupied.session.generate([6], params, priority=-1)[0]
        await asyncio.sleep(0.3)
        await occupied.end()
        await asyncio.gather(follow("late", late), follow("early", early))
    assert ended == ["early", "late"]


def test_a_timeout_ends_a_request_by_504_and_its_stream_by_an_error(service: Service) -> None:
    body = {"model": MODEL, "prompt": "Count:", "max_tokens": 4000, "ignore_eos": True, "timeout": 0.7}
    began = time.monotonic()
    response = httpx.post(f"{service.url}/v1/completions", json=body, timeout=30)
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "deadline_exceeded"
    assert "timeout of 0.7 s" in response.json()["error"]["message"]
    assert time.monotonic() - began < 3
    with httpx.stream("POST", f"{service.url}/v1/completions", json={**body, "stream": True}, timeout=30) as streamed:
        assert streamed.status_code == 200
        lines = [line for line in streamed.iter_lines() if line]
    assert "deadline_exceeded" in lines[-2]
    assert lines[-1] == "data: [DONE]"
    wait_for(service.is_idle, 5, "the blocks to be free")


async def test_several_answers_share_the_prompts_blocks(service: Service) -> None:
    """Six answers to a prompt of 128 tokens fit a pool that has room for two such prompts: 20 blocks."""
    prompt = [random.Random(1).randrange(100, 40_000) for _ in range(128)]
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=5, ignore_eos=True)
    async with session_of(service, POOL) as session:
        before = service.metric("num_preemptions_total", POOL)
        streams = session.generate(prompt, params, n=6)
        together = [a.token_ids for a in await asyncio.gather(*(take(s, prompt, None) for s in streams))]
        alone = []
        for i in range(6):
            lone = SamplingParams(max_tokens=12, temperature=1.0, seed=5 + i, ignore_eos=True)
            alone.append((await take(session.generate(prompt, lone)[0], prompt, None)).token_ids)
    assert service.metric("num_preemptions_total", POOL) == before
    assert together == alone
    assert len({tuple(tokens) for tokens in together}) == 6


async def test_batch_invariant_answers_are_the_same_to_the_bit(service: Service) -> None:
    """Tokens and log-probabilities, alone and among fifteen others over a pool that preempts."""
    rng = random.Random(9)
    prompts = [[rng.randrange(100, 40_000) for _ in range(rng.randint(3, 70))] for _ in range(16)]
    params = [
        SamplingParams(max_tokens=24, temperature=t, seed=i, ignore_eos=True, logprobs=2)
        for i, t in enumerate([0.0, 0.9] * 8)
    ]

    async def ask(session: Session, i: int) -> list[Any]:
        found = []
        async for output in session.generate(prompts[i], params[i])[0]:
            found += output.logprobs or []
        return found

    async with session_of(service, INVARIANT) as session:
        alone = [await ask(session, i) for i in range(16)]
        together = await asyncio.gather(*(ask(session, i) for i in range(16)))
    assert [len(found) for found in alone] == [24] * 16
    assert together == alone
