"""A tokenizer folder: what is read, what encoding accepts, the bound on tokens."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from pagoda.errors import CheckpointError, InvalidRequest
from pagoda.text.tokenizer import Tokenizer
from tokenizers import normalizers

TEXTS = [
    "Hello world",
    "",
    " a  b\n\nc\t",
    "日本語 🎉 e\u0301 👩‍👩‍👧‍👦",
    "<|im_end|>\nx<|im_start|>",
    "code: {x: 1}\n\n\n",
]


@pytest.mark.parametrize("add_special_tokens", [True, False])
@pytest.mark.parametrize("text", TEXTS)
def test_encodes_and_decodes_as_transformers(
    smol: Tokenizer, hf_smol: Any, text: str, add_special_tokens: bool
) -> None:
    ids = smol.encode(text, add_special_tokens=add_special_tokens)
    assert ids == hf_smol.encode(text, add_special_tokens=add_special_tokens)
    for skip in (True, False):
        assert smol.decode(ids, skip_special_tokens=skip) == hf_smol.decode(ids, skip_special_tokens=skip)


def test_attributes_are_those_of_transformers(smol: Tokenizer, hf_smol: Any) -> None:
    assert smol.vocab_size == len(hf_smol)
    assert (smol.bos_token_id, smol.eos_token_id) == (hf_smol.bos_token_id, hf_smol.eos_token_id)
    assert set(hf_smol.all_special_ids) <= smol.special_ids
    assert smol.special_tokens[:3] == ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    assert smol.max_token_chars == max(map(len, hf_smol.get_vocab()))


def copied(folder: Path, to: Path, **config: Any) -> Path:
    """A copy of a tokenizer folder with other entries in tokenizer_config.json."""
    shutil.copytree(folder, to)
    path = to / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return to


def test_a_folder_without_tokenizer_json_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json.*save_pretrained"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("content", ["{", "{}", "[]", "\x00"])
def test_a_broken_tokenizer_json(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match="cannot be read"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_broken_config(smol_folder: Path, tmp_path: Path, content: str) -> None:
    folder = copied(smol_folder, tmp_path / "copy")
    (folder / "tokenizer_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        Tokenizer.from_folder(folder)


def test_truncation_left_on_in_a_folder_is_off(smol: Tokenizer, tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_str(smol.backend.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer.from_folder(tmp_path).encode("one two three four five six")) == 6


def test_tokens_that_only_the_config_calls_special_are_control_tokens(smol_folder: Path, tmp_path: Path) -> None:
    config = {"eos_token": {"content": "Ġhello"}, "additional_special_tokens": ["Ġworld", "not in the vocabulary"]}
    tokenizer = Tokenizer.from_folder(copied(smol_folder, tmp_path / "copy", **config))
    assert tokenizer.eos_token_id == tokenizer.backend.token_to_id("Ġhello")
    assert {"Ġhello", "Ġworld"} <= set(tokenizer.special_tokens)
    assert tokenizer.vocab_size == 49152
    assert tokenizer.decode([tokenizer.eos_token_id or 0]) == ""


def test_special_tokens_map_counts_where_the_config_is_silent(smol_folder: Path, tmp_path: Path) -> None:
    folder = copied(smol_folder, tmp_path / "copy")
    (folder / "tokenizer_config.json").unlink()
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    assert Tokenizer.from_folder(folder).eos_token_id == 0


@pytest.mark.parametrize(
    ("entry", "prompt"),
    [
        ("from the config", "from the config"),
        ([{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "default"}], "default"),
    ],
    ids=["string", "named"],
)
def test_templates_of_the_config(smol_folder: Path, tmp_path: Path, entry: Any, prompt: str) -> None:
    folder = copied(smol_folder, tmp_path / "copy", chat_template=entry)
    (folder / "chat_template.jinja").unlink()
    assert Tokenizer.from_folder(folder).render_chat([]) == prompt


def test_the_templates_own_file_comes_first(smol_folder: Path, tmp_path: Path) -> None:
    folder = copied(smol_folder, tmp_path / "copy", chat_template="from the config")
    assert "SmolLM" in Tokenizer.from_folder(folder).render_chat([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("text", ["\ud83d", "ok \udc00 x", "\ud800\ud800", "\udfff" * 100])
@pytest.mark.parametrize("any_tokenizer", ["smol", "llama", "gemma", "t5"], indirect=True)
def test_lone_surrogates_are_refused(any_tokenizer: Tokenizer, text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"lone surrogate U\+D"):
        any_tokenizer.encode(text)
    with pytest.raises(InvalidRequest, match="lone surrogate"):
        any_tokenizer.encode_chat([{"role": "user", "content": text}])
    with pytest.raises(InvalidRequest, match="lone surrogate"):
        any_tokenizer.encode_chat([{"role": "user", "content": text + "".join(any_tokenizer.special_tokens)}])


@pytest.mark.parametrize("ids", [[], [10**9], [-1], [2**40], [0, 49151, 49152]])
def test_ids_outside_of_the_vocabulary_have_no_text(smol: Tokenizer, ids: list[int]) -> None:
    assert smol.decode(ids, skip_special_tokens=True) == smol.decode([n for n in ids if 0 <= n < 49152])


@pytest.mark.parametrize("any_tokenizer", ["smol", "llama", "gemma", "metaspace", "t5", "wordpiece"], indirect=True)
@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=200) | st.text(" \n\u00a0ab", max_size=200) | st.text("aé日🎉\x04", max_size=50))
def test_min_tokens_is_a_lower_bound(any_tokenizer: Tokenizer, text: str) -> None:
    assert any_tokenizer.min_tokens(text) <= len(any_tokenizer.encode(text, add_special_tokens=False))


@pytest.mark.parametrize("character", ["a", "日", " ", "\n", "!"])
def test_min_tokens_refuses_two_megabytes_for_a_short_context(smol: Tokenizer, character: str) -> None:
    start = time.thread_time()
    assert smol.min_tokens(character * 2_000_000) > 8192
    assert time.thread_time() - start < 0.5


def with_normalizer(smol: Tokenizer, normalizer: normalizers.Normalizer) -> Tokenizer:
    backend = tokenizers.Tokenizer(smol.backend.model)
    backend.pre_tokenizer, backend.decoder = smol.backend.pre_tokenizer, smol.backend.decoder
    backend.normalizer = normalizer
    return Tokenizer(backend, {})


@pytest.mark.parametrize(
    ("normalizer", "text"),
    [
        (normalizers.NFC(), "e\u0323\u0302" * 200),
        (normalizers.NFKC(), "\u1100\u1161\u11a8" * 200),
        (normalizers.Replace("xyz", "y"), "xyz" * 300),
        (normalizers.Replace(tokenizers.Regex(" +"), ""), " " * 1000),
        (normalizers.Strip(), " " * 1000),
        (normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]), "e\u0301" * 300),
    ],
    ids=["compose", "compose Hangul", "replace", "delete by regex", "strip", "strip accents"],
)
def test_min_tokens_knows_what_normalizers_take_away(
    smol: Tokenizer, normalizer: normalizers.Normalizer, text: str
) -> None:
    tokenizer = with_normalizer(smol, normalizer)
    assert tokenizer.min_tokens(text) <= len(tokenizer.encode(text))


def test_min_tokens_counts_what_cannot_compose_in_full(smol: Tokenizer) -> None:
    tokenizer = with_normalizer(smol, normalizers.NFC())
    assert tokenizer.min_tokens("a" * 2_000_000 + "\u0301") > 20_000


@settings(max_examples=100, deadline=None)
@given(text=st.text("ae\u0301\u0323\u0302é日 \n", max_size=60))
def test_min_tokens_is_a_lower_bound_when_composing(smol: Tokenizer, text: str) -> None:
    tokenizer = with_normalizer(smol, normalizers.NFC())
    assert tokenizer.min_tokens(text) <= len(tokenizer.encode(text))


def test_min_tokens_knows_tokens_that_swallow_space(smol: Tokenizer) -> None:
    tokenizer = with_normalizer(smol, normalizers.NFD())
    tokenizer.backend.add_special_tokens([tokenizers.AddedToken("<|user|>", rstrip=True)])
    swallowing = Tokenizer(tokenizer.backend, {})
    text = "<|user|>" + " " * 5000
    assert swallowing.min_tokens(text) <= len(swallowing.encode(text)) == 1


def test_encoding_lets_other_threads_run(smol: Tokenizer) -> None:
    text = "hello world " * 40_000
    worker = threading.Thread(target=smol.encode, args=(text,))
    worker.start()
    longest, last = 0.0, time.perf_counter()
    while worker.is_alive():
        time.sleep(0.001)
        longest, last = max(longest, time.perf_counter() - last), time.perf_counter()
    worker.join()
    assert longest < 0.1, f"another thread waited {longest:.3f} s"


def test_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, pagoda.text.tokenizer, pagoda.text.stream, pagoda.text.chat_template\n"
        "assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_token_bytes_tell_what_one_token_is(smol: Tokenizer, with_template: Callable[[str], Tokenizer]) -> None:
    table = smol.token_bytes()
    assert table is not None
    assert b"".join([table[token_id] for token_id in smol.encode("é 🎉")]) == "é 🎉".encode()
    assert table[2] == b"<|im_end|>"
    hidden = smol.token_bytes(skip_special_tokens=True)
    assert hidden is not None
    assert hidden[2] == b""
