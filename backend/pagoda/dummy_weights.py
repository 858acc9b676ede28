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
    """Fill every parameter, the same on every run on a kind of device, and prepare the layers.

    Vectors, which are the weights of norms and biases, vary around one.
    """
    generator = torch.Generator(device).manual_seed(SEED)
    for parameter in model.parameters():
        parameter.normal_(0.0, STANDARD_DEVIATION, generator=generator)
        if parameter.dim() == 1:
            parameter.add_(1.0)
    weights.prepare(model)
