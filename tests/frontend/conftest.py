"""A small tokenizer's folder: byte-level, so that characters may be split, with a chat template and control tokens.

And an engine that knows few words of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from frontend.fake_engine import FakeEngine
from pagoda.text.decoding import byte_alphabet
from pagoda.text.tokenizer import Tokenizer
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

WORDS = ["Hello", "ĠParis", "Ġis", "ĠFrance", "The", "Ġbig"]
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant:{% endif %}"
)


def _backend() -> Backend:
    vocabulary = dict(byte_alphabet())
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                merges.append((word[: end - 1], word[end - 1]))
                vocabulary[word[:end]] = len(vocabulary)
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|start|>", special=True), AddedToken("<|end|>", special=True)])
    return backend


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    _backend().save(str(made / "tokenizer.json"))
    config = {"eos_token": "<|end|>", "chat_template": TEMPLATE}
    (made / "tokenizer_config.json").write_text(json.dumps(config))
    return made


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder)


@pytest.fixture
async def engine(folder: Path, tokenizer: Tokenizer) -> FakeEngine:
    """Answer i says "Hello", then i times " Paris"."""
    hello, paris = tokenizer.encode("Hello"), tokenizer.encode(" Paris")
    return FakeEngine(folder, tokenizer.vocab_size, lambda asked, index: hello + index * paris)
