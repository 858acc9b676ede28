"""What makes Pagoda fast through Triton: one response a step, and processes without torch where none is needed."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import openai
import psutil
import pytest
from service import MODEL, Service, wait_for
from test_faults import Stream

WORKERS = 2
SESSIONS = WORKERS + 3
"""Beside the workers': the supervisor's, the stub's own and the text worker's."""


async def test_64_streams_cost_a_response_a_step_not_a_token(calm: Service) -> None:
    """Each of two workers has one session; pongs and metrics add a few a second."""
    client = openai.AsyncOpenAI(base_url=f"{calm.url}/v1", api_key="none", max_retries=0, timeout=120)

    async def one(i: int) -> None:
        body = {"ignore_eos": True}
        prompt = f"Number {i} is"
        stream = await client.completions.create(
            model=MODEL, prompt=prompt, max_tokens=48, temperature=0, stream=True, extra_body=body
        )
        async for _ in stream:
            pass

    names = ("engine_steps_total", "generation_tokens_total", "session_payloads_total")
    before = [calm.metric(name) for name in names]
    began = time.monotonic()
    await asyncio.gather(*(one(i) for i in range(64)))
    await asyncio.sleep(1.0)
    seconds = time.monotonic() - began
    steps, tokens, responses = (calm.metric(name) - was for name, was in zip(names, before, strict=True))
    print(
        f"64 streams, {seconds:.1f} s: {tokens:.0f} tokens, {steps:.0f} engine steps, {responses:.0f} Triton responses"
    )
    assert tokens == 64 * 48
    beside = SESSIONS * seconds * 5  # pongs and metrics: two each a second, and room for a busy machine
    assert responses <= WORKERS * steps + beside
    assert responses < tokens / 4


def test_torch_is_nowhere_but_in_the_engine(calm: Service) -> None:
    """Looked up in each process's own memory map."""
    for pattern in ("python_backend_stub", "pagoda_openai.worker", "pagoda.text.worker"):
        found = calm.pids(pattern)
        assert found
        assert not any("libtorch" in Path(f"/proc/{pid}/maps").read_text() for pid in found), pattern
    assert all("libtorch" in Path(f"/proc/{pid}/maps").read_text() for pid in calm.pids("pagoda.process"))


def test_triton_listens_on_loopback_only(calm: Service) -> None:
    service_pids = {calm.process.pid, *calm.pids(".")}
    listening = [c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.pid in service_pids]
    assert listening
    assert {c.laddr.ip.removeprefix("::ffff:") for c in listening} <= {"127.0.0.1", "::1"}


SERIES = (
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "kv_cache_waste_perc",
    "num_preemptions_total",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "prompt_tokens_total",
    "generation_tokens_total",
    "request_success_total",
    "time_to_first_token_seconds_bucket",
    "time_to_first_token_seconds_count",
    "inter_token_latency_seconds_sum",
    "e2e_request_latency_seconds_count",
)


def test_the_core_series_are_on_both_pages_and_move_alike(calm: Service) -> None:
    """Counters of Triton's page go on over a restart of the engine, the frontend's begin anew; both move alike."""
    stream = Stream(calm, 4)  # the first request makes every series
    stream.ends_once()
    wait_for(calm.is_idle, 5)
    before = [(calm.metric(name, triton=True), calm.metric(name)) for name in SERIES]
    Stream(calm, 7).ends_once()
    wait_for(calm.is_idle, 5)
    time.sleep(1.2)
    for name, (triton, own) in zip(SERIES, before, strict=True):
        moved = calm.metric(name, triton=True) - triton
        assert moved == pytest.approx(calm.metric(name) - own, abs=1e-6), name
    assert calm.metric("generation_tokens_total") - before[SERIES.index("generation_tokens_total")][1] == 7
