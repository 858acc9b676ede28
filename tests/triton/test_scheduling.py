"""Memory and schedule through the real server: small pools, aborts, many at once, shared prompts, several answers."""

from __future__ import annotations

import asyncio
import queue
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import psutil
import pytest
import tritonclient.grpc as grpcclient
from engine_session import Answer, session_of, take
from lone_judge import TOP_K, Given, LoneJudge
from pagoda import protocol as wire
from pagoda.client import Session
from pagoda.request import MAX_PREEMPTIONS
from pagoda.sampling_params import SamplingParams
from pagoda.server import store
from pagoda.text.tokenizer import Tokenizer
from service import MODEL, Service, running, wait_for, write_model
from test_text_contract import tensor

POOL = "pool"
"""40 small blocks, which a few of its requests fill, and steps of 48 tokens, so that prompts come in chunks."""
INVARIANT = "invariant"
"""A pool of 40 blocks."""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    repository = tmp_path_factory.mktemp("repository")
    write_model(repository, MODEL, kv_cache_gib="1.0")
    small = {"num_kv_blocks": "40", "block_size": "8", "max_num_seqs": "40", "max_num_batched_tokens": "48"}
    write_model(repository, POOL, max_model_len="320", **small)
    write_model(repository, INVARIANT, max_model_len="512", batch_invariant="true", num_kv_blocks="40")
    with running(repository, tmp_path_factory.mktemp("service")) as started:
        yield started


async def test_300_drawn_requests_over_a_pool_that_preempts(service: Service) -> None:
    """Shared and own prompts, greedy and drawn by a seed, one to three answers each, aborts at every phase: all is
    freed, each answer is its lone run's."""
    rng = random.Random(3)
    shared = [rng.randrange(100, 40_000) for _ in range(32)]

    async def request(session: Session) -> list[Answer]:
        own = [rng.randrange(100, 40_000) for _ in range(rng.randint(1, 8))]
        prompt = shared[: rng.choice([0, 20, 32])] + own
        n, temperature, seed = rng.choice([1, 1, 1, 1, 2, 3]), rng.choice([0, 0.8]), rng.randrange(1000)
        drawn = {"temperature": temperature, "top_k": TOP_K, "seed": seed} if temperature else {"temperature": 0}
        params = SamplingParams(max_tokens=rng.choice([1, 2, 32]), ignore_eos=True, **drawn)
        keeps = [rng.choice([None, None, None, 0, 1, rng.randint(2, 16)]) for _ in range(n)]
        await asyncio.sleep(rng.random() * 3)
        streams = session.generate(prompt, params, n=n, priority=rng.choice([0, 0, 0, 1, -1]))
        seeds = [seed + i if temperature else 0 for i in range(n)]
        taken = [take(streams[i], prompt, keeps[i], temperature, seeds[i]) for i in range(n)]
        return list(await asyncio.gather(*taken))

    async with session_of(service, POOL) as session:
        groups = await asyncio.gather(*(request(session) for _ in range(300)))
        answers = [answer for group in groups for answer in group]
        wait_for(lambda: service.is_idle(POOL), 20, "all blocks to be free")
    assert all(len(a.finish_reasons) == (0 if a.aborted else 1) for a in answers)
    preemptions = service.metric("num_preemptions_total", POOL)
    ends = Counter(a.finish_reasons[0] if a.finish_reasons else "aborted" for a in answers)
    print(f"{len(answers)} answers {dict(ends)}, {preemptions:.0f} preemptions, ", end="")
    judge, longest = LoneJudge(), _longest([a.given for a in answers])
    for kind, is_greedy in (("greedy", True), ("seeded", False)):
        given = [g for g in longest if (g.temperature == 0) is is_greedy]
        near_ties, tokens = judge.check(given), sum(len(g.token_ids) for g in given)
        print(f"{near_ties} near ties among {tokens} {kind} tokens", end=", " if is_greedy else "\n")
        assert near_ties <= 0.001 * tokens
    assert preemptions > 0
    assert min(ends["aborted"], ends["length"]) > 50


def _longest(answers: list[Given]) -> list[Given]:
    """One answer of those that ask for the same, which all begin alike; none without a token."""
    found: dict[tuple[object, ...], Given] = {}
    for given in sorted(answers, key=lambda given: -len(given.token_ids)):
        known = found.setdefault((tuple(given.prompt_ids), given.temperature, given.seed), given)
        assert given.token_ids == known.token_ids[: len(given.token_ids)], "two answers to the same differ"
    return [given for given in found.values() if given.token_ids]


async def test_eight_long_requests_over_forty_blocks(service: Service) -> None:
    """They would need eighty: all finish as they would alone, and nobody is preempted without end."""
    rng = random.Random(8)
    prompts = [[rng.randrange(100, 40_000) for _ in range(80)] for _ in range(8)]
    params = SamplingParams(max_tokens=76, temperature=0, ignore_eos=True)
    before = service.metric("num_preemptions_total", INVARIANT)
    async with session_of(service, INVARIANT) as session:
        streams = [session.generate(prompt, params)[0] for prompt in prompts]
        answers = await asyncio.gather(*(take(s, p) for s, p in zip(streams, prompts, strict=True)))
        wait_for(lambda: service.is_idle(INVARIANT), 5, "all blocks to be free")
    assert [a.finish_reasons for a in answers] == [["length"]] * 8
    assert LoneJudge().check([a.given for a in answers]) <= 1
    preemptions = service.metric("num_preemptions_total", INVARIANT) - before
    print(f"{preemptions:.0f} preemptions")
    assert 0 < preemptions <= 8 * MAX_PREEMPTIONS


@pytest.mark.parametrize("n", [1, 3])
async def test_aborts_in_every_phase_disturb_nobody(service: Service, n: int) -> None:
    """In the queue, in the middle of a prompt, at the first, a middle and the last token, and after the end."""
    rng = random.Random(n)
    long, *prompts = ([rng.randrange(100, 40_000) for _ in range(size)] for size in (2000, 30, 30, 30, 30))
    params = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)

    async def canary(session: Session) -> list[int]:
        return (await take(session.generate([1, 2, 3], msgspec.structs.replace(params, max_tokens=48))[0])).token_ids

    async with session_of(service, MODEL) as session:
        undisturbed = await canary(session)
        beside = asyncio.create_task(canary(session))
        slow = session.generate(long, params, n=n)
        await asyncio.sleep(0.7)
        assert all(stream.take() is None for stream in slow), "the long prompt was computed already"
        never_run = session.generate(long, params, n=n)  # its abort comes in the same frame
        for stream in (*slow, *never_run):
            stream.abort("client_gone")
        for keep, prompt in zip((1, 8, 15, None), prompts, strict=True):
            first, *others = session.generate(prompt, params, n=n)
            gone, *whole = await asyncio.gather(take(first, prompt, keep), *(take(s, prompt) for s in others))
            assert [a.finish_reasons for a in whole] == [["length"]] * (n - 1)
            assert all(a.token_ids[: len(gone.token_ids)] == gone.token_ids for a in whole)
            assert (gone.aborted, len(gone.token_ids)) == (keep is not None, keep or 16)
            session._post(wire.Abort(first.id, "client_gone"))  # it crosses with the end
        assert await beside == undisturbed
    wait_for(service.is_idle, 5, "all blocks to be free")


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

    async def most_waiting() -> float:
        most = 0.0
        while not answered.is_set():
            most = max(most, await asyncio.to_thread(service.metric, "num_requests_waiting"))
            await asyncio.sleep(0.5)
        return most

    answered = asyncio.Event()
    watch = asyncio.create_task(most_waiting())
    first = await at_once(1000)
    answered.set()
    waiting = await watch
    before = _memory(service)
    second = await at_once(300)
    assert [a["usage"]["completion_tokens"] for a in first] == [2] * 1000
    assert len([1 for a, b in zip(first, second, strict=False) if a["choices"] != b["choices"]]) <= 3, "near ties aside"
    growth = {pid: after - before[pid] for pid, after in _memory(service).items() if pid in before}
    assert waiting > 500
    print(f"{waiting:.0f} of a thousand waited at once")
    print(f"memory after three hundred more requests: {max(growth.values()) >> 20} MiB more at most in a process")
    assert max(growth.values()) < 64 << 20


def _memory(service: Service) -> dict[int, int]:
    """Resident bytes by process."""
    return {pid: psutil.Process(pid).memory_info().rss for pid in service.pids(".")}


def test_only_the_same_salt_finds_a_prompt_again(service: Service) -> None:
    """Over HTTP and gRPC alike; the metrics of both pages count it in tokens."""
    prompt = "".join(f"{i} and " for i in range(20))
    prompt_tokens = len(Tokenizer.from_folder(store.models_dir() / store.DEFAULT_MODEL).encode(prompt))
    blocks = (prompt_tokens - 1) // 16 * 16

    def over_http(**fields: Any) -> int:
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 1, **fields}
        answer = httpx.post(f"{service.url}/v1/completions", json=body, timeout=30).json()
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

    def over_grpc(**parameters: Any) -> None:
        answered: queue.Queue[Any] = queue.Queue()
        with grpcclient.InferenceServerClient(service.instance.grpc_address) as client:
            client.start_stream(lambda result, error: answered.put(error or result))
            client.async_stream_infer(MODEL, [tensor("text_input", prompt, "BYTES")], parameters=parameters)
            assert not isinstance(answered.get(timeout=20), Exception)
            client.stop_stream(cancel_requests=False)

    def counted() -> list[float]:
        names = ("prefix_cache_queries_total", "prefix_cache_hits_total")
        return [service.metric(name, triton=triton) for name in names for triton in (False, True)]

    before = counted()
    assert [over_http(), over_http(), over_http(cache_salt="a"), over_http(cache_salt="a")] == [0, blocks, 0, blocks]
    over_grpc(cache_salt="b")
    over_grpc(cache_salt="a")
    over_grpc(cache_salt="b")
    assert over_http(cache_salt="b") == blocks
    moved = [8 * prompt_tokens] * 2 + [5 * blocks] * 2
    wait_for(lambda: [now - was for now, was in zip(counted(), before, strict=True)] == moved, 3, f"{moved} tokens")


async def test_several_answers_share_the_prompts_blocks(service: Service) -> None:
    """Six answers to a prompt of 128 tokens fit a pool that has room for two such prompts."""
    prompt = [random.Random(1).randrange(100, 40_000) for _ in range(128)]
    params = SamplingParams(max_tokens=12, top_k=TOP_K, seed=5, ignore_eos=True)
    async with session_of(service, POOL) as session:
        before = service.metric("num_preemptions_total", POOL)
        streams = session.generate(prompt, params, n=6)
        together = [a.token_ids for a in await asyncio.gather(*(take(s) for s in streams))]
        alone = []
        for i in range(6):
            lone = SamplingParams(max_tokens=12, top_k=TOP_K, seed=5 + i, ignore_eos=True)
            alone.append((await take(session.generate(prompt, lone)[0])).token_ids)
    assert service.metric("num_preemptions_total", POOL) == before
    assert together == alone
    assert len({tuple(tokens) for tokens in together}) == 6


async def test_batch_invariant_answers_are_the_same_to_the_bit(service: Service) -> None:
    """Tokens and log-probabilities, alone and among eleven others; over preemptions, tests/engine shows it."""
    rng = random.Random(9)
    prompts = [[rng.randrange(100, 40_000) for _ in range(rng.randint(3, 70))] for _ in range(12)]
    params = [
        SamplingParams(max_tokens=20, temperature=t, seed=i, ignore_eos=True, logprobs=2)
        for i, t in enumerate([0.0, 0.9] * 6)
    ]

    async def ask(session: Session, i: int) -> list[Any]:
        found = []
        async for output in session.generate(prompts[i], params[i])[0]:
            found += output.logprobs or []
        return found

    async with session_of(service, INVARIANT) as session:
        alone = [await ask(session, i) for i in range(12)]
        together = await asyncio.gather(*(ask(session, i) for i in range(12)))
    assert [len(found) for found in alone] == [20] * 12
    assert together == alone
