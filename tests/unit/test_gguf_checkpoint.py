"""GGUF to Hugging Face: the embedded model against transformers' own reading of it, and small files made here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pagoda.errors import CheckpointError, ConfigError
from pagoda.server.gguf_checkpoint import convert
from pagoda.server.store import check_folder, embedded_gguf

gguf = pytest.importorskip("gguf", reason="the converter needs the package gguf ([server])")
np = pytest.importorskip("numpy")
safetensors = pytest.importorskip("safetensors")

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, LAYERS = 4, 2, 8, 32, 2
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ Ġ", "l o", "lo w"]


def write_tiny_gguf(file: Path, *, tied: bool = True, **changes: Any) -> Path:
    """A two-layer Llama with random float32 weights. `changes` replaces metadata: architecture, pre, tensor, rope …"""
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(file, changes.get("architecture", "llama"))
    _write_metadata(writer, changes)
    for name, shape in _tiny_shapes(tied, changes.get("extra_tensor")).items():
        writer.add_tensor(name, random.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _write_metadata(writer: Any, changes: dict[str, Any]) -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = [*SPECIALS, *sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(48)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(changes.get("pre", "smollm"))
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIALS) + [1] * (len(tokens) - len(SPECIALS)))
    writer.add_token_merges(MERGES)
    if changes.get("eos", True):
        writer.add_eos_token_id(2)
    if "rope_scaling" in changes:
        writer.add_rope_scaling_type(changes["rope_scaling"])


def _tiny_shapes(tied: bool, extra_tensor: str | None) -> dict[str, tuple[int, ...]]:
    vocab = len(SPECIALS) + 256 + len(MERGES)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocab, HIDDEN), "output_norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        shapes |= {f"{block}.{norm}.weight": (HIDDEN,) for norm in ("attn_norm", "ffn_norm")}
        shapes |= {f"{block}.attn_{name}.weight": (HEADS * HEAD_DIM, HIDDEN) for name in ("q", "output")}
        shapes |= {f"{block}.attn_{name}.weight": (KV_HEADS * HEAD_DIM, HIDDEN) for name in ("k", "v")}
        shapes |= {f"{block}.ffn_{name}.weight": (48, HIDDEN) for name in ("gate", "up")}
        shapes[f"{block}.ffn_down.weight"] = (HIDDEN, 48)
    if not tied:
        shapes["output.weight"] = (vocab, HIDDEN)
    if extra_tensor:
        shapes[extra_tensor] = (4,)
    return shapes


def read_weights(folder: Path) -> dict[str, Any]:
    with safetensors.safe_open(folder / "model.safetensors", "np") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping


def read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


# The embedded model


@pytest.fixture(scope="module")
def embedded() -> Path:
    try:
        return embedded_gguf()
    except ConfigError as error:
        pytest.skip(error.message)


@pytest.fixture(scope="module")
def converted(embedded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store") / "smollm2"
    convert(embedded, folder)
    return folder


@pytest.fixture(scope="module")
def transformers() -> Any:
    pytest.importorskip("torch")
    return pytest.importorskip("transformers")


def test_the_folder_is_complete_and_describes_smollm2(converted: Path) -> None:
    assert check_folder(converted) == []
    config = read_json(converted / "config.json")
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "rope_theta": 100000.0,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }
    assert {key: config[key] for key in expected} == expected
    assert read_json(converted / "generation_config.json")["eos_token_id"] == 2


def test_every_weight_and_logit_equals_what_transformers_reads(
    embedded: Path, converted: Path, transformers: Any
) -> None:
    pytest.importorskip("accelerate")
    import torch

    load = transformers.AutoModelForCausalLM.from_pretrained
    ours = load(converted, dtype=torch.float32)
    theirs = load(embedded.parent, gguf_file=embedded.name, config=ours.config, dtype=torch.float32)
    expected, weights = theirs.state_dict(), ours.state_dict()
    assert weights.keys() == expected.keys()
    assert [name for name in weights if not torch.equal(weights[name], expected[name])] == []

    prompt = torch.tensor([[504, 3575, 282, 4649, 314]])
    with torch.inference_mode():
        assert torch.equal(ours(prompt).logits, theirs(prompt).logits)
    _assert_knows_the_capital(ours, transformers.AutoTokenizer.from_pretrained(converted))


def _assert_knows_the_capital(model: Any, tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, do_sample=False, max_new_tokens=20)
    answer = tokenizer.decode(output[0][prompt["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


def test_special_tokens_are_atoms_and_nothing_is_put_before_the_text(converted: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(converted / "tokenizer.json"))
    ids = tokenizer.encode("<|im_start|>user\nHi<|im_end|>\n").ids
    assert ids == [1, 4093, 198, 26843, 2, 198]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\nHi\n"
    assert tokenizer.encode("").ids == []
    added = tokenizer.get_added_tokens_decoder()
    assert sorted(added) == list(range(17))
    assert all(token.special and not token.normalized for token in added.values())


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Hello 1234", ["Hello", "Ġ", "1", "2", "3", "4"]),
        ("a  1", ["a", "ĠĠ", "1"]),  # without the digit split: "Ġ", "Ġ", "1"
        ("x²", ["x", "Â²"]),
    ],
    ids=["one by one", "after two spaces", "superscript"],
)
def test_digits_are_split_off_before_words(converted: Path, text: str, tokens: list[str]) -> None:
    from tokenizers import Tokenizer

    encoding = Tokenizer.from_file(str(converted / "tokenizer.json")).encode(text)
    assert encoding.tokens == tokens


def test_the_pre_tokenizer_is_the_published_one(converted: Path) -> None:
    tokenizer = read_json(converted / "tokenizer.json")
    words = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    assert tokenizer["pre_tokenizer"] == {"type": "Sequence", "pretokenizers": [digits, words]}
    assert tokenizer["normalizer"] is None
    assert tokenizer["post_processor"] is None


def test_transformers_reads_the_same_tokenizer_and_template(converted: Path, transformers: Any) -> None:
    from tokenizers import Tokenizer

    theirs = transformers.AutoTokenizer.from_pretrained(converted)
    ours = Tokenizer.from_file(str(converted / "tokenizer.json"))
    text = "Zürich, 3.14 €  42\n\n<|im_start|>don't 再见 🏯"
    assert theirs(text).input_ids == ours.encode(text).ids
    assert ours.decode(ours.encode(text).ids, skip_special_tokens=False) == text
    assert (theirs.eos_token, theirs.eos_token_id, theirs.bos_token_id) == ("<|im_end|>", 2, 1)
    chat = [{"role": "user", "content": "Hi"}]
    rendered = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


# Small files


def test_queries_and_keys_are_unpermuted_and_the_rest_is_kept(tmp_path: Path) -> None:
    source = write_tiny_gguf(tmp_path / "tiny.gguf")
    convert(source, tmp_path / "tiny")
    weights = read_weights(tmp_path / "tiny")
    given = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(source).tensors}

    for part, heads in (("q", HEADS), ("k", KV_HEADS)):
        restored = weights[f"model.layers.1.self_attn.{part}_proj.weight"]
        assert np.array_equal(_permuted_as_llama_cpp_does(restored, heads), given[f"blk.1.attn_{part}.weight"])
    assert np.array_equal(weights["model.layers.1.self_attn.v_proj.weight"], given["blk.1.attn_v.weight"])
    assert np.array_equal(weights["model.layers.0.mlp.down_proj.weight"], given["blk.0.ffn_down.weight"])
    assert len(weights) == len(given)


def _permuted_as_llama_cpp_does(weight: Any, num_heads: int) -> Any:
    """convert_hf_to_gguf.py, LlamaModel.permute."""
    split = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return split.swapaxes(1, 2).reshape(weight.shape)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "head of its own"])
def test_embeddings_are_tied_when_there_is_no_output_weight(tmp_path: Path, tied: bool) -> None:
    convert(write_tiny_gguf(tmp_path / "tiny.gguf", tied=tied), tmp_path / "tiny")
    assert read_json(tmp_path / "tiny" / "config.json")["tie_word_embeddings"] is tied
    assert ("lm_head.weight" in read_weights(tmp_path / "tiny")) is not tied


def test_progress_counts_bytes_up_to_the_total(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    source = write_tiny_gguf(tmp_path / "tiny.gguf")
    convert(source, tmp_path / "tiny", progress=lambda done, total: seen.append((done, total)))
    total = sum(weight.nbytes for weight in read_weights(tmp_path / "tiny").values())
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architecture": "qwen2"}, "supported here: llama"),
        ({"pre": "llama-bpe"}, "supported here: smollm"),
        ({"rope_scaling": gguf.RopeScalingType.YARN}, "llama.rope.scaling.type = yarn"),
        ({"extra_tensor": "rope_freqs.weight"}, "rope_freqs.weight"),
        ({"extra_tensor": "blk.0.attn_q.bias"}, "blk.0.attn_q.bias"),
        ({"eos": False}, "tokenizer.ggml.eos_token_id"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_would_be_lost_is_refused(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    source = write_tiny_gguf(tmp_path / "tiny.gguf", **changes)
    with pytest.raises(CheckpointError, match=named):
        convert(source, tmp_path / "models" / "tiny")
    assert list((tmp_path / "models").glob("*")) == []


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a GGUF file at all, but long enough to be read as one"])
def test_a_file_that_is_no_gguf_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "broken.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"broken\.gguf"):
        convert(tmp_path / "broken.gguf", tmp_path / "broken")


def test_a_truncated_gguf_is_named(tmp_path: Path) -> None:
    source = write_tiny_gguf(tmp_path / "tiny.gguf")
    whole = source.read_bytes()
    for length in (24, 100, len(whole) // 3, len(whole) - 4):
        source.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"tiny\.gguf"):
            convert(source, tmp_path / "models" / "tiny")


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    source = write_tiny_gguf(tmp_path / "tiny.gguf")
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "models" / "tiny", progress=interrupt)
    assert list((tmp_path / "models").iterdir()) == []


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        convert(write_tiny_gguf(tmp_path / "tiny.gguf"), tmp_path / "taken")
    assert list((tmp_path / "taken").iterdir()) == []


def test_importing_the_module_loads_nothing_heavy() -> None:
    heavy = "'torch', 'transformers', 'gguf', 'numpy'"
    code = f"import sys, pagoda.server.gguf_checkpoint; print([m for m in ({heavy}) if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
