"""The system check behind `pagoda doctor`: can this machine run the server, and what to do where it cannot.

`checks()` measures; each judgement is a function of what was measured, so that it can be tried with any value.
Nothing here imports torch, loads a model or changes anything.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from pagoda.server import store
from pagoda.server.settings import GRPC_PORT, HTTP_PORT, METRICS_PORT, PORT

Status = Literal["ok", "warn", "fail"]

GIB = 2**30
MIB = 2**20

OPTIONAL_PORT = "Triton HTTP"
"""Opened with --triton-http only: a service without it starts where the port is taken."""
CONTAINER_TRITON = Path("/opt/tritonserver")
SUPPORTED_PYTHONS = ((3, 10), (3, 11), (3, 12))
MIN_TORCH = (2, 11)
MIN_GLIBC = (2, 35)
"""Of the wheel nvidia-pytriton 0.7.0 (its tag is manylinux_2_35_x86_64)."""

_WHEEL_HINT = "pip install --no-deps nvidia-pytriton==0.7.0"


@dataclass(frozen=True)
class Check:
    """One line of the report. `warn` works with a limit, `fail` keeps the server from starting; both have a remedy."""

    name: str
    status: Status
    detail: str
    remedy: str = ""

    def __post_init__(self) -> None:
        if self.status != "ok" and not self.remedy:
            raise ValueError(f"{self.name} is {self.status} and has no remedy")


def service_ports(
    frontend: int = PORT, grpc: int = GRPC_PORT, metrics: int = METRICS_PORT, http: int = HTTP_PORT
) -> dict[str, int]:
    """A service's ports by what they are for."""
    return {"frontend": frontend, "Triton gRPC": grpc, "Triton metrics": metrics, OPTIONAL_PORT: http}


def checks(ports: Mapping[str, int] | None = None) -> list[Check]:
    """Everything, in the order in which one would repair it. Takes about a second; never raises for what it finds."""
    wheel = wheel_triton()
    container = CONTAINER_TRITON.is_dir()
    return [
        operating_system(platform.system(), platform.machine(), platform.libc_ver(), container=container),
        python(sys.version_info[:2]),
        libpython(),
        triton(wheel, sys.version_info[:2], container=container),
        numpy_abi(_version("numpy"), container=container),
        torch(_version("torch"), _uncompiled("torch")),
        gpu(_nvidia_smi()),
        cores(len(os.sched_getaffinity(0))),
        memory(_available_memory()),
        shared_memory(_free_bytes(Path("/dev/shm"))),
        disk(_free_bytes(store.home()), store.home(), has_default=(store.models_dir() / store.DEFAULT_MODEL).exists()),
        open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
        *(port(name, number) for name, number in (service_ports() if ports is None else ports).items()),
        models(store.list_models()),
    ]


def report(found: list[Check]) -> list[str]:
    """The checks as plain text, two lines where there is a remedy."""
    width = max((len(check.name) for check in found), default=0)
    return [line for check in found for line in _lines(check, width)]


def _lines(check: Check, width: int) -> list[str]:
    first = f"{check.status:<4}  {check.name:<{width}}  {check.detail}"
    return [first, f"{'':<{6 + width}}  → {check.remedy}"] if check.remedy else [first]


# The machine


def operating_system(system: str, machine: str, libc: tuple[str, str], *, container: bool) -> Check:
    """`libc` is (name, version) as platform.libc_ver() gives it; a container brings what its Triton needs."""
    name = "Operating system"
    detail = f"{system} {machine}, {' '.join(libc).strip() or 'unknown C library'}"
    if system != "Linux":
        return Check(name, "fail", detail, "Triton runs on Linux only: use a Linux machine or the container.")
    if container:
        return Check(name, "ok", detail)
    if machine != "x86_64":
        return Check(name, "fail", detail, "The Triton wheel is built for x86_64: use the official container here.")
    if libc[0] != "glibc" or _numbers(libc[1]) < MIN_GLIBC:
        needs = ".".join(map(str, MIN_GLIBC))
        return Check(name, "fail", detail, f"The Triton wheel needs glibc {needs} (Debian 12, Ubuntu 22.04 or newer).")
    return Check(name, "ok", detail)


def gpu(devices: list[str] | None) -> Check:
    """`devices` has a line per GPU; None means that there is no working driver."""
    if devices:
        return Check("GPU", "ok", "; ".join(devices))
    seen = "nvidia-smi lists none" if devices is not None else "no NVIDIA driver answers"
    remedy = (
        "Nothing to do for the CPU. For a GPU: install NVIDIA's driver and see that `nvidia-smi` lists the card "
        "(in a container: `docker run --gpus all`)."
    )
    return Check("GPU", "warn", f"{seen}: the CPU is used", remedy)


def cores(count: int) -> Check:
    if count < 2:
        remedy = "Give it 2 cores or more: engine, server and frontend share this one, and all answers come slower."
        return Check("CPU cores", "warn", f"{count} usable", remedy)
    return Check("CPU cores", "ok", f"{count} usable")


def memory(available: int) -> Check:
    """`available` bytes, the container's limit included. The default model on a CPU takes 0.5 GiB, its KV cache 2."""
    detail = f"{_gib(available)} available"
    remedy = "Free memory or raise the container's limit; a smaller `kv_cache_gib` in the model's parameters saves too."
    status: Status = "fail" if available < 1.5 * GIB else "warn" if available < 4 * GIB else "ok"
    return Check("Memory", status, detail, remedy if status != "ok" else "")


def shared_memory(free: int) -> Check:
    """`free` bytes in /dev/shm, over which Triton and its Python stub exchange tensors."""
    detail = f"{free / MIB:,.0f} MiB free in /dev/shm"
    remedy = "`docker run --shm-size=1g`, or `mount -o remount,size=1g /dev/shm`; old triton_python_* there can go."
    status: Status = "fail" if free < 16 * MIB else "warn" if free < 256 * MIB else "ok"
    return Check("Shared memory", status, detail, remedy if status != "ok" else "")


def disk(free: int, home: Path, *, has_default: bool) -> Check:
    """`free` bytes where the model store is; the default model takes 0.5 GiB of it once."""
    detail = f"{_gib(free)} free at {home}"
    remedy = "Free space there, or put the store on another disk: set PAGODA_HOME."
    needed = 0.1 * GIB if has_default else GIB
    status: Status = "fail" if free < needed else "warn" if free < 2 * needed else "ok"
    return Check("Disk", status, detail, remedy if status != "ok" else "")


def open_files(soft_limit: int) -> Check:
    if soft_limit == resource.RLIM_INFINITY or soft_limit >= 4096:
        shown = "unlimited" if soft_limit == resource.RLIM_INFINITY else f"{soft_limit:,}"
        return Check("Open files", "ok", f"limit {shown}")
    remedy = "`ulimit -n 65536` (systemd: LimitNOFILE=65536); each connected client holds one."
    return Check("Open files", "warn", f"limit {soft_limit:,}", remedy)


def port(name: str, number: int) -> Check:
    """Whether loopback port `number` can be bound, and who has it if not: another program or a Pagoda that runs."""
    label = f"Port {number}"
    if _is_free(number):
        return Check(label, "ok", f"free for {name}")
    owner, ours = port_owner(number)
    if ours:
        return Check(label, "warn", f"{name}: a Pagoda seems to run, {owner}", "`pagoda stop` ends it.")
    remedy = f"End what uses it (`ss -ltnp 'sport = :{number}'` shows it), or give {name} another port."
    detail = f"wanted for {name}, taken by {owner}"
    if name == OPTIONAL_PORT:
        return Check(label, "warn", detail, f"Nothing to do without --triton-http. With it: {remedy}")
    return Check(label, "fail", detail, remedy)


# The software


def python(version: tuple[int, int]) -> Check:
    detail = f"{_dotted(version)} at {sys.executable}"
    if version in SUPPORTED_PYTHONS:
        return Check("Python", "ok", detail)
    return Check("Python", "fail", detail, "Make the environment anew with Python 3.10, 3.11 or 3.12.")


def libpython() -> Check:
    """Whether the loader finds the shared library of this Python, which Triton's stub is linked against."""
    name = f"libpython{_dotted(sys.version_info[:2])}.so.1.0"
    if _loader_finds(name):
        return Check("libpython", "ok", f"{name} is loadable")
    folder = _folder_with(name)
    if folder is not None:
        return Check("libpython", "warn", f"{name} is in {folder} only", f"export LD_LIBRARY_PATH={folder}")
    remedy = (
        f"Install the shared library (Debian, Ubuntu: apt install {name.removesuffix('.so.1.0')}), "
        "or use a Python that brings it (uv's, or pyenv's built with --enable-shared)."
    )
    return Check("libpython", "fail", f"{name} is not there: Triton's stub cannot start", remedy)


def wheel_triton() -> Path | None:
    """The tritonserver folder in the wheel nvidia-pytriton, found without importing it."""
    spec = importlib.util.find_spec("pytriton")
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    folders = [Path(place) / "tritonserver" for place in places]
    return next((folder for folder in folders if folder.is_dir()), None)


def triton(wheel: Path | None, version: tuple[int, int], *, container: bool) -> Check:
    """Triton itself: the container's, else the wheel's server and its stub for Python `version`."""
    if container:
        return Check("Triton", "ok", f"in {CONTAINER_TRITON}")
    if wheel is None:
        return Check("Triton", "fail", f"neither {CONTAINER_TRITON} nor the wheel", f"`{_WHEEL_HINT}`")
    needed = ["bin/tritonserver", f"python_backend_stubs/{_dotted(version)}/triton_python_backend_stub"]
    missing = [file for file in needed if not (wheel / file).is_file()]
    if missing:
        remedy = f"`{_WHEEL_HINT} --force-reinstall`, under Python 3.10, 3.11 or 3.12."
        return Check("Triton", "fail", f"the wheel lacks {', '.join(missing)}", remedy)
    return Check("Triton", "ok", f"wheel nvidia-pytriton {_version('nvidia-pytriton') or '(version unknown)'}")


def numpy_abi(version: str | None, *, container: bool) -> Check:
    """The wheel's stub was built before NumPy 2, whose arrays it reads as garbage without an error."""
    if version is None:
        return Check("NumPy", "fail", "not installed", "`pip install 'numpy<2'`")
    if not container and _numbers(version) >= (2,):
        detail = f"{version}: the Triton wheel's stub cannot read NumPy 2 arrays, texts would arrive garbled"
        return Check("NumPy", "fail", detail, "`pip install 'numpy<2'` into this environment")
    return Check("NumPy", "ok", f"{version} suits {'this container' if container else 'the Triton wheel'}")


def torch(version: str | None, uncompiled: Path | None = None) -> Check:
    """`uncompiled`: the folder of packages, if each start of an engine has to compile those sources, some 2 s."""
    needed = _dotted(MIN_TORCH)
    if version is None:
        remedy = f"`pip install 'torch>={needed}'` where the engine runs; a machine with the frontend alone needs none."
        return Check("PyTorch", "fail", "not installed", remedy)
    if _numbers(version) < MIN_TORCH:
        return Check("PyTorch", "fail", f"{version} is too old", f"`pip install 'torch>={needed}'`")
    if uncompiled is not None:
        remedy = f"`{sys.executable} -m compileall -q {uncompiled}`, once: each start does it again, some 2 s longer."
        return Check("PyTorch", "warn", f"{version}, without compiled bytecode, and no start may write any", remedy)
    return Check("PyTorch", "ok", version)


def models(stored: list[store.StoredModel]) -> Check:
    if not stored:
        return Check("Models", "warn", f"none in {store.models_dir()}", "`pagoda pull` gets the embedded default.")
    broken = [model for model in stored if model.problem is not None]
    if broken:
        detail = "; ".join(f"{model.name}: {model.problem}" for model in broken)
        remedy = f"Remove what is broken from {store.models_dir()} and run `pagoda pull` again."
        return Check("Models", "warn", detail, remedy)
    return Check("Models", "ok", ", ".join(f"{model.name} ({_gib(model.num_bytes)})" for model in stored))


# Measuring


def _uncompiled(package: str) -> Path | None:
    """The folder of packages that holds this one, where its bytecode is not there and Python may not write it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None or Path(importlib.util.cache_from_source(spec.origin)).exists():
        return None
    folder = Path(spec.origin).parent
    return folder.parent if sys.dont_write_bytecode or not os.access(folder, os.W_OK) else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _nvidia_smi() -> list[str] | None:
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return [_gpu_line(line) for line in answer.stdout.splitlines() if line.strip()]


def _gpu_line(line: str) -> str:
    name, total, driver = (part.strip() for part in line.rsplit(",", 2))
    return f"{name}, {total}, driver {driver}"


def _loader_finds(library: str) -> bool:
    """Asked in a process of its own: loading a second libpython into this one is not safe."""
    command = [sys.executable, "-S", "-c", "import ctypes, sys; ctypes.CDLL(sys.argv[1])", library]
    try:
        return subprocess.run(command, capture_output=True, timeout=30).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False


def _folder_with(library: str) -> Path | None:
    folders = [Path(sysconfig.get_config_var("LIBDIR") or ""), Path(sys.base_prefix) / "lib"]
    return next((folder for folder in folders if (folder / library).is_file()), None)


def _available_memory() -> int:
    """Bytes that can be had without swapping, within the container's limit where there is one."""
    limits = [_room_in_cgroup("memory.max", "memory.current")]
    limits += [_room_in_cgroup("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")]
    return min([_meminfo("MemAvailable"), *(room for room in limits if room is not None)])


def _meminfo(key: str) -> int:
    match = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"), re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def _room_in_cgroup(limit: str, usage: str) -> int | None:
    root = Path("/sys/fs/cgroup")
    try:
        return max(0, int((root / limit).read_text()) - int((root / usage).read_text()))
    except (OSError, ValueError):  # no such controller, or the limit is the word "max"
        return None


def _free_bytes(path: Path) -> int:
    """Free bytes on the disk that holds `path`, or will once it exists."""
    existing = next(place for place in (path, *path.parents) if place.exists())
    return shutil.disk_usage(existing).free


def _is_free(number: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that still close are no obstacle
        try:
            probe.bind(("127.0.0.1", number))
        except OSError:
            return False
    return True


def port_owner(number: int) -> tuple[str, bool]:
    """Who listens on the port, in words, and whether that is a part of Pagoda."""
    try:
        import psutil
    except ImportError:
        return "a process (install psutil to see which)", False
    try:
        listening = [c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        pid = next((c.pid for c in listening if c.laddr.port == number and c.pid), None)
        process = psutil.Process(pid) if pid else None
        if process is None:
            return "a process of another user", False
        command = process.cmdline()
    except psutil.Error:
        return "a process that cannot be looked at", False
    return f"{process.name()} (process {process.pid})", any("pagoda" in word for word in command)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB"
