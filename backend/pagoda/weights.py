"""Fill a model from a folder of safetensors: each tensor is read once and copied to where the model wants it.

Pickled weights are never opened: unpickling runs code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from pagoda.errors import CheckpointError
from pagoda.layers import Linear

IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)
"""Tensors that old checkpoints hold and no model needs: they are computed."""


@dataclass(frozen=True, slots=True)
class Target:
    """A place in the model for one of the checkpoint's tensors: rows of a parameter."""

    parameter: torch.Tensor
    start: int
    rows: int

    def fill(self, tensor: torch.Tensor) -> None:
        self.parameter[self.start : self.start + self.rows].copy_(tensor)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows, *self.parameter.shape[1:])


def load(model: nn.Module, folder: Path, tied: dict[str, str]) -> None:
    """Fill every parameter and prepare the layers.

    `tied` maps a parameter to the one it equals when the checkpoint does not hold it. Raises CheckpointError naming
    what is missing, unexpected or of the wrong shape.
    """
    wanted = targets(model)
    seen: set[str] = set()
    for name, tensor in read_tensors(folder):
        if name.endswith(IGNORED_SUFFIXES) or (name in tied and name not in wanted):
            continue
        if name not in wanted:
            raise CheckpointError(f"unexpected tensor {name} {tuple(tensor.shape)} in {folder}")
        if tuple(tensor.shape) != wanted[name].shape:
            raise CheckpointError(f"tensor {name} has shape {tuple(tensor.shape)}, not {wanted[name].shape}")
        wanted[name].fill(tensor)
        seen.add(name)
    for name, source in tied.items():
        if name not in seen and source in seen:
            wanted[name].fill(wanted[source].parameter)
            seen.add(name)
    missing = sorted(set(wanted) - seen)
    if missing:
        raise CheckpointError(f"{len(missing)} tensors are missing in {folder}, the first is {missing[0]}")
    for module in model.modules():
        if isinstance(module, Linear):
            module.prepare()


def targets(model: nn.Module) -> dict[str, Target]:
    """Checkpoint names to places in the model; a stacked matrix has one name a part."""
    found: dict[str, Target] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            parts = module.parts if isinstance(module, Linear) else {}
            if not parts:
                found[f"{prefix}.{name}"] = Target(parameter.data, 0, parameter.shape[0])
            start, parent = 0, prefix.rpartition(".")[0]
            for part, rows in parts.items():
                found[f"{parent}.{part}.{name}"] = Target(parameter.data, start, rows)
                start += rows
    return found


def files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, by its index where it has one. Raises CheckpointError when there are none."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        paths = [folder / Path(name).name for name in names]
    else:
        paths = sorted(folder.glob("*.safetensors"))
    absent = [path.name for path in paths if not path.is_file()]
    if absent:
        raise CheckpointError(f"{absent[0]} is named by the index of {folder} and missing")
    if not paths:
        raise CheckpointError(
            f"no *.safetensors in {folder}; pickled weights (*.bin, *.pt) are never opened: convert them"
        )
    return paths


def read_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for path in files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                yield name, file.get_tensor(name)
