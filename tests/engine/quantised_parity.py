"""What a quantised checkpoint must mean: transformers' own class with the numbers that its tensors stand for.

Where inputs are rounded to 8 bits, transformers' are rounded too. A sum that differs in its last bit can then fall to
the other side of a rounding, which moves a number by up to 1/16, and later ones with it: transformers' own logits move
by up to 0.035 of the largest when its embeddings move by a millionth. So there the logits are bounded loosely, and
every single product, on the inputs that it gets, as tightly as the others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine.parity import PROMPT, SHAPE, TOLERANCE, Paged, difference, expected_logits, save
from engine.quantised import Format, ProductErrors, rounded
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

FP8_TOLERANCE = 0.05
"""As TOLERANCE, for logits of models that round their inputs."""
WIDE: dict[str, Any] = {
    **SHAPE,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "initializer_range": 0.05,
}
"""Inputs in whole groups of 128."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    save(folder, LlamaConfig(**WIDE), LlamaForCausalLM)
    return folder


def meaning(model: PreTrainedModel, numbers: dict[str, Tensor], form: Format) -> PreTrainedModel:
    """The model with the numbers that a quantised checkpoint stands for."""
    model.load_state_dict({**model.state_dict(), **numbers})
    if form.rounds_inputs:
        for name, module in model.named_modules():
            if f"{name}.weight" in numbers:
                module.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0]),))
    return model


def assert_means(model: PreTrainedModel, folder: Path, numbers: dict[str, Tensor], form: Format) -> None:
    """Prefill in chunks, then decode: the products and logits of `model` everywhere, and its likeliest tokens.

    A token counts where the likeliest leads by more than the logits' error.
    """
    paged = Paged(folder)
    errors = ProductErrors(paged.model, numbers, form)
    tokens, got = paged.generate(PROMPT, 12, 20)
    expected = expected_logits(meaning(model, numbers, form), PROMPT + tokens[:-1])
    error = difference(got, expected)
    print(f"{form.name}: products within {max(errors.worst.values()):.1e}, logits within {error:.1e}")
    assert max(errors.worst.values()) < 1e-5
    assert error < (FP8_TOLERANCE if form.rounds_inputs else TOLERANCE)
    scores = expected[len(PROMPT) - 1 :]
    likeliest, second = scores.topk(2).values.unbind(dim=1)
    clear = likeliest - second > 2 * error * expected.abs().max()
    assert clear.sum() >= (4 if form.rounds_inputs else len(tokens))
    assert torch.tensor(tokens)[clear].equal(scores.argmax(dim=1)[clear])
