"""Models come and go while the service runs; the service itself ends and leaves nothing."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from service import MODEL, PAGODA, Service, free_port, running, wait_for, write_model
from test_faults import Stream, other_client


def pagoda(service: Service, *arguments: str) -> None:
    command = [str(Path(sys.prefix) / "bin" / "pagoda"), *arguments, "--run-folder", str(service.run_folder)]
    subprocess.run(command, check=True, timeout=60, stdout=subprocess.DEVNULL)


def test_ten_unloads_and_loads_under_streams(calm: Service) -> None:
    """Never two engines of a model, every stream ends with a reason, the other model is untouched."""
    other = calm.metric("engine_steps_total", "short")
    (untouched,) = set(calm.pids("pagoda.process")) - set(engines_of(calm, MODEL))
    for _ in range(10):
        streams = [Stream(calm, 3000, prompt=f"Tale {i}") for i in range(3)]
        for stream in streams:
            stream.first.wait(30)
        pagoda(calm, "unload", MODEL)
        asked = time.monotonic()
        for stream in streams:
            stream.ends_once(10)
            assert stream.error is not None
            assert "being unloaded" in stream.error
        assert max(s.ended_at for s in streams) - asked < 7
        neighbour = Stream(calm, 4, model="short")
        neighbour.ends_once(20)
        assert neighbour.finish_reasons == ["length"], neighbour.error
        pagoda(calm, "load", MODEL)
        assert len(engines_of(calm, MODEL)) == 1
        wait_for(lambda: calm.status(f"/v1/models/{MODEL}") == 200 and calm.status("/health") == 200, 10, "the model")
        after = Stream(calm, 4)
        after.ends_once(20)
        assert after.finish_reasons == ["length"], after.error
    assert untouched in calm.pids("pagoda.process")
    assert calm.metric("engine_steps_total", "short") >= other


def engines_of(service: Service, model: str) -> list[int]:
    """Engine processes that hold, or wait for, the model's lock."""
    found = []
    for pid in service.pids("pagoda.process"):
        try:
            if any(f.path.endswith(f"engine-{model}.lock") for f in psutil.Process(pid).open_files()):
                found.append(pid)
        except psutil.NoSuchProcess:
            pass
    return found


def leftovers(pids: list[int], ports: list[int], scratch: Path) -> list[str]:
    """What a service that has ended still holds: processes, ports, shared memory, folders."""
    alive = [f"process {pid}" for pid in pids if psutil.pid_exists(pid)]
    listening = {c.laddr.port for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    held = [f"port {port}" for port in ports if port in listening]
    regions = [str(p) for p in Path("/dev/shm").glob(f"{scratch.name}*")]
    return alive + held + regions + ([str(scratch)] if scratch.exists() else [])


def tree(service: Service) -> list[int]:
    return [p.pid for p in psutil.Process(service.process.pid).children(recursive=True)]


def ports_of(service: Service) -> list[int]:
    i = service.instance
    return [int(re.findall(r":(\d+)", url or "")[0]) for url in (i.url, i.grpc_address, i.metrics_url, i.http_url)]


@pytest.fixture
def own_service(tmp_path: Path):  # type: ignore[no-untyped-def]
    """A service of this test's own, with one model."""
    write_model(tmp_path / "repository", MODEL, kv_cache_gib="0.5")
    with running(tmp_path / "repository", tmp_path / "service") as started:
        yield started


@pytest.fixture(autouse=True)
def _service_folder(tmp_path: Path) -> None:
    (tmp_path / "service").mkdir(exist_ok=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "terminate"])
def test_the_end_comes_within_ten_seconds_and_leaves_nothing(own_service: Service, number: signal.Signals) -> None:
    streams = [Stream(own_service, 3000, prompt=f"Tale {i}") for i in range(8)]
    for stream in streams:
        stream.first.wait(30)
    pids, ports = tree(own_service), ports_of(own_service)
    scratch = Path(own_service.instance.scratch)
    assert list(Path("/dev/shm").glob(f"{scratch.name}*")), "the regions have another name than we sweep"
    began = time.monotonic()
    own_service.process.send_signal(number)
    assert own_service.process.wait(timeout=10) == 0
    print(f"ended after {time.monotonic() - began:.1f} s")
    for stream in streams:
        stream.ends_once(1)
        assert stream.error is not None
        assert "shutting down" in stream.error
    assert leftovers(pids, ports, scratch) == []


@pytest.mark.parametrize("port", ["grpc", "metrics", "http"])
def test_a_port_of_tritons_that_is_taken_is_named_before_anything_starts(
    calm: Service, tmp_path: Path, port: str
) -> None:
    address = {"grpc": calm.instance.grpc_address, "metrics": calm.instance.metrics_url, "http": calm.instance.http_url}
    (taken,) = re.findall(r":(\d+)", address[port] or "")
    ports = {name: str(free_port()) for name in ("port", "grpc-port", "metrics-port", "http-port")}
    ports[f"{port}-port"] = taken
    flags = [text for name, value in ports.items() for text in (f"--{name}", value)]
    where = ["--model-repository", str(calm.repository), "--run-folder", str(tmp_path / "run")]
    done = subprocess.run(
        [PAGODA, "serve", "--triton-http", *where, *flags], capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode == 1
    assert f"port {taken} cannot be used: Address already in use by tritonserver (process" in done.stdout
    assert f"choose another with --{port}-port" in done.stdout
    assert "tritonserver started" not in done.stdout


@pytest.mark.parametrize("stub", ["free", "stuck"])
def test_without_its_supervisor_a_killed_tritonserver_leaves_no_engine(own_service: Service, stub: str) -> None:
    with other_client(own_service, 4):
        (triton,) = own_service.pids("bin/tritonserver")
        below = [p.pid for p in psutil.Process(triton).children(recursive=True)]
        own_service.process.send_signal(signal.SIGSTOP)  # nobody sweeps
        if stub == "stuck":  # as when it waits for an answer of tritonserver's
            (waiting,) = own_service.pids("python_backend_stub")
            os.kill(waiting, signal.SIGSTOP)
        os.kill(triton, signal.SIGKILL)
        try:
            wait_for(lambda: not any(alive(pid) for pid in below), 5, "the stub and the engine to end")
        finally:
            own_service.process.send_signal(signal.SIGCONT)


def test_a_killed_supervisor_takes_all_with_it_and_the_next_one_sweeps(own_service: Service) -> None:
    pids, ports, scratch = tree(own_service), ports_of(own_service), Path(own_service.instance.scratch)
    own_service.process.kill()
    wait_for(lambda: not any(alive(pid) for pid in pids), 10, "all below it to end")
    assert leftovers([], ports, Path("/nowhere")) == []
    assert scratch.exists()
    with running(own_service.repository, own_service.run_folder.parent):
        assert leftovers([], [], scratch) == []


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
