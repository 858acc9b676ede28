"""Triton's model repository: a folder of models, each with its config.pbtxt."""

from __future__ import annotations

from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from pagoda.contract import config_text
from pagoda.errors import ConfigError


def single_model(folder: Path, model: str, name: str, parameters: dict[str, str]) -> Path:
    """A repository with one model, whose config.pbtxt is complete, for `pagoda serve --model`.

    Raises ConfigError for a name that no folder can have.
    """
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ConfigError(f"a model cannot be named {name!r}: choose a --served-model-name without a slash")
    version = folder / name / "1"
    version.mkdir(parents=True)
    (folder / name / "config.pbtxt").write_text(config_text({"model": model, **parameters}), "utf-8")
    return folder


def check(folder: Path) -> None:
    """Raises ConfigError for what is no repository."""
    if not folder.is_dir() or not any(folder.glob("*/config.pbtxt")):
        raise ConfigError(f"{folder} is no model repository: it needs MODEL/config.pbtxt and MODEL/1/")


def needs_gpus(folder: Path) -> bool:
    """Whether tritonserver itself must see the GPUs: for another backend's model, or one whose instances name GPUs."""
    return any(_needs_gpus(model / "config.pbtxt") for model in folder.iterdir() if model.is_dir())


def _needs_gpus(file: Path) -> bool:
    try:
        config = text_format.Parse(file.read_text("utf-8"), ModelConfig(), allow_unknown_field=True)
    except (OSError, ValueError, text_format.ParseError):
        return True  # Triton completes some configurations, and refuses the others with its reason
    return config.backend != "pagoda" or any(
        group.kind == ModelInstanceGroup.KIND_GPU or group.gpus for group in config.instance_group
    )
