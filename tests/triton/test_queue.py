"""The queue through the real server: when it is full, who is next, and deadlines, over HTTP and gRPC alike."""

from __future__ import annotations

import asyncio
import json
import queue
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import tritonclient.grpc as grpcclient
from engine_session import session_of, take
from pagoda.client import RequestStream, Session
from pagoda.errors import Overloaded
from pagoda.sampling_params import SamplingParams
from service import MODEL, Service, running, wait_for, write_model
from test_text_contract import tensor
from tritonclient.utils import InferenceServerException

QUEUE = "queue"
"""One request at a time, and a queue of two requests or 200 tokens."""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    repository = tmp_path_factory.mktemp("repository")
    write_model(repository, MODEL, kv_cache_gib="1.0")
    write_model(
        repository,
        QUEUE,
        max_model_len="2048",
        max_num_seqs="1",
        max_num_queued_requests="2",
        max_num_queued_tokens="200",
        kv_cache_gib="0.2",
    )
    with running(repository, tmp_path_factory.mktemp("service")) as started:
        yield started


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


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_full_queue_refuses_at_once_with_503(service: Service, stream: bool) -> None:
    params = SamplingParams(max_tokens=2, temperature=0)
    async with busy(service) as occupied:
        waiting = [occupied.session.generate([5], params)[0] for _ in range(2)]
        await asyncio.sleep(0.3)
        began = time.monotonic()
        body = {"model": QUEUE, "prompt": "hello", "max_tokens": 2, "stream": stream}
        async with httpx.AsyncClient(base_url=service.url) as client:
            response = await client.post("/v1/completions", json=body)
        assert time.monotonic() - began < 1.0
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["code"] == "overloaded"
        assert "max_num_queued_requests 2" in response.json()["error"]["message"]
        await occupied.end()
        assert [(await take(s)).finish_reasons for s in waiting] == [["length"]] * 2


def grpc_error(service: Service, model: str, **parameters: Any) -> tuple[str, str]:
    """Status and message that end a text request's gRPC stream."""
    ended: queue.Queue[InferenceServerException | None] = queue.Queue()
    with grpcclient.InferenceServerClient(service.instance.grpc_address) as client:
        client.start_stream(lambda result, error: ended.put(error), headers={"triton_grpc_error": "true"})
        inputs = {"text_input": "hello", "sampling_parameters": json.dumps(parameters)}
        client.async_stream_infer(model, [tensor(name, value, "BYTES") for name, value in inputs.items()])
        error = ended.get(timeout=20)
        client.stop_stream(cancel_requests=False)
    assert error is not None
    return error.status(), error.message()


async def test_a_full_queue_refuses_triton_s_clients_with_unavailable(service: Service) -> None:
    params = SamplingParams(max_tokens=2, temperature=0)
    async with busy(service) as occupied:
        waiting = [occupied.session.generate([5], params)[0] for _ in range(2)]
        await asyncio.sleep(0.3)
        began = time.monotonic()
        status, message = await asyncio.to_thread(grpc_error, service, QUEUE)
        assert time.monotonic() - began < 1.0
        assert status == "StatusCode.UNAVAILABLE"
        assert "max_num_queued_requests 2" in message
        url = f"{service.instance.http_url}/v2/models/{QUEUE}/generate"
        async with httpx.AsyncClient() as client:
            assert message in (await client.post(url, json={"text_input": "hello"})).text
        await occupied.end()
        assert [(await take(s)).finish_reasons for s in waiting] == [["length"]] * 2


async def test_waiting_tokens_are_bounded(service: Service) -> None:
    params = SamplingParams(max_tokens=2, temperature=0)
    async with busy(service) as occupied:
        (long,) = occupied.session.generate([5] * 300, params)  # alone in the queue it is never too long
        await asyncio.sleep(0.2)
        (refused,) = occupied.session.generate([6], params)
        with pytest.raises(Overloaded, match="max_num_queued_tokens 200"):
            await take(refused)
        await occupied.end()
        assert (await take(long)).finish_reasons == ["length"]


async def test_a_lower_priority_number_runs_first(service: Service) -> None:
    params = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
    ended = []

    async def follow(name: str, stream: RequestStream) -> None:
        await take(stream)
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


def test_a_timeout_ends_a_text_request_too(service: Service) -> None:
    status, message = grpc_error(service, MODEL, max_tokens=4000, ignore_eos=True, timeout=0.5)
    assert status == "StatusCode.UNAVAILABLE"
    assert "timeout of 0.5 s" in message
