"""What a folder of safetensors holds, told by the files' headers alone (https://github.com/huggingface/safetensors).

Pickled weights are never opened: unpickling runs code.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pagoda.errors import CheckpointError

NAMED = 5
"""Names told in a message at most, of each kind of trouble."""
DAMAGE = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What reading a JSON of another shape than expected raises."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as its file's header announces it."""

    file: Path
    dtype: str
    """In the format's words: BF16, F32, I8, …"""
    shape: tuple[int, ...]
    end: int
    """Where its bytes end, counted from the end of the header."""
    num_bytes: int


def files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, by its index where it has one. Raises CheckpointError when there are none."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        paths = [folder / name for name in _indexed(index)]
    elif single.exists():
        paths = [single]
    else:
        paths = sorted(folder.glob("*.safetensors"))
    absent = [path.name for path in paths if not path.is_file()]
    if absent:
        raise CheckpointError(f"the index of {folder} names {some(absent)}, which is missing: download it again")
    if not paths:
        raise CheckpointError(
            f"no *.safetensors in {folder}; pickled weights (*.bin, *.pt) are never opened: convert them"
        )
    return paths


def headers(folder: Path) -> dict[str, Stored]:
    """Every tensor of a folder by name. Raises CheckpointError for a file that is no whole safetensors file."""
    found: dict[str, Stored] = {}
    for path in files(folder):
        for name, tensor in _read_header(path).items():
            if name in found:
                raise CheckpointError(f"tensor {name} is in {found[name].file.name} and in {path.name}: remove one")
            found[name] = tensor
    return found


def some(names: list[str]) -> str:
    """A handful of names, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _indexed(index: Path) -> list[str]:
    try:
        # The last part of a name only: an index points at nothing outside its folder.
        return sorted({Path(name).name for name in json.loads(index.read_text("utf-8"))["weight_map"].values()})
    except DAMAGE as error:
        raise CheckpointError(f"{index} is no index of safetensors files ({error!r}): download it again") from None


def _read_header(path: Path) -> dict[str, Stored]:
    """8 bytes with the header's length, the header in JSON, the tensors' bytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise CheckpointError(f"{path} is a Git LFS pointer, not the weights: fetch them with `git lfs pull`")
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise CheckpointError(f"{path} ({size} bytes) is truncated or no safetensors file: download it again")
        text = file.read(length)
    try:
        entries = json.loads(text)
        tensors = {name: _stored(path, entry) for name, entry in entries.items() if name != "__metadata__"}
    except DAMAGE as error:
        raise CheckpointError(f"{path} has no valid safetensors header ({error!r}): download it again") from None
    promised = 8 + length + max((tensor.end for tensor in tensors.values()), default=0)
    if promised != size:
        raise CheckpointError(f"{path} has {size} bytes and its header promises {promised}: download it again")
    return tensors


def _stored(path: Path, entry: Mapping[str, Any]) -> Stored:
    begin, end = entry["data_offsets"]
    return Stored(path, str(entry["dtype"]), tuple(entry["shape"]), int(end), int(end) - int(begin))
