"""Each model family against transformers' own class: same weights, same logits, however tokens are cut into steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import msgspec
import pagoda_kernels
import pytest
import torch
import transformers
from engine.families import FAMILIES, Family
from engine.parity import (
    MAX_MODEL_LEN,
    PROMPT,
    TOLERANCE,
    Paged,
    assert_parity,
    difference,
    expected_logits,
    rms,
)
from pagoda import hf_config, models
from pagoda.hf_config import HFConfig, MixtureConfig
from pagoda.models import kinds
from pagoda.models.mixture import SparseMLP, sort_by_expert
from pagoda_kernels.linear import PackedWeight, reference
from pagoda_kernels.silu_linear import reference as silu_linear
from torch._subclasses.fake_tensor import FakeTensorMode


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_logits_and_continuation_equal_transformers(tmp_path: Path, family: Family) -> None:
    model = family.save(tmp_path, max_shard_size="60KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert_parity(model, tmp_path)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_tokens_whose_output_nobody_wants_are_known_to_later_ones(tmp_path: Path, family: Family) -> None:
    family.save(tmp_path)
    expected = Paged(tmp_path).prefill(PROMPT, 20)
    model = Paged(tmp_path)
    assert model.step(PROMPT[:20], []).shape == (0, expected.shape[1])
    assert difference(model.step(PROMPT[20:40], [19, 3]), expected[[39, 23]]) < TOLERANCE
    assert difference(model.step(PROMPT[40:]), expected[40:]) < TOLERANCE


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.without], ids=lambda family: family.name)
def test_what_is_special_matters_in_these_checkpoints(tmp_path: Path, family: Family) -> None:
    family.save(tmp_path)
    config = hf_config.load(tmp_path)
    expected = Paged(tmp_path).prefill(PROMPT, 64)
    for name, value in family.without.items():
        plain = msgspec.structs.replace(config, **{name: value})
        assert difference(Paged(tmp_path, MAX_MODEL_LEN, plain).prefill(PROMPT, 64), expected) > 300 * TOLERANCE, name


@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if f.name in ("mistral", "gemma2", "gemma3", "qwen3 moe")], ids=lambda f: f.name
)
def test_in_bfloat16_it_errs_no_more_than_transformers(tmp_path: Path, family: Family) -> None:
    exact = expected_logits(family.save(tmp_path), PROMPT)
    model_class = getattr(transformers, f"{family.prefix}ForCausalLM")
    model = model_class.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager")
    got = Paged(tmp_path, dtype=torch.bfloat16).prefill(PROMPT, 20)
    assert got.dtype == torch.bfloat16
    assert rms(got - exact) < 1.25 * rms(expected_logits(model, PROMPT) - exact)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_products_may_be_added_to_the_residual_at_once(family: Family, tmp_path: Path) -> None:
    """As on a GPU for many rows."""
    model = family.save(tmp_path)
    added: list[torch.Tensor] = []

    def linear_onto(x: torch.Tensor, packed: PackedWeight, residual: torch.Tensor) -> bool:
        added.append(residual)
        return reference.linear_onto(x, packed, residual)

    ops = replace(
        pagoda_kernels.for_device(torch.device("cpu")),
        pack_linear=reference.pack_linear,
        linear=reference.linear,
        silu_linear=silu_linear.silu_linear,
        linear_onto=linear_onto,
    )
    got = Paged(tmp_path, ops=ops).prefill(PROMPT, 32)
    assert difference(got, expected_logits(model, PROMPT)) < TOLERANCE
    assert bool(added) == (not family.name.startswith("gemma"))


def test_routing_waits_for_nobody_and_keeps_its_shapes() -> None:
    """What a CUDA graph needs: fake tensors raise where a value of the device would be read on the host."""
    config = MixtureConfig(num_experts=9, experts_per_token=3, intermediate_size=4, normalise=True, layers=())
    shape = cast(HFConfig, SimpleNamespace(hidden_size=8, activation="silu"))

    def product(x: torch.Tensor, weight: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        assert starts.shape == (10,)
        assert starts.dtype == torch.int32
        return x @ weight[0].T

    ops = replace(
        pagoda_kernels.for_device(torch.device("cpu")),
        pack_linear=reference.pack_linear,
        linear=reference.linear,
        grouped_linear=product,
    )
    with FakeTensorMode():
        layer = SparseMLP(shape, config, ops)
        layer.gate.prepare()
        assert layer(torch.empty(5, 8)).shape == (5, 8)
    order, starts = sort_by_expert(torch.tensor([3, 0, 8, 3, 0, 1]), 9)
    assert order.tolist() == [1, 4, 5, 0, 3, 2]
    assert starts.tolist() == [0, 2, 3, 3, 5, 5, 5, 5, 5, 6]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_model_can_be_cut_to_one_layer_of_each_kind(family: Family, tmp_path: Path) -> None:
    family.save(tmp_path)
    config = hf_config.load(tmp_path)
    model = models.build(config, pagoda_kernels.for_device(torch.device("cpu")))
    sparse = config.mixture.layers if config.mixture else (False,) * config.num_layers
    different = {(bool(w), s) for w, s in zip(config.layer_windows, sparse, strict=True)}
    with kinds.one_of_each(model):
        *others, last = model.model.layers
        assert len(others) == len(different)
    assert last is model.model.layers[-1]
    assert len(model.model.layers) == config.num_layers
