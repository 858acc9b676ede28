"""What `pagoda serve` is told, and where its instance keeps its things."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import msgspec

from pagoda.errors import ConfigError
from pagoda.server import store

PORT, GRPC_PORT, METRICS_PORT, HTTP_PORT = 9000, 8001, 8002, 8000
"""Of the OpenAI frontend, and of Triton's gRPC, metrics and HTTP, unless others are asked for."""


class ServeSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Ports, folders and numbers of one running service."""

    model_repository: Path
    configs_are_complete: bool = False
    """Triton need not ask the backend what its models' config.pbtxt leave out, which takes each of them 1.5 s."""
    hide_gpus: bool = False
    """tritonserver itself sees no GPU; the engines do."""
    host: str = "127.0.0.1"
    port: int = PORT
    grpc_port: int = GRPC_PORT
    metrics_port: int = METRICS_PORT
    http_port: int = HTTP_PORT
    triton_http: bool = False
    """Open Triton's own HTTP port, on loopback."""
    workers: int = 2
    """Frontend processes."""
    api_key: str | None = None
    run_folder: Path
    """Logs and the instance file; one running service at most per folder."""
    drain_grace: float = 3.0
    """Seconds that requests in flight get at shutdown."""

    @property
    def logs(self) -> Path:
        return self.run_folder / "logs"

    @property
    def url(self) -> str:
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host
        return f"http://{host}:{self.port}"


class Instance(msgspec.Struct, frozen=True, kw_only=True):
    """A running service, as others on this machine find it."""

    pid: int
    url: str
    grpc_address: str
    metrics_url: str
    http_url: str | None
    scratch: str
    """Sockets, locks and copies of this run; the name is also the prefix of its shared-memory regions."""
    secret: str
    """Opens Triton's restricted protocols; the file that holds it is readable by its user only."""


def default_run_folder() -> Path:
    return store.home() / "run"


def instance_file(run_folder: Path) -> Path:
    return run_folder / "instance.json"


@contextmanager
def holding(run_folder: Path) -> Iterator[None]:
    """Be the one service of a run folder. Raises ConfigError when another is, or where no service can be.

    A lock and not a process id tells: in a container every start has the same one.
    """
    with _open_lock(run_folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"a service already runs from {run_folder}: `pagoda stop` ends it") from None
        yield


def _open_lock(run_folder: Path) -> TextIO:
    try:
        run_folder.mkdir(parents=True, exist_ok=True)
        return open(run_folder / "lock", "w")
    except OSError as error:
        raise ConfigError(
            f"run_folder = {str(run_folder)!r} cannot be written: {error.strerror}; "
            "give a folder of yours with --run-folder, or set PAGODA_HOME to one"
        ) from None


def _is_held(run_folder: Path) -> bool:
    with open(run_folder / "lock") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def write_instance(run_folder: Path, instance: Instance) -> None:
    descriptor = os.open(instance_file(run_folder), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(msgspec.json.encode(instance))


def read_instance(run_folder: Path) -> Instance | None:
    """The service that runs from this folder, or None. A file left by a dead one counts as none."""
    instance = written_instance(run_folder)
    try:
        return instance if instance is not None and _is_held(run_folder) else None
    except OSError:
        return None


def written_instance(run_folder: Path) -> Instance | None:
    """What the file says, or None. To whoever is `holding` the folder, that is a service that was killed."""
    try:
        return msgspec.json.decode(instance_file(run_folder).read_bytes(), type=Instance)
    except (OSError, msgspec.MsgspecError):
        return None
