"""The Llama page, the trunk of all others, and every way of rotating: against transformers' own class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from engine.parity import PROMPT, SHAPE, TOLERANCE, Paged, assert_parity, difference, save, steady
from pagoda import hf_config, rope
from pagoda.hf_rope import Dynamic, Linear, LongRope, Rope
from transformers import LlamaConfig, LlamaForCausalLM

TRAINED = 32
"""Tokens of the original context where a rotation is scaled: half of what is compared."""
HALF_HEAD = 4

ROTATIONS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"factor": 4.0},
    "yarn, all of its options": {
        "factor": 8.0,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
        "truncate": False,
    },
    "yarn, attention factor given": {"factor": 4.0, "attention_factor": 1.3},
    "longrope": {
        "factor": 4.0,
        "short_factor": steady([1.0, 1.5], HALF_HEAD),
        "long_factor": steady([2.0, 5.0], HALF_HEAD),
    },
}


def checkpoint(folder: Path, **changes: Any) -> LlamaForCausalLM:
    return save(folder, LlamaConfig(**{**SHAPE, **changes}), LlamaForCausalLM)


def rotation(kind: str, **parameters: Any) -> dict[str, Any]:
    given = {"rope_type": kind, "rope_theta": 10000.0, "original_max_position_embeddings": TRAINED, **parameters}
    return {"rope_parameters": given}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"num_key_value_heads": 6},
        {"head_dim": 20},
    ],
    ids=["grouped heads", "tied", "biases", "no groups", "head of its own size"],
)
def test_logits_and_continuation_equal_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert_parity(checkpoint(tmp_path, **changes), tmp_path, chunks=(64, 16, 9))


@pytest.mark.parametrize("kind", ROTATIONS)
def test_scaled_rotations_equal_transformers(tmp_path: Path, kind: str) -> None:
    model = checkpoint(tmp_path, **rotation(kind.partition(",")[0], **ROTATIONS[kind]))
    assert_parity(model, tmp_path)
    expected = Paged(tmp_path).prefill(PROMPT, 64)
    config = hf_config.load(tmp_path)
    plain = msgspec.structs.replace(config, rope=Rope(config.rope.theta, config.rope.size))
    assert difference(Paged(tmp_path, config=plain).prefill(PROMPT, 64), expected) > 300 * TOLERANCE


def test_a_dynamic_base_is_that_of_the_longest_context(tmp_path: Path) -> None:
    """transformers grows the base with what it sees; here it is what 64 tokens make it, which is what it then sees."""
    model = checkpoint(tmp_path, max_position_embeddings=TRAINED, **rotation("dynamic", factor=4.0))
    assert_parity(model, tmp_path, max_model_len=64)
    assert hf_config.load(tmp_path).max_position_embeddings == 4 * TRAINED


def test_within_the_original_context_a_dynamic_base_is_the_plain_one() -> None:
    plain, dynamic = Rope(1e4, 8), Rope(1e4, 8, Dynamic(4.0, TRAINED))
    assert torch.equal(rope.inverse_frequencies(dynamic, TRAINED), rope.inverse_frequencies(plain, TRAINED))
    assert not torch.equal(rope.inverse_frequencies(dynamic, TRAINED + 1), rope.inverse_frequencies(plain, TRAINED))


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        (LongRope(2.0, TRAINED, (1.0,) * 2, (2.0,) * 2), "set of long factors"),
        (Dynamic(4.0, TRAINED), f"base grown for {TRAINED + 1} tokens"),
    ],
    ids=["longrope", "dynamic"],
)
def test_a_choice_that_short_texts_pay_for_is_said(
    scaling: LongRope | Dynamic, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    rope.tables(Rope(1e4, 4, scaling), TRAINED, torch.device("cpu"))
    rope.tables(Rope(1e4, 4, Linear(2.0)), 2 * TRAINED, torch.device("cpu"))
    assert caplog.records == []
    rope.tables(Rope(1e4, 4, scaling), TRAINED + 1, torch.device("cpu"))
    [record] = caplog.records
    assert words in record.getMessage()
    assert f"set max_model_len to {TRAINED}" in record.getMessage()


def test_longrope_takes_its_short_factors_when_no_request_can_be_long() -> None:
    scaled = Rope(1e4, 4, LongRope(2.0, TRAINED, (1.0, 1.0), (2.0, 2.0)))
    plain = rope.inverse_frequencies(Rope(1e4, 4), TRAINED)
    assert torch.equal(rope.inverse_frequencies(scaled, TRAINED), plain)
    assert torch.equal(rope.inverse_frequencies(scaled, TRAINED + 1), plain / 2)


def test_a_rotation_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="2 short and long factors"):
        Rope(1e4, 4, LongRope(2.0, TRAINED, (1.0,), (2.0, 2.0)))
    with pytest.raises(ValueError, match="even and positive"):
        Rope(1e4, 5, Linear(2.0))
