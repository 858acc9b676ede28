"""config.json and generation_config.json in their published words, old and new."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pagoda import hf_config
from pagoda.errors import CheckpointError
from pagoda.hf_config import HFConfig
from pagoda.hf_rope import Dynamic, Linear, Llama3, LongRope, Yarn
from pagoda.sampling_params import SamplingParams

SIZES: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
}


def read(folder: Path, architecture: str, generation: dict[str, Any] | None = None, **said: Any) -> HFConfig:
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture], **SIZES, **said}))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return hf_config.load(folder)


def test_llama_2_is_silent_about_its_rotation(tmp_path: Path) -> None:
    config = read(tmp_path, "LlamaForCausalLM", rope_scaling=None, torch_dtype="float16")
    assert (config.rope.theta, config.rope.scaling, config.rope.size) == (10000.0, None, 16)
    assert (config.dtype, config.tie_word_embeddings, config.attention_scale) == ("float16", False, 0.25)


def test_llama_3_1(tmp_path: Path) -> None:
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    config = read(tmp_path, "LlamaForCausalLM", rope_theta=500000.0, rope_scaling=scaling)
    assert config.rope.theta == 500000.0
    assert config.rope.scaling == Llama3(8.0, 1.0, 4.0, 8192)


def test_context_lengths_follow_the_scaling(tmp_path: Path) -> None:
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    config = read(tmp_path, "Qwen2ForCausalLM", rope_scaling=yarn)
    assert config.rope.scaling == Yarn(4.0, 4096)
    assert config.max_position_embeddings == 16384
    config = read(tmp_path, "LlamaForCausalLM", rope_scaling={"type": "dynamic", "factor": 2.0})
    assert config.rope.scaling == Dynamic(2.0, 4096)
    assert config.max_position_embeddings == 8192
    config = read(tmp_path, "LlamaForCausalLM", rope_scaling={"type": "linear", "factor": 4}, max_sequence_length=16384)
    assert config.rope.scaling == Linear(4.0)
    assert config.max_position_embeddings == 16384


@pytest.mark.parametrize("kind", ["su", "longrope", "yarn"])
def test_phi_3_has_had_three_names_for_longrope(tmp_path: Path, kind: str) -> None:
    config = read(
        tmp_path,
        "Phi3ForCausalLM",
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        sliding_window=262144,
        partial_rotary_factor=0.75,
        rope_scaling={"type": kind, "short_factor": [1.0] * 6, "long_factor": [2.0] * 6},
    )
    assert config.rope.scaling == LongRope(32.0, 4096, (1.0,) * 6, (2.0,) * 6)
    assert config.rope.size == 12
    assert config.layer_windows == (262144,) * 4


def test_windows_by_family(tmp_path: Path) -> None:
    assert read(tmp_path, "MistralForCausalLM").layer_windows == (4096,) * 4
    assert read(tmp_path, "MistralForCausalLM", sliding_window=None).layer_windows == (0,) * 4
    qwen = {"sliding_window": 512, "max_window_layers": 1}
    assert read(tmp_path, "Qwen2ForCausalLM", **qwen).layer_windows == (0,) * 4
    assert read(tmp_path, "Qwen2ForCausalLM", **qwen, use_sliding_window=True).layer_windows == (0, 512, 512, 512)
    assert read(tmp_path, "Qwen3MoeForCausalLM", **qwen, use_sliding_window=True).layer_windows == (512,) * 4
    types = ["full_attention", "sliding_attention"] * 2
    assert read(tmp_path, "Gemma3ForCausalLM", layer_types=types, sliding_window=9).layer_windows == (0, 9, 0, 9)


def test_gemma_2_leaves_out_what_is_usual(tmp_path: Path) -> None:
    config = read(tmp_path, "Gemma2ForCausalLM", hidden_act="gelu_pytorch_tanh")
    assert config.tie_word_embeddings
    assert (config.attention_softcap, config.logit_softcap) == (50.0, 30.0)
    assert config.layer_windows == (4096, 0, 4096, 0)
    assert (config.head_dim, config.attention_scale, config.activation) == (256, 1 / 16, "gelu_tanh")
    assert config.local_rope is None


def test_gemma_3_in_its_old_words(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        "Gemma3ForCausalLM",
        hidden_activation="gelu_pytorch_tanh",
        num_hidden_layers=7,
        sliding_window=512,
        sliding_window_pattern=6,
        rope_theta=1000000.0,
        rope_local_base_freq=10000.0,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        query_pre_attn_scalar=144,
    )
    assert config.layer_windows == (512,) * 5 + (0, 512)
    assert (config.rope.theta, config.rope.scaling) == (1e6, Linear(8.0))
    assert config.local_rope is not None
    assert (config.local_rope.theta, config.local_rope.scaling) == (1e4, None)
    assert config.attention_scale == 1 / 12
    assert config.attention_softcap == config.logit_softcap == 0


def test_mixtures(tmp_path: Path) -> None:
    mixtral = read(tmp_path, "MixtralForCausalLM", num_local_experts=8, num_experts_per_tok=2).mixture
    assert mixtral is not None
    assert (mixtral.num_experts, mixtral.experts_per_token, mixtral.intermediate_size) == (8, 2, 128)
    assert mixtral.normalise
    assert mixtral.layers == (True,) * 4
    said = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 96, "decoder_sparse_step": 2}
    qwen = read(tmp_path, "Qwen3MoeForCausalLM", **said, mlp_only_layers=[1]).mixture
    assert qwen is not None
    assert (qwen.intermediate_size, qwen.normalise, qwen.layers) == (96, False, (False, False, False, True))


# ── generation_config.json ────────────────────────────────────────────────────────────────────────────────────────────


def test_recommended_sampling_and_stop_ids_are_taken(tmp_path: Path) -> None:
    generation = {
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
        "min_p": 0.05,
        "repetition_penalty": 1.05,
        "eos_token_id": [7, 9],
        "transformers_version": "4.40.0",
    }
    config = read(tmp_path, "Qwen2ForCausalLM", generation, eos_token_id=5)
    assert config.eos_token_ids == (5, 7, 9)
    assert config.default_params == SamplingParams(
        temperature=0.7, top_p=0.8, top_k=20, min_p=0.05, repetition_penalty=1.05
    )


def test_do_sample_false_recommends_the_likeliest_token(tmp_path: Path) -> None:
    generation = {"do_sample": False, "temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.1}
    config = read(tmp_path, "Qwen2ForCausalLM", generation)
    assert config.default_params == SamplingParams(temperature=0.0, repetition_penalty=1.1)


def test_a_file_without_recommendations_changes_nothing(tmp_path: Path) -> None:
    assert (
        read(tmp_path, "LlamaForCausalLM", {"eos_token_id": 2, "temperature": None}).default_params == SamplingParams()
    )


@pytest.mark.parametrize("generation", [{"top_p": 7.0}, {"temperature": "hot"}], ids=str)
def test_impossible_recommendations_are_told(tmp_path: Path, generation: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: .*{next(iter(generation))}"):
        read(tmp_path, "LlamaForCausalLM", generation)


# ── what cannot be ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        ({"hidden_act": "relu2"}, "hidden_act 'relu2' is not known; known ones: silu"),
        ({"rope_scaling": {"type": "mrope"}}, "rope_type 'mrope' is not known; known ones: default, linear"),
        ({"rope_scaling": {"type": "linear"}}, "missing required field `factor`"),
        ({"rope_scaling": {"type": "llama3", "factor": "x"}}, "factor"),
        ({"num_key_value_heads": 3}, "cannot share 3 key-value heads"),
        ({"vocab_size": 0}, "vocab_size must be at least 1, not 0"),
        ({"num_hidden_layers": "many"}, "many"),
        ({"use_bidirectional_attention": True}, "cannot continue it"),
        ({"layer_types": ["full_attention"]}, "layer_types names 1 layers, not 4"),
        ({"rope_parameters": 3}, r"config\.json"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_cannot_be_served_is_named(tmp_path: Path, said: dict[str, Any], complaint: str) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        read(tmp_path, "LlamaForCausalLM", **said)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "hidden_size": 64}))
    with pytest.raises(CheckpointError, match="lacks the key 'num_attention_heads'"):
        hf_config.load(tmp_path)
