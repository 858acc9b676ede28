"""How many tokens a text needs at the least, known without tokenizing it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import tokenizers

from pagoda.text.decoding import byte_alphabet, byte_rules

_COMPOSING = frozenset({"NFC", "NFKC"})
_NEVER_SHORTER = frozenset({"NFD", "NFKD", "Prepend", "ByteLevel"})
_MOST_COMPOSED = 4
"""Code points that become one by composing, at most, and more than its bytes shrink (UAX #15, expansion factors)."""
_NOT_ASCII = bytes(range(0x80, 0x100))


class LowerBound:
    """Counts what must end up in some token, and divides by the most that one token holds.

    Counted are bytes for byte-level tokenizers, where bytes missing from the vocabulary vanish and do not count; and
    characters for SentencePiece with byte fallback. Whitespace does not count if added tokens swallow what is beside
    them. Where unknown characters vanish or become one token, or a normalizer may delete without limit, the bound is 0.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, vocabulary: Mapping[str, int]) -> None:
        added = tokenizer.get_added_tokens_decoder().values()
        rules = byte_rules(tokenizer.decoder)
        steps = _steps(tokenizer.normalizer)
        self._by_bytes = rules is not None and rules.byte_level
        self._unknown = bytes(byte for char, byte in byte_alphabet().items() if char not in vocabulary)
        self._drops_space = any(token.lstrip or token.rstrip for token in added)
        self._composes = any(step["type"] in _COMPOSING for step in steps)
        longest = max([1, *map(len, vocabulary), *(len(token.content.encode()) for token in added if self._by_bytes)])
        complete = self._by_bytes or (rules is not None and _falls_back(vocabulary))
        self._per_token = longest * math.prod(map(_shrink, steps)) if complete else 0

    def tokens(self, text: str) -> int:
        """At least so many tokens; 0 when nothing can be said. Milliseconds a megabyte."""
        if not self._per_token:
            return 0
        counted = "".join(text.split()) if self._drops_space else text
        return -(-self._size(counted) // self._per_token)

    def _size(self, text: str) -> int:
        """Bytes or characters that are left of `text` at the least when it has been composed."""
        known = text.encode("utf-8", "ignore").translate(None, self._unknown if self._by_bytes else b"")
        size = len(known) if self._by_bytes else len(text)
        if not self._composes:
            return size
        num_ascii = len(known.translate(None, _NOT_ASCII))
        alone = num_ascii - (len(text) - num_ascii)  # an ASCII character composes only with one that is not
        return max(-(-size // _MOST_COMPOSED), alone)


def _falls_back(vocabulary: Mapping[str, int]) -> bool:
    return all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))


def _steps(normalizer: Any) -> list[dict[str, Any]]:
    if normalizer is None:
        return []
    spec = json.loads(normalizer.__getstate__())
    return list(spec["normalizers"]) if spec["type"] == "Sequence" else [spec]


def _shrink(step: Mapping[str, Any]) -> int:
    """How many times shorter a normalizer can make a text, composing aside; 0 when there is no limit."""
    if step["type"] == "Replace":
        old = step["pattern"].get("String")
        return -(-len(old.encode()) // len(step["content"])) if old and step["content"] else 0
    return int(step["type"] in _COMPOSING | _NEVER_SHORTER)
