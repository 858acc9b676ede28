"""Fill a model from a folder of safetensors: each tensor is read once and copied to where the model wants it.

All headers are read first, so that whatever is wrong with a folder is said before gigabytes are moved. A layer gets
its memory when its first tensor is read and is prepared after its last: what a layer turns its weights into replaces
them before the next one's take memory.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from tqdm import tqdm

from pagoda.checkpoint import Stored, headers, some
from pagoda.errors import CheckpointError
from pagoda.layers import Layer, Place

log = logging.getLogger("pagoda.weights")

IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)
"""Tensors that old checkpoints hold and no model needs: they are computed."""
DTYPES = {torch.float8_e4m3fn: ("F8_E4M3",), torch.int32: ("I32",), torch.int64: ("I64",)}
"""What a place takes besides any of FLOATS, in the format's words."""
FLOATS = ("BF16", "F16", "F32", "F64")
LOG_INTERVAL = 5.0
"""Seconds between two lines of the log while weights are read and nobody watches a bar."""


def load(model: nn.Module, folder: Path, tied: Mapping[str, str], device: torch.device) -> None:
    """Fill every parameter of a model on the meta device and prepare the layers, which then are on `device`.

    `tied` maps a parameter's name to that of the one it shares its memory with; the folder holds either or both.
    Raises CheckpointError naming what is missing, unexpected, of the wrong shape or type, or cannot be prepared.
    """
    stored = {name: tensor for name, tensor in headers(folder).items() if not name.endswith(IGNORED_SUFFIXES)}
    renamed = {}
    for name, source in tied.items():
        if source in stored:
            stored.pop(name, None)
        elif name in stored:
            stored[source] = stored.pop(name)
            renamed[source] = name
    filling = _Filling(model, device)
    _check(filling.wanted, stored, folder)
    filling.expect(stored)
    _read(filling, stored, renamed)
    filling.finish()


def layers(model: nn.Module) -> dict[str, Layer]:
    """By name, in the model's order."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Layer)}


def prepare(name: str, layer: Layer) -> None:
    """Turn a layer's parameters into what its operations want. Raises CheckpointError that names the layer."""
    try:
        layer.prepare()
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}") from None


class _Filling:
    """A model that is being filled, layer by layer."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._device = device
        self._layers = layers(model)
        self.wanted: dict[str, Place] = {}
        """By the checkpoint's names; on the meta device, for their shapes and types."""
        self._owners: dict[str, str] = {}
        for name, layer in self._layers.items():
            for tensor, place in layer.places(name):
                self.wanted[tensor] = place
                self._owners[tensor] = name
        self._left: dict[str, set[str]] = defaultdict(set)
        self._places: dict[str, Place] = {}

    def expect(self, stored: Mapping[str, Stored]) -> None:
        """The tensors that will be put, some in every layer that holds any without a default."""
        for tensor in stored:
            self._left[self._owners[tensor]].add(tensor)

    def order(self, tensors: list[str]) -> list[str]:
        """Tensors by their layer, so that few layers are unfinished at a time."""
        rank = {name: i for i, name in enumerate(self._layers)}
        return sorted(tensors, key=lambda tensor: rank[self._owners[tensor]])

    def put(self, tensor: str, value: torch.Tensor) -> None:
        name = self._owners[tensor]
        if tensor not in self._places:
            self._allocate(name)
        place = self._places.pop(tensor).tensor
        place.copy_(value.reshape(place.shape))
        self._left[name].remove(tensor)
        if not self._left[name]:
            prepare(name, self._layers.pop(name))

    def finish(self) -> None:
        """Prepare the layers that no tensor was meant for."""
        for name, layer in self._layers.items():
            self._allocate(name)
            prepare(name, layer)

    def _allocate(self, name: str) -> None:
        layer = self._layers[name]
        layer.allocate(self._device)
        for tensor, place in layer.places(name):
            if tensor in self._left[name]:
                self._places[tensor] = place
            elif place.default is not None:
                place.tensor.fill_(place.default)


def _check(wanted: Mapping[str, Place], stored: Mapping[str, Stored], folder: Path) -> None:
    """Raises CheckpointError that tells all that is wrong, with a few names of each kind."""
    both = sorted(set(wanted) & set(stored))
    wrong = [
        f"{name} (shape {list(stored[name].shape)}, not {list(wanted[name].tensor.shape)})"
        for name in both
        if not _fits(stored[name].shape, tuple(wanted[name].tensor.shape))
    ]
    troubles = [
        ("missing", sorted(name for name in set(wanted) - set(stored) if wanted[name].default is None)),
        ("unexpected", sorted(set(stored) - set(wanted))),
        ("of the wrong shape", wrong),
    ]
    for taken in (FLOATS, *DTYPES.values()):
        places = (name for name in both if DTYPES.get(wanted[name].tensor.dtype, FLOATS) == taken)
        odd = [f"{name} ({stored[name].dtype})" for name in places if stored[name].dtype not in taken]
        troubles.append((f"of another type than {', '.join(taken)}", odd))
    said = [f"{len(names)} {what}: {some(names)}" for what, names in troubles if names]
    if said:
        raise CheckpointError(f"the tensors in {folder} are not those of config.json: {'; '.join(said)}")


def _fits(stored: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """A single number may be stored as one of one."""
    return stored == wanted or (wanted == () and stored == (1,))


def _read(filling: _Filling, stored: Mapping[str, Stored], renamed: Mapping[str, str]) -> None:
    """`renamed`: under which name the file holds a tensor, where it is another."""
    by_file: dict[Path, list[str]] = defaultdict(list)
    for name, tensor in stored.items():
        by_file[tensor.file].append(name)
    with _progress(sum(tensor.num_bytes for tensor in stored.values())) as advance:
        for path, names in by_file.items():
            with safe_open(path, framework="pt") as file:
                for name in filling.order(names):
                    filling.put(name, file.get_tensor(renamed.get(name, name)))
                    advance(stored[name].num_bytes)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], object]]:
    """A bar where a terminal shows it, lines of the log elsewhere. Yields what counts bytes."""
    if sys.stderr.isatty():
        with tqdm(total=total, desc="weights", unit="B", unit_scale=True) as bar:
            yield bar.update
    else:
        yield _LogLines(total)


class _LogLines:
    def __init__(self, total: int) -> None:
        self._total, self._done, self._said = total, 0, time.monotonic()

    def __call__(self, num_bytes: int) -> None:
        self._done += num_bytes
        if time.monotonic() - self._said > LOG_INTERVAL:
            self._said = time.monotonic()
            log.info("weights: %.1f of %.1f GB read", self._done / 1e9, self._total / 1e9)
