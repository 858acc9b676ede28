"""Fill a model from a folder of safetensors: each tensor is read once and copied to where the model wants it.

All headers are read first, so that whatever is wrong with a folder is said before gigabytes are moved.
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
from pagoda.layers import Layer

log = logging.getLogger("pagoda.weights")

IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)
"""Tensors that old checkpoints hold and no model needs: they are computed."""
DTYPES = ("BF16", "F16", "F32", "F64")
LOG_INTERVAL = 5.0
"""Seconds between two lines of the log while weights are read and nobody watches a bar."""


def load(model: nn.Module, folder: Path, tied: Mapping[str, str]) -> None:
    """Fill every parameter and prepare the layers.

    `tied` maps a parameter's name to that of the one it shares its memory with; the folder holds either or both.
    Raises CheckpointError naming what is missing, unexpected or of the wrong shape.
    """
    _fill_all(model, folder, tied)
    prepare(model)


def _fill_all(model: nn.Module, folder: Path, tied: Mapping[str, str]) -> None:
    """Its views of the parameters end with it: a weight that `prepare` packs anew must be free to go."""
    stored = {name: tensor for name, tensor in headers(folder).items() if not name.endswith(IGNORED_SUFFIXES)}
    wanted = places(model)
    for name, source in tied.items():
        absent = name if source in stored else source
        stored.pop(absent, None)
        wanted.pop(absent, None)
    _check(wanted, stored, folder)
    _fill(wanted, stored)


def places(model: nn.Module) -> dict[str, torch.Tensor]:
    """The checkpoint's names, and the place in the model's memory where each tensor goes."""
    layers = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, Layer))
    return {place: view for name, layer in layers for place, view in layer.places(name)}


def prepare(model: nn.Module) -> None:
    """Turn the parameters of every layer into what its operations want; the model is ready to run."""
    for layer in model.modules():
        if isinstance(layer, Layer):
            layer.prepare()


def _check(wanted: Mapping[str, torch.Tensor], stored: Mapping[str, Stored], folder: Path) -> None:
    """Raises CheckpointError that tells all that is wrong, with a few names of each kind."""
    both = sorted(set(wanted) & set(stored))
    wrong = [
        f"{name} (shape {list(stored[name].shape)}, not {list(wanted[name].shape)})"
        for name in both
        if stored[name].shape != tuple(wanted[name].shape)
    ]
    odd = [f"{name} ({stored[name].dtype})" for name in both if stored[name].dtype not in DTYPES]
    troubles = (
        ("missing", sorted(set(wanted) - set(stored))),
        ("unexpected", sorted(set(stored) - set(wanted))),
        ("of the wrong shape", wrong),
        (f"of another type than {', '.join(DTYPES)}", odd),
    )
    said = [f"{len(names)} {what}: {some(names)}" for what, names in troubles if names]
    if said:
        raise CheckpointError(f"the tensors in {folder} are not those of config.json: {'; '.join(said)}")


def _fill(wanted: Mapping[str, torch.Tensor], stored: Mapping[str, Stored]) -> None:
    by_file: dict[Path, list[str]] = defaultdict(list)
    for name, tensor in stored.items():
        by_file[tensor.file].append(name)
    with _progress(sum(tensor.num_bytes for tensor in stored.values())) as advance:
        for path, names in by_file.items():
            with safe_open(path, framework="pt") as file:
                for name in names:
                    wanted[name].copy_(file.get_tensor(name))
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
