"""A model cut down to one layer of each kind and its last: what calls all of its kernels, in a fraction of the time."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager

from torch import nn

from pagoda.models.llama import LlamaForCausalLM


@contextmanager
def one_of_each(model: LlamaForCausalLM) -> Iterator[None]:
    """Within, the model has only the first of all layers that are alike, and its last one.

    That one's operations are others: after its attention only sampled tokens go on.
    """
    layers = model.model.layers
    kinds: dict[Hashable, nn.Module] = {}
    for layer in layers:
        kinds.setdefault(_kind(layer), layer)
    model.model.layers = nn.ModuleList([*kinds.values(), layers[-1]])
    try:
        yield
    finally:
        model.model.layers = layers


def _kind(layer: nn.Module) -> Hashable:
    """Equal for layers of the same parts, stored alike, with or without a window."""
    return tuple(
        (type(part), type(getattr(part, "scheme", None)), bool(getattr(part, "window", 0))) for part in layer.modules()
    )
