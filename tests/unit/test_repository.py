"""What a model repository's configurations say."""

from __future__ import annotations

from pathlib import Path

import pytest
from pagoda.errors import ConfigError
from pagoda.server import repository

OURS = 'backend: "pagoda"'
NEEDS = {
    "nothing said": (OURS, False),
    "complete": (None, False),
    "by itself": (f"{OURS} instance_group [{{ kind: KIND_MODEL }}]", False),
    "unknown fields": (f"{OURS} not_yet_known {{ a: 1 }}", False),
    "on GPUs": (f"{OURS} instance_group [{{ kind: KIND_GPU }}]", True),
    "on a GPU": (f"{OURS} instance_group [{{ gpus: [1] }}]", True),
    "of another backend": ('backend: "onnxruntime"', True),
    "completed by Triton": ("", True),
    "not a configuration": ("backend = pagoda", True),
    "not text": (b"\xff\xfe", True),
}


@pytest.mark.parametrize("name", NEEDS)
def test_tritonserver_needs_gpus_for_some_models(tmp_path: Path, name: str) -> None:
    config, needs = NEEDS[name]
    repository.single_model(tmp_path, "/models/first", "first", {"max_model_len": "64"})
    if config is not None:
        (tmp_path / "second").mkdir()
        raw = config if isinstance(config, bytes) else config.encode()
        (tmp_path / "second" / "config.pbtxt").write_bytes(raw)
    assert repository.needs_gpus(tmp_path) is needs


def test_a_model_without_a_configuration_needs_gpus(tmp_path: Path) -> None:
    repository.single_model(tmp_path, "/models/first", "first", {})
    (tmp_path / "README.md").write_text("not a model")
    assert not repository.needs_gpus(tmp_path)
    (tmp_path / "plan" / "1").mkdir(parents=True)
    assert repository.needs_gpus(tmp_path)


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", "a\0b"])
def test_a_model_is_named_as_a_folder_can_be(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="a model cannot be named"):
        repository.single_model(tmp_path, "/models/first", name, {})


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_what_is_no_repository_is_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty" / "model").mkdir(parents=True)
    with pytest.raises(ConfigError, match=f"{name} is no model repository: it needs MODEL/config.pbtxt"):
        repository.check(tmp_path / name)
