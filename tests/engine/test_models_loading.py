"""Folders as they come: whole, in pieces, damaged, of another kind. What is wrong is named; no code of theirs runs."""

from __future__ import annotations

import json
import logging
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.parity import PROMPT, SHAPE, Paged, assert_parity, save
from pagoda import checkpoint, hf_config, weights
from pagoda.errors import CheckpointError
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path, LlamaConfig(**SHAPE), LlamaForCausalLM)
    return tmp_path


def change(folder: Path, tensors: dict[str, torch.Tensor | None]) -> None:
    """Replace, add or (None) remove tensors of the folder's one file."""
    file = folder / "model.safetensors"
    held = {**load_file(file), **tensors}
    save_file({name: tensor for name, tensor in held.items() if tensor is not None}, file)


def say(folder: Path, **changes: Any) -> None:
    """Change config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_every_trouble_is_named_at_once(folder: Path) -> None:
    layer = "model.layers.0."
    change(
        folder,
        {
            layer + "self_attn.k_proj.weight": None,
            **{f"{layer}extra.{i}": torch.zeros(1) for i in range(7)},
            layer + "mlp.up_proj.weight": torch.zeros(80, 47),
            layer + "mlp.gate_proj.weight": torch.zeros(80, 48, dtype=torch.int8),
        },
    )
    with pytest.raises(CheckpointError) as caught:
        Paged(folder)
    assert f"1 missing: {layer}self_attn.k_proj.weight;" in caught.value.message
    assert f"7 unexpected: {layer}extra.0, {layer}extra.1, {layer}extra.2" in caught.value.message
    assert f"{layer}extra.4 and 2 more;" in caught.value.message
    assert f"{layer}mlp.up_proj.weight (shape [80, 47], not [80, 48])" in caught.value.message
    assert f"{layer}mlp.gate_proj.weight (I8)" in caught.value.message


def test_nothing_is_read_of_a_folder_that_does_not_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change(folder, {"model.norm.weight": None})
    monkeypatch.setattr(weights, "safe_open", lambda *_, **__: pytest.fail("a tensor was read"))
    with pytest.raises(CheckpointError, match=r"1 missing: model\.norm\.weight"):
        Paged(folder)


def test_each_tensor_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = weights.safe_open

    class Counting:
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self.file = original(*arguments, **options)

        def __enter__(self) -> Counting:
            self.file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.file.__exit__(*error)

        def get_tensor(self, name: str) -> torch.Tensor:
            read.append(name)
            return self.file.get_tensor(name)

    monkeypatch.setattr(weights, "safe_open", Counting)
    Paged(folder)
    assert sorted(read) == sorted(load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("held", ["model.embed_tokens.weight", "lm_head.weight", "both"])
def test_a_tied_head_is_one_matrix_under_either_name(tmp_path: Path, held: str) -> None:
    model = save(tmp_path, LlamaConfig(**{**SHAPE, "tie_word_embeddings": True}), LlamaForCausalLM)
    matrix = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    if held == "both":
        change(tmp_path, {"lm_head.weight": matrix.clone()})
    elif held == "lm_head.weight":
        change(tmp_path, {"model.embed_tokens.weight": None, "lm_head.weight": matrix})
    assert_parity(model, tmp_path, chunks=(64,))


def test_an_untied_model_misses_its_head(folder: Path) -> None:
    change(folder, {"lm_head.weight": None})
    with pytest.raises(CheckpointError, match=r"1 missing: lm_head\.weight"):
        Paged(folder)


def test_tensors_that_are_computed_are_ignored(folder: Path) -> None:
    change(folder, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)})
    Paged(folder)


@pytest.mark.parametrize(("dtype", "on_disk"), [(torch.bfloat16, "BF16"), (torch.float16, "F16")], ids=str)
def test_another_dtype_on_disk_is_converted(tmp_path: Path, dtype: torch.dtype, on_disk: str) -> None:
    save(tmp_path, LlamaConfig(**SHAPE), LlamaForCausalLM).to(dtype).save_pretrained(tmp_path)
    assert hf_config.load(tmp_path).dtype == str(dtype).removeprefix("torch.")
    assert {tensor.dtype for tensor in checkpoint.headers(tmp_path).values()} == {on_disk}
    model = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    assert_parity(model, tmp_path, chunks=(64,))


# ── files ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("left", [0, 5, 300, -1])
def test_a_truncated_file_is_found_before_anything_is_read(folder: Path, left: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(CheckpointError, match=r"model\.safetensors .*download it again"):
        checkpoint.headers(folder)


@pytest.mark.parametrize("header", [b"[]", b"{", b'{"a": 1}', b'{"a": {"dtype": "F32"}}', b"[" * 100_000], ids=len)
def test_a_header_that_is_none_is_told(folder: Path, header: bytes) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError, match="no valid safetensors header"):
        checkpoint.headers(folder)


def test_a_git_lfs_pointer_is_told(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        Paged(folder)


@pytest.fixture
def pieces(tmp_path: Path) -> Path:
    save(tmp_path, LlamaConfig(**SHAPE), LlamaForCausalLM, max_shard_size="60KB")
    return tmp_path


def test_pieces_are_read_by_their_index(pieces: Path) -> None:
    assert len(checkpoint.files(pieces)) > 2
    (pieces / "consolidated.safetensors").write_bytes(b"not of this model")
    Paged(pieces)


def test_a_missing_piece_is_named(pieces: Path) -> None:
    first, *_ = sorted(pieces.glob("*.safetensors"))
    first.unlink()
    with pytest.raises(CheckpointError, match=first.name):
        Paged(pieces)


def test_an_index_points_at_nothing_outside_its_folder(pieces: Path) -> None:
    index = pieces / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    with pytest.raises(CheckpointError, match="names passwd, which is missing"):
        checkpoint.files(pieces)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="no index"):
        checkpoint.files(pieces)


def test_a_tensor_in_two_files_is_told(folder: Path) -> None:
    (folder / "b.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"is in a\.safetensors and in b\.safetensors"):
        Paged(folder)


def test_pickled_weights_are_never_opened(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled weights"):
        Paged(folder)


# ── what a folder asks for ────────────────────────────────────────────────────────────────────────────────────────────


def test_an_unknown_architecture_lists_the_known_ones(folder: Path) -> None:
    say(folder, architectures=["OtherForCausalLM"])
    with pytest.raises(CheckpointError, match=r"known ones: Gemma2ForCausalLM, .*Qwen3MoeForCausalLM$"):
        Paged(folder)


def test_code_in_the_folder_is_never_run(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "modeling_own.py").write_text("raise SystemExit('ran')")
    say(folder, auto_map={"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"})
    with caplog.at_level(logging.INFO, "pagoda.models"):
        Paged(folder).prefill(PROMPT, 64)
    assert "not run" in caplog.text
    say(folder, architectures=["OwnForCausalLM"])
    with pytest.raises(CheckpointError, match=r"auto_map\) is never run"):
        Paged(folder)


def test_quantised_weights_without_a_kernel_are_refused(folder: Path) -> None:
    say(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(CheckpointError, match=r"'bitsandbytes'.*unquantised"):
        hf_config.load(folder)


def test_reading_is_logged_where_no_terminal_shows_a_bar(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "LOG_INTERVAL", 0.0)
    with caplog.at_level(logging.INFO, "pagoda.weights"):
        Paged(folder)
    assert "GB read" in caplog.text
