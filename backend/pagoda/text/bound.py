"""How many tokens a text needs at the least, known without tokenizing it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import tokenizers

from pagoda.text.decoding import byte_alphabet, byte_rules

# How much shorter each normalizer can make a text. A composed character is canonically at most four code points, and at
# most three times its bytes (UAX #15, maximum expansion factors), so composing leaves a quarter at least; the others
# never shorten a text.
_SHRINKS = {"NFC": 4, "NFKC": 4, "NFD": 1, "NFKD": 1, "Prepend": 1, "ByteLevel": 1}


class LowerBound:
    """Counts what must end up in some token, and divides by the most that one token holds.

    Counted are bytes for byte-level tokenizers, where bytes missing from the vocabulary vanish and do not count; and
    characters for SentencePiece with byte fallback. Whitespace does not count if added tokens swallow what is beside
    them. Where unknown characters vanish or become one token, or a normalizer may delete without limit, the bound is 0.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, vocabulary: Mapping[str, int]) -> None:
        added = tokenizer.get_added_tokens_decoder().values()
        self._longest = max([1, *map(len, vocabulary), *(len(token.content.encode()) for token in added)])
        self._drops_space = any(token.lstrip or token.rstrip for token in added)
        self._shrink = _shrink(tokenizer.normalizer)
        alphabet = byte_alphabet()
        rules = byte_rules(tokenizer.decoder)
        self._by_bytes = rules is not None and rules.byte_level
        self._unknown = bytes(byte for char, byte in alphabet.items() if char not in vocabulary)
        if not self._by_bytes and not (rules and _falls_back(vocabulary)):
            self._shrink = 0

    def tokens(self, text: str) -> int:
        """At least so many tokens; 0 when nothing can be said. Milliseconds a megabyte."""
        if not self._shrink:
            return 0
        counted = "".join(text.split()) if self._drops_space else text
        size = len(self._known_bytes(counted)) if self._by_bytes else len(counted)
        return -(-size // (self._shrink * self._longest))

    def _known_bytes(self, text: str) -> bytes:
        return text.encode("utf-8", "ignore").translate(None, self._unknown)


def _falls_back(vocabulary: Mapping[str, int]) -> bool:
    return all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))


def _shrink(normalizer: Any) -> int:
    """How many times shorter the normalizer can make a text; 0 when there is no limit."""
    if normalizer is None:
        return 1
    spec = json.loads(normalizer.__getstate__())
    return math.prod(map(_step_shrink, spec["normalizers"] if spec["type"] == "Sequence" else [spec]))


def _step_shrink(step: Mapping[str, Any]) -> int:
    if step["type"] == "Replace":
        old = step["pattern"].get("String")
        return -(-len(old.encode()) // len(step["content"])) if old and step["content"] else 0
    return _SHRINKS.get(step["type"], 0)
