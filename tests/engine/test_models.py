"""Each model family against transformers' own class: same weights, same logits, however tokens are cut into steps."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pagoda_kernels
import pytest
import torch
import transformers
from engine.parity import (
    MAX_MODEL_LEN,
    PROMPT,
    SHAPE,
    TOLERANCE,
    Paged,
    assert_parity,
    difference,
    expected_logits,
    save,
    steady,
)
from pagoda import hf_config, models
from pagoda.hf_config import HFConfig, MixtureConfig
from pagoda.models import kinds
from pagoda.models.mixture import SparseMLP, sort_by_expert
from pagoda_kernels.linear import PackedWeight, reference
from pagoda_kernels.silu_linear import reference as silu_linear
from torch._subclasses.fake_tensor import FakeTensorMode


@dataclass(frozen=True)
class Family:
    """A checkpoint that transformers can make. Windows and lengths are far below the 64 tokens that are compared."""

    name: str
    prefix: str
    """Of transformers' classes."""
    changes: dict[str, Any]
    without: dict[str, Any] = field(default_factory=dict)
    """Fields of HFConfig with values that take away what is special, each by itself."""

    def save(self, folder: Path, **options: Any) -> transformers.PreTrainedModel:
        config_class = getattr(transformers, f"{self.prefix.replace('Gemma3', 'Gemma3Text')}Config")
        return save(
            folder,
            config_class(**{**SHAPE, **self.changes}),
            getattr(transformers, f"{self.prefix}ForCausalLM"),
            **options,
        )


HEADS = {"head_dim": 16}
ALL_SEE_ALL = {"layer_windows": (0, 0, 0, 0)}
GEMMA = {**HEADS, "sliding_window": 16, "query_pre_attn_scalar": 24, "tie_word_embeddings": True}
ROTATED = 6
LONG = {
    "rope_type": "longrope",
    "short_factor": steady([1.0, 1.3, 2.1], ROTATED // 2),
    "long_factor": steady([1.5, 4.0, 9.0], ROTATED // 2),
}
MIXTURE = {"num_experts_per_tok": 3, "moe_intermediate_size": 24}

FAMILIES = (
    Family("mistral", "Mistral", {"sliding_window": 16}, ALL_SEE_ALL),
    Family("mistral without window, own head size", "Mistral", {"sliding_window": None, **HEADS}),
    Family("qwen2", "Qwen2", {}),
    Family("qwen2 tied", "Qwen2", {"tie_word_embeddings": True}),
    Family(
        "qwen2 with windows in the upper layers",
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
        {"layer_windows": (16, 16, 16, 16)},
    ),
    Family("qwen3", "Qwen3", HEADS),
    Family("qwen3 with biases", "Qwen3", {**HEADS, "attention_bias": True}),
    Family(
        "gemma2",
        "Gemma2",
        {**GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 1.0},
        {"attention_softcap": 0.0, "logit_softcap": 0.0, "attention_scale": 0.25, **ALL_SEE_ALL},
    ),
    Family("gemma2 without caps", "Gemma2", {**GEMMA, "attn_logit_softcapping": None, "final_logit_softcapping": None}),
    Family(
        "gemma3",
        "Gemma3",
        {
            **GEMMA,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        {"local_rope": None, "attention_scale": 0.25, **ALL_SEE_ALL},
    ),
    Family("phi3", "Phi3", {"sliding_window": 20}, ALL_SEE_ALL),
    Family(
        "phi3 longrope beyond the original context",
        "Phi3",
        {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 32, "rope_parameters": LONG},
    ),
    Family(
        "phi3 longrope within the original context",
        "Phi3",
        {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 128, "rope_parameters": LONG},
    ),
    Family("qwen3 moe", "Qwen3Moe", {**HEADS, **MIXTURE, "num_experts": 10, "norm_topk_prob": True}),
    Family(
        "qwen3 moe with plain layers, raw shares",
        "Qwen3Moe",
        {
            **HEADS,
            **MIXTURE,
            "num_experts": 7,
            "norm_topk_prob": False,
            "mlp_only_layers": [3],
            "decoder_sparse_step": 2,
        },
    ),
    Family("mixtral", "Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 24}, ALL_SEE_ALL),
)


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


def rms(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt())


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
