"""What raises for one request ends that request; what raises for a step ends the engine, which comes back by itself."""

from __future__ import annotations

import json
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from planted.sitecustomize import DETOKENIZER, FORWARD, MEMORY, SAMPLER
from service import MODEL, Service, running, wait_for, write_model
from test_faults import Stream, serves_again

SERVE = Path(__file__).parent / "planted" / "serve.py"
CANARY = [9, 8, 7]
TEXTS = {SAMPLER: " return", DETOKENIZER: "\n\n   "}
"""Of the tokens that bring the faults about."""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    repository = tmp_path_factory.mktemp("repository")
    write_model(repository, MODEL, kv_cache_gib="0.5")
    with running(repository, tmp_path_factory.mktemp("service"), program=[sys.executable, str(SERVE)]) as started:
        yield started


@pytest.fixture(scope="module")
def undisturbed(service: Service) -> str:
    service.wait_ready()
    stream = Stream(service, 60, prompt=CANARY)
    stream.ends_once()
    return stream.text


@pytest.mark.parametrize(("mark", "what"), [(SAMPLER, "the request's sampling"), (DETOKENIZER, "the request")])
def test_only_the_request_fails_whose_own_part_raises(calm: Service, undisturbed: str, mark: int, what: str) -> None:
    """Streamed, whole, and over Triton's own contract, beside a canary and a request that asks for the same."""
    before = calm.pids("pagoda.process"), calm.pids("pagoda_openai.worker"), calm.pids("pagoda.text.worker")
    canary = Stream(calm, 60, prompt=CANARY)
    canary.first.wait(30)
    neighbour = Stream(calm, 8, prompt=[5, 6], logit_bias={"7": 1})
    streamed = Stream(calm, 30, prompt=[mark], logit_bias={"7": 1})
    streamed.ends_once(10)
    assert streamed.error is not None
    message = f"{what} failed; the server's log has the reason"
    assert streamed.error == message
    asked = {"max_tokens": 30, "logit_bias": {"7": 1}, "ignore_eos": True}
    assert _error(f"{calm.url}/v1/completions", {"model": MODEL, "prompt": [mark], **asked})[0] == 500
    text = {"text_input": TEXTS[mark], "sampling_parameters": json.dumps(asked)}
    assert message in _error(f"{calm.instance.http_url}/v2/models/{MODEL}/generate", text)[1]
    for stream in (neighbour, canary):
        stream.ends_once()
        assert stream.finish_reasons == ["length"], stream.error
    assert canary.text == undisturbed
    wait_for(calm.is_idle, 5, "all blocks to be free")
    assert before == (calm.pids("pagoda.process"), calm.pids("pagoda_openai.worker"), calm.pids("pagoda.text.worker"))


def _error(url: str, body: dict[str, Any]) -> tuple[int, str]:
    """Status and body of an answer that is an error."""
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode()), timeout=20)
    return caught.value.code, caught.value.read().decode()


@pytest.mark.parametrize("mark", [FORWARD, MEMORY], ids=["tenth step", "out of memory in a prefill"])
def test_a_step_that_raises_ends_the_engine_which_comes_back(calm: Service, undisturbed: str, mark: int) -> None:
    triton, stubs = calm.pids("bin/tritonserver"), calm.pids("python_backend_stub")
    streams = [Stream(calm, 2000, prompt=[5, i]) for i in range(3)]
    for stream in streams:
        stream.first.wait(30)
    streams.append(Stream(calm, 30, prompt=[mark]))
    for stream in streams:
        stream.ends_once(10)
        assert re.match("the engine (failed unexpectedly|process ended with status 1)", stream.error or "")
    wait_for(lambda: calm.status("/health") == 503, 2, "/health to tell")
    print(f"serves again after {serves_again(calm, 30):.1f} s")
    canary = Stream(calm, 60, prompt=CANARY)
    canary.ends_once()
    assert canary.text == undisturbed
    wait_for(calm.is_idle, 5, "all blocks to be free")
    assert (calm.pids("bin/tritonserver"), calm.pids("python_backend_stub")) == (triton, stubs)
