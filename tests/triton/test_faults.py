"""Clients and processes die; whoever did not, goes on. Each wait's bound is the one that is promised."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import pytest
from service import MODEL, Service, sse_events, wait_for

CLIENT = """
import json, sys, threading, urllib.request
def stream(i):
    body = {"model": "smollm2", "prompt": f"Story {i}:", "max_tokens": 4000, "stream": True, "ignore_eos": True}
    body = json.dumps(body)
    request = urllib.request.Request(sys.argv[1] + "/v1/completions", body.encode())
    for line in urllib.request.urlopen(request):
        pass
threads = [threading.Thread(target=stream, args=(i,)) for i in range(int(sys.argv[2]))]
[t.start() for t in threads]; [t.join() for t in threads]
"""


@contextmanager
def other_client(service: Service, streams: int, *, others: int = 0) -> Iterator[subprocess.Popen[bytes]]:
    """A process with `streams` long completions, all running in the engine beside `others`."""
    client = subprocess.Popen([sys.executable, "-c", CLIENT, service.url, str(streams)], stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: service.metric("num_requests_running") == others + streams, 60, "the client's streams to run")
        yield client
    finally:
        client.kill()
        client.wait()


class Stream(threading.Thread):
    """One streamed completion, read to its end."""

    def __init__(
        self, service: Service, max_tokens: int, *, model: str = MODEL, prompt: str | list[int] = "Once", **fields: Any
    ) -> None:
        super().__init__(daemon=True)
        self.url = service.url
        self.body = {
            "model": model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "ignore_eos": True,
            **fields,
        }
        self.text = ""
        self.finish_reasons: list[str] = []
        self.error: str | None = None
        self.ended_at = 0.0
        self.first = threading.Event()
        self.start()

    def run(self) -> None:
        try:
            request = urllib.request.Request(f"{self.url}/v1/completions", json.dumps(self.body).encode())
            with urllib.request.urlopen(request, timeout=120) as response:
                for event in sse_events(response):
                    self.take(event)
        except urllib.error.HTTPError as error:
            self.error = json.loads(error.read())["error"]["message"]
        except OSError as error:
            self.error = f"connection: {error}"
        self.ended_at = time.monotonic()
        self.first.set()

    def take(self, event: dict[str, Any]) -> None:
        if "error" in event:
            self.error = event["error"]["message"]
            return
        for choice in event["choices"]:
            self.text += choice["text"]
            self.first.set()
            if choice["finish_reason"]:
                self.finish_reasons.append(choice["finish_reason"])

    def ends_once(self, seconds: float = 60) -> None:
        """Exactly one finish reason or one error, within a bound."""
        self.join(seconds)
        assert not self.is_alive()
        assert len(self.finish_reasons) + (self.error is not None) == 1, (self.finish_reasons, self.error)


def test_killed_client_frees_its_requests_within_a_second(calm: Service) -> None:
    canary = Stream(calm, 300)
    canary.first.wait(30)
    with other_client(calm, 8, others=1) as client:
        client.kill()
        wait_for(lambda: calm.metric("num_requests_running") == 1, 1.5, "the eight requests to end")
    canary.ends_once()
    assert canary.finish_reasons == ["length"]
    wait_for(calm.is_idle, 2, "all blocks to be free")
    assert calm.is_idle()
    assert calm.metric("kv_cache_usage_perc", triton=True) == 0


@pytest.mark.parametrize("linger", [None, 0], ids=["FIN", "RST"])
def test_a_client_that_leaves_before_its_whole_answer_frees_it(calm: Service, linger: int | None) -> None:
    connection = http.client.HTTPConnection(calm.url.removeprefix("http://"), timeout=10)
    body = {"model": MODEL, "prompt": "Once", "max_tokens": 4000, "ignore_eos": True}
    connection.request("POST", "/v1/completions", json.dumps(body))
    wait_for(lambda: calm.metric("num_requests_running") == 1, 10, "the request to run")
    if linger is not None:
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, linger))
    connection.close()
    wait_for(calm.is_idle, 1.5, "the request to end")


def test_closing_one_connection_leaves_the_others_alone(calm: Service) -> None:
    canary = Stream(calm, 60)
    lone = Stream(calm, 60)
    canary.first.wait(30)
    with other_client(calm, 2, others=2) as client:
        client.terminate()
    canary.ends_once()
    lone.ends_once()
    assert canary.text == lone.text


def test_killed_frontend_worker_is_replaced_and_its_requests_are_aborted(calm: Service) -> None:
    workers = calm.pids("pagoda_openai.worker")
    assert len(workers) == 2
    with other_client(calm, 6) as client:
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: len(set(calm.pids("pagoda_openai.worker")) - set(workers)) == 2, 5, "new workers")
        wait_for(
            lambda: calm.metric("num_requests_running", triton=True) == 0, 5, "the orphaned requests to be aborted"
        )
        client.wait(20)
    calm.wait_ready(20)


def test_killed_engine_comes_back_by_itself(calm: Service) -> None:
    triton, stubs = calm.pids("bin/tritonserver"), calm.pids("python_backend_stub")
    streams = [Stream(calm, 2000, prompt=f"Tale {i}") for i in range(4)]
    for stream in streams:
        stream.first.wait(30)
    engines = calm.pids("pagoda.process")
    assert len(engines) == 2
    killed = engine_of(MODEL, engines)
    os.kill(killed, signal.SIGKILL)
    wait_for(lambda: calm.status("/health") == 503, 2, "/health to tell")
    for stream in streams:
        stream.ends_once(5)
        assert "the engine process ended by signal 9" in (stream.error or "")
    print(f"engine back after {serves_again(calm, 30):.1f} s")
    assert calm.pids("bin/tritonserver") == triton
    assert calm.pids("python_backend_stub") == stubs


def serves_again(service: Service, seconds: float) -> float:
    """Seconds until ten requests in a row, over all workers, are answered and /health says so."""

    def answers() -> bool:
        if service.status("/health") != 200:
            return False
        streams = [Stream(service, 2) for _ in range(10)]
        for stream in streams:
            stream.ends_once(20)
        return all(stream.finish_reasons == ["length"] for stream in streams)

    return wait_for(answers, seconds, "the service to serve again")


def engine_of(model: str, engines: list[int]) -> int:
    """The engine process that holds the model's lock file open."""
    for pid in engines:
        if any(f.path.endswith(f"engine-{model}.lock") for f in psutil.Process(pid).open_files()):
            return pid
    raise AssertionError(f"no engine of {model} among {engines}")


def test_frozen_engine_is_ended_and_started_again_by_the_stub(calm: Service) -> None:
    triton, stubs = calm.pids("bin/tritonserver"), calm.pids("python_backend_stub")
    stream = Stream(calm, 2000)
    stream.first.wait(30)
    os.kill(engine_of(MODEL, calm.pids("pagoda.process")), signal.SIGSTOP)
    wait_for(lambda: calm.status("/health") == 503, 3, "/health to tell")
    stream.ends_once(6)
    assert "frozen" in (stream.error or "")
    serves_again(calm, 30)
    assert calm.pids("bin/tritonserver") == triton
    assert calm.pids("python_backend_stub") == stubs


def test_text_requests_survive_a_killed_engine(calm: Service) -> None:
    """The text worker opens a new session with the new engine."""
    os.kill(engine_of(MODEL, calm.pids("pagoda.process")), signal.SIGKILL)
    wait_for(lambda: calm.status("/health") == 503, 2, "/health to tell")
    wait_for(lambda: calm.status("/health") == 200, 30, "the engine to come back")
    body = json.dumps({"text_input": "The capital of France is", "max_tokens": 4, "temperature": 0}).encode()
    url = f"{calm.instance.http_url}/v2/models/{MODEL}/generate"

    def answers() -> bool:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, body), timeout=20) as response:
                return b"Paris" in response.read()
        except urllib.error.HTTPError:
            return False

    wait_for(answers, 5, "a text request to be answered")


def test_killed_text_worker_comes_back(calm: Service) -> None:
    before = calm.pids("pagoda.text.worker")
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: len(set(calm.pids("pagoda.text.worker")) - set(before)) == 2, 5, "new text workers")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_lost_stub_is_noticed_and_the_service_recovers(calm: Service, how: signal.Signals) -> None:
    stream = Stream(calm, 2000)
    stream.first.wait(30)
    for pid in calm.pids("python_backend_stub"):
        os.kill(pid, how)
    began = time.monotonic()
    wait_for(lambda: calm.status("/health") == 503, 2, "/health to tell")
    stream.ends_once(15)
    assert stream.error is not None
    serves_again(calm, 30)
    print(f"recovered after {time.monotonic() - began:.1f} s")


def test_killed_tritonserver_is_started_again_without_strays(calm: Service) -> None:
    (triton,) = calm.pids("bin/tritonserver")
    below = [p.pid for p in psutil.Process(triton).children(recursive=True)]
    os.kill(triton, signal.SIGKILL)
    wait_for(lambda: calm.status("/health") == 503, 2.5, "/health to tell")
    wait_for(lambda: not any(psutil.pid_exists(pid) for pid in below), 5, "its children to be gone")
    serves_again(calm, 30)


def test_a_pause_of_the_whole_machine_ends_nothing(calm: Service) -> None:
    """As when it is moved to another host, for longer than any silence that counts as a death."""
    service = psutil.Process(calm.process.pid)
    processes = [service, *service.children(recursive=True)]
    stream = Stream(calm, 100)
    stream.first.wait(30)
    for process in processes:
        process.suspend()
    time.sleep(11)
    for process in processes:
        process.resume()
    neighbour = Stream(calm, 4, model="short")
    for waiting in (neighbour, stream):
        waiting.ends_once(30)
        assert waiting.finish_reasons == ["length"], waiting.error
    assert {service, *service.children(recursive=True)} == set(processes)
