"""The real service, started once for every test of this folder that does not end it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
from pagoda.server import store
from service import MODEL, Service, running, wait_for, write_model


def _server_missing() -> str | None:
    if Path("/opt/tritonserver/bin/tritonserver").exists():
        return None
    return (
        None if importlib.util.find_spec("pytriton") else "no tritonserver: the nvidia-pytriton wheel is not installed"
    )


@pytest.fixture(scope="session", autouse=True)
def _needs_server() -> None:
    if reason := _server_missing():
        pytest.skip(reason)
    store.pull_default()


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Two models: the default, and the same with a shorter context."""
    repository = tmp_path_factory.mktemp("repository")
    write_model(repository, MODEL, kv_cache_gib="1.0")
    write_model(repository, "short", max_model_len="256", kv_cache_gib="0.1")
    with running(repository, tmp_path_factory.mktemp("service")) as started:
        yield started


@pytest.fixture
def calm(service: Service) -> Service:
    """The service, idle: what one test left running does not count in the next."""
    service.wait_ready()
    wait_for(lambda: service.is_idle(), 30, "the service to fall idle")
    return service
