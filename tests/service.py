"""The real service under test: `pagoda serve` with the real tritonserver and the real model on free ports."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from pagoda.server import settings as service_settings
from pagoda.server import store

MODEL = "smollm2"
PAGODA = str(Path(sys.prefix) / "bin" / "pagoda")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_model(repository: Path, name: str, **parameters: object) -> None:
    """A model folder of a Triton repository that serves the embedded default."""
    (repository / name / "1").mkdir(parents=True)
    entries = {"model": str(store.models_dir() / store.DEFAULT_MODEL), **parameters}
    lines = [f'parameters: {{ key: "{k}" value: {{ string_value: "{v}" }} }}' for k, v in entries.items()]
    (repository / name / "config.pbtxt").write_text('backend: "pagoda"\n' + "\n".join(lines) + "\n")


class Service:
    """A running `pagoda serve`."""

    def __init__(self, process: subprocess.Popen[bytes], run_folder: Path, repository: Path, output: Path) -> None:
        self.process = process
        self.run_folder = run_folder
        self.repository = repository
        self.output = output

    @property
    def instance(self) -> service_settings.Instance:
        found = service_settings.read_instance(self.run_folder)
        assert found is not None
        return found

    @property
    def url(self) -> str:
        return self.instance.url

    def get(self, path: str, timeout: float = 5.0) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(self.url + path, timeout=timeout) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def triton_post(self, model: str, verb: str, body: dict[str, Any]) -> bytes:
        """What Triton's own HTTP port answers to generate or generate_stream."""
        url = f"{self.instance.http_url}/v2/models/{model}/{verb}"
        with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode()), timeout=60) as response:
            return bytes(response.read())

    def metric(self, name: str, model: str = MODEL, *, triton: bool = False) -> float:
        """A series' value from the frontend's page, or from Triton's own."""
        url = self.instance.metrics_url if triton else f"{self.url}/metrics"
        with urllib.request.urlopen(url, timeout=10) as response:
            page = response.read().decode()
        values = [
            float(line.rpartition(" ")[2])
            for line in page.splitlines()
            if re.match(rf"(vllm|pagoda):{name}{{", line) and f'model_name="{model}"' in line
        ]
        assert values, f"no series vllm:{name} for {model}"
        return sum(values)

    def is_idle(self, model: str = MODEL) -> bool:
        """Nothing runs or waits, and every block is free."""
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        try:
            return all(self.metric(name, model) == 0 for name in names)
        except AssertionError:  # a worker that has just found the model has no snapshot of it yet
            return False

    def pids(self, pattern: str) -> list[int]:
        """Processes of this service whose command line matches."""
        tree = psutil.Process(self.process.pid).children(recursive=True)
        return [p.pid for p in tree if p.is_running() and re.search(pattern, " ".join(_command(p)))]

    def wait_ready(self, seconds: float = 60.0, status: int = 200) -> float:
        """Seconds until /ready answers with `status`."""
        return wait_for(lambda: self._status("/ready") == status, seconds)

    def _status(self, path: str) -> int:
        try:
            return self.get(path)[0]
        except (OSError, AssertionError):
            return 0

    def status(self, path: str) -> int:
        return self._status(path)


def _command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def wait_for(condition: Callable[[], bool], seconds: float, what: str = "") -> float:
    """Seconds until the condition held; fails when it did not within `seconds`."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > seconds:
            raise AssertionError(f"not within {seconds} s: {what or condition}")
        time.sleep(0.05)
    return time.monotonic() - began


@contextmanager
def running(
    repository: Path, folder: Path, *arguments: str, program: Sequence[str] = (PAGODA,), model: str | None = None
) -> Iterator[Service]:
    """Start `pagoda serve`, of a repository or of one model, wait until it is ready; end it by SIGTERM."""
    ports = [free_port() for _ in range(4)]
    names = ("--port", "--grpc-port", "--metrics-port", "--http-port")
    flags = [text for pair in zip(names, map(str, ports), strict=True) for text in pair]
    run_folder, output = folder / "run", folder / "serve.log"
    command = [
        *program,
        "serve",
        *(("--model-repository", str(repository)) if model is None else ("--model", model)),
        "--triton-http",
    ]
    with open(output, "wb") as log:
        process = subprocess.Popen(
            [*command, *flags, "--run-folder", str(run_folder), *arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    service = Service(process, run_folder, repository, output)
    try:
        wait_for(lambda: process.poll() is not None or "first token" in output.read_text(), 120, "the proof")
        assert process.poll() is None, output.read_text()
        yield service
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        for log_file in (run_folder / "logs").glob("*"):
            sys.stdout.write(f"--- {log_file.name}\n{log_file.read_text(errors='replace')[-4000:]}\n")


def sse_events(lines: Iterator[bytes]) -> Iterator[dict[str, object]]:
    for line in lines:
        if line.startswith(b"data: {"):
            yield json.loads(line[6:])
