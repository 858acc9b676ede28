"""The system check: on this machine as it is, and each judgement on measured values made up here."""

from __future__ import annotations

import importlib.util
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from pagoda.server import doctor
from pagoda.server.doctor import GIB, MIB, Check
from pagoda.server.store import StoredModel


def test_everything_is_looked_at_and_what_is_not_ok_has_a_remedy() -> None:
    found = doctor.checks()
    names = {check.name for check in found}
    assert names >= {"Operating system", "Python", "libpython", "Triton", "NumPy", "PyTorch", "GPU", "CPU cores"}
    assert names >= {"Memory", "Shared memory", "Disk", "Open files", "Models"}
    assert names >= {"Port 9000", "Port 8001", "Port 8002", "Port 8000"}
    assert all(check.remedy for check in found if check.status != "ok")


def test_nothing_imports_torch() -> None:
    code = "import sys; from pagoda.server import doctor; doctor.checks(); print('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_a_check_that_is_not_ok_needs_a_remedy() -> None:
    with pytest.raises(ValueError, match="has no remedy"):
        Check("Disk", "warn", "full")


def test_report_aligns_and_puts_the_remedy_below() -> None:
    lines = doctor.report([Check("Python", "ok", "3.11"), Check("Disk", "fail", "0.0 GiB", "Free some.")])
    assert lines == ["ok    Python  3.11", "fail  Disk    0.0 GiB", "              → Free some."]
    assert doctor.report([]) == []


@pytest.mark.parametrize(
    ("system", "machine", "libc", "container", "status"),
    [
        ("Linux", "x86_64", ("glibc", "2.36"), False, "ok"),
        ("Linux", "x86_64", ("glibc", "2.35"), False, "ok"),
        ("Linux", "x86_64", ("glibc", "2.31"), False, "fail"),
        ("Linux", "x86_64", ("", ""), False, "fail"),  # musl
        ("Linux", "aarch64", ("glibc", "2.39"), False, "fail"),
        ("Linux", "aarch64", ("glibc", "2.39"), True, "ok"),
        ("Darwin", "arm64", ("", ""), False, "fail"),
    ],
)
def test_operating_system(system: str, machine: str, libc: tuple[str, str], container: bool, status: str) -> None:
    assert doctor.operating_system(system, machine, libc, container=container).status == status


@pytest.mark.parametrize(
    ("version", "container", "status"),
    [("1.26.4", False, "ok"), ("2.0.0", False, "fail"), ("2.3.1", True, "ok"), (None, False, "fail")],
)
def test_numpy_2_is_refused_beside_the_wheel_only(version: str | None, container: bool, status: str) -> None:
    assert doctor.numpy_abi(version, container=container).status == status


@pytest.mark.parametrize(
    ("version", "status"),
    [("2.13.0+cpu", "ok"), ("2.11.0", "ok"), ("2.9.1", "fail"), ("3.0.0a0", "ok"), (None, "fail")],
)
def test_torch(version: str | None, status: str) -> None:
    assert doctor.torch(version).status == status


def test_torch_whose_bytecode_is_never_written_makes_each_start_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check() -> Check:
        return next(check for check in doctor.checks(ports={}) if check.name == "PyTorch")

    torch = importlib.util.find_spec("torch")
    assert torch is not None
    assert torch.origin is not None
    monkeypatch.setattr(sys, "pycache_prefix", str(tmp_path))  # where none has been compiled to
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    assert check().status == "ok", "the first start writes it"
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    assert check().status == "warn"
    assert check().remedy.split(",")[0] == f"`{sys.executable} -m compileall -q {Path(torch.origin).parents[1]}`"


@pytest.mark.parametrize(("version", "status"), [((3, 9), "fail"), ((3, 10), "ok"), ((3, 12), "ok"), ((3, 13), "fail")])
def test_python(version: tuple[int, int], status: str) -> None:
    assert doctor.python(version).status == status


def test_triton_comes_from_the_container_or_the_whole_wheel(tmp_path: Path) -> None:
    def status(wheel: Path | None, *, container: bool = False) -> str:
        return doctor.triton(wheel, (3, 11), container=container).status

    assert status(None) == "fail"
    assert status(None, container=True) == "ok"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "tritonserver").touch()
    assert status(tmp_path) == "fail"
    (tmp_path / "python_backend_stubs" / "3.11").mkdir(parents=True)
    (tmp_path / "python_backend_stubs" / "3.11" / "triton_python_backend_stub").touch()
    assert status(tmp_path) == "ok"
    assert doctor.triton(tmp_path, (3, 12), container=False).status == "fail"


def test_the_real_wheel_is_found_and_not_imported() -> None:
    wheel = doctor.wheel_triton()
    if wheel is None:
        pytest.skip("the wheel nvidia-pytriton is not installed")
    assert (wheel / "bin" / "tritonserver").is_file()
    assert "pytriton" not in sys.modules


def test_quantities() -> None:
    assert [doctor.memory(int(gib * GIB)).status for gib in (1, 3, 8)] == ["fail", "warn", "ok"]
    assert [doctor.shared_memory(mib * MIB).status for mib in (8, 64, 1024)] == ["fail", "warn", "ok"]
    assert [doctor.open_files(limit).status for limit in (1024, 65536, -1)] == ["warn", "ok", "ok"]
    assert [doctor.cores(count).status for count in (1, 2)] == ["warn", "ok"]
    assert doctor.disk(GIB // 2, Path("/"), has_default=False).status == "fail"
    assert doctor.disk(GIB // 2, Path("/"), has_default=True).status == "ok"


def test_no_gpu_means_the_cpu_and_says_so() -> None:
    for check in (doctor.gpu(None), doctor.gpu([])):
        assert check.status == "warn"
        assert "the CPU is used" in check.detail
    assert doctor.gpu(["NVIDIA H200, 143771 MiB, driver 570.1"]).status == "ok"


@pytest.mark.parametrize(
    ("script", "detail"),
    [
        ("echo 'NVIDIA H200, 143771 MiB, 570.86.15'", "NVIDIA H200, 143771 MiB, driver 570.86.15"),
        ("echo 'NVIDIA-SMI has failed'; exit 9", "no NVIDIA driver answers"),
        ("exit 0", "nvidia-smi lists none"),
    ],
    ids=["one card", "broken driver", "no card"],
)
def test_nvidia_smi_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, detail: str) -> None:
    command = tmp_path / "nvidia-smi"
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path))
    gpu = next(check for check in doctor.checks(ports={}) if check.name == "GPU")
    assert detail in gpu.detail


def test_a_taken_port_names_its_owner() -> None:
    pytest.importorskip("psutil")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        check = doctor.port("frontend", number)
        assert check.status != "ok"
        assert f"(process {os.getpid()})" in check.detail
    assert doctor.port("frontend", number) == Check(f"Port {number}", "ok", "free for frontend")


def test_a_port_taken_on_all_interfaces_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        assert doctor.port("Triton gRPC", taken.getsockname()[1]).status != "ok"


def test_the_port_that_is_opened_on_request_keeps_no_service_from_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "port_owner", lambda number: ("nginx (process 7)", False))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        check = doctor.port("Triton HTTP", taken.getsockname()[1])
    assert (check.status, check.detail) == ("warn", "wanted for Triton HTTP, taken by nginx (process 7)")
    assert check.remedy.startswith("Nothing to do without --triton-http. With it: End what uses it")


def test_models_of_the_store_are_listed_with_their_problems() -> None:
    fine = StoredModel("fine", Path("/m/fine"), 2 * GIB, linked=False, problem=None)
    broken = StoredModel("broken", Path("/m/broken"), 0, linked=True, problem="it is not a folder")
    assert doctor.models([]).status == "warn"
    assert doctor.models([fine]) == Check("Models", "ok", "fine (2.0 GiB)")
    assert "broken: it is not a folder" in doctor.models([fine, broken]).detail


def test_the_disk_of_a_store_that_does_not_exist_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGODA_HOME", str(tmp_path / "not" / "yet"))
    disk = next(check for check in doctor.checks(ports={}) if check.name == "Disk")
    assert str(tmp_path) in disk.detail
    assert not (tmp_path / "not").exists()
