"""Random weights instead of a checkpoint's: any config.json can be measured without its 15 GB."""

from __future__ import annotations

import torch
from torch import nn

from pagoda import weights

SEED = 0
STANDARD_DEVIATION = 0.02
"""Of matrices: what models are initialised with, so that hidden states neither vanish nor overflow."""


@torch.no_grad()
def fill(model: nn.Module, device: torch.device) -> None:
    """Fill a model on the meta device, the same on every run on a kind of device, and prepare the layers.

    Layer by layer: what a layer turns its weights into replaces them before the next one's take memory.
    """
    generator = torch.Generator(device).manual_seed(SEED)
    for name, layer in weights.layers(model).items():
        layer.allocate(device)
        layer.make_up(STANDARD_DEVIATION, generator)
        weights.prepare(name, layer)
