"""What a token stands for, and how the bytes of many become text.

In both families that language models use, a token stands for the same bytes wherever it appears, so decoding is
concatenation and UTF-8, and streaming is the same with the incomplete last character held back:

* byte-level BPE (GPT-2 and all after it): each character of a token names one byte;
* SentencePiece with byte fallback (Llama 2, Mistral, Gemma, Phi-3): `▁` is a space, `<0xE4>` a byte, the rest is text.

They differ in what an invalid byte becomes. Byte-level: one U+FFFD for each maximal invalid part, as in Rust's and
Python's own decoders. SentencePiece: one for each invalid byte. The `tokenizers` library's ByteFallback goes further:
one invalid byte turns its whole run of byte tokens into U+FFFD, characters shown long ago and newlines included. No
decoder that shows text as it comes can follow. SentencePiece itself keeps valid characters, and so does this module.

Any other decoder (WordPiece, CTC, Metaspace, ...) is not `TokenBytes`' business: `byte_rules` answers None.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import tokenizers

REPLACEMENT = "\ufffd"
_PER_BYTE = "pagoda.replace_each_byte"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return REPLACEMENT * (error.end - error.start), error.end


codecs.register_error(_PER_BYTE, _replace_each_byte)


def byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: the character that names each of the 256 bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


@dataclass(frozen=True)
class ByteRules:
    """How one family decodes: `to_bytes` of a token's string, the codec's error handler, the prefix to strip once."""

    byte_level: bool
    to_bytes: Callable[[str], bytes]
    errors: str
    strip: bytes = b""


def byte_rules(decoder: Any) -> ByteRules | None:
    """The rules of a `tokenizers` decoder; None when tokens of its family do not stand for bytes."""
    if decoder is None:
        return None
    spec = json.loads(decoder.__getstate__())
    steps = spec["decoders"] if spec["type"] == "Sequence" else [spec]
    if [step["type"] for step in steps] == ["ByteLevel"]:
        return ByteRules(True, _byte_level(), "replace")
    return _sentencepiece(steps)


def _byte_level() -> Callable[[str], bytes]:
    alphabet = byte_alphabet()

    def to_bytes(token: str) -> bytes:
        try:
            return bytes([alphabet[char] for char in token])
        except KeyError:  # an added token written in plain text
            return token.encode()

    return to_bytes


def _sentencepiece(steps: list[dict[str, Any]]) -> ByteRules | None:
    """Rules for Replace*, ByteFallback, Fuse and perhaps Strip of one leading character; None for anything else."""
    replaces = [step for step in steps if step["type"] == "Replace"]
    rest = steps[len(replaces) :]
    if steps[: len(replaces)] != replaces or [step["type"] for step in rest[:2]] != ["ByteFallback", "Fuse"]:
        return None
    pairs = [(step["pattern"].get("String"), step["content"]) for step in replaces]
    strip = _strip_prefix(rest[2:])
    if strip is None or any(not old for old, _ in pairs):
        return None
    return ByteRules(False, _pieces(pairs), _PER_BYTE, strip)


def _strip_prefix(steps: list[dict[str, Any]]) -> bytes | None:
    if not steps:
        return b""
    step = steps[0]
    known = len(steps) == 1 and step["type"] == "Strip" and (step["start"], step["stop"]) == (1, 0)
    known = known and step["content"].isascii()
    return str(step["content"]).encode() if known else None


def _pieces(pairs: list[tuple[str, str]]) -> Callable[[str], bytes]:
    def to_bytes(token: str) -> bytes:
        for old, new in pairs:
            token = token.replace(old, new)
        byte = _BYTE_TOKEN.fullmatch(token)
        return bytes.fromhex(byte[1]) if byte else token.encode()

    return to_bytes


class TokenBytes(dict[int, bytes]):
    """Token id to the bytes it stands for, filled as ids are seen: at most one entry for each id of the vocabulary.

    Ids in `hidden`, and ids that the vocabulary does not have, stand for nothing.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, rules: ByteRules, hidden: Iterable[int] = ()) -> None:
        super().__init__(dict.fromkeys(hidden, b""))
        self._string_of = tokenizer.id_to_token
        self.rules = rules

    def __missing__(self, token_id: int) -> bytes:
        token = self._string_of(token_id) if 0 <= token_id < 2**32 else None
        if token is None:
            return b""
        data = self[token_id] = self.rules.to_bytes(token)
        return data

    def join(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`, nothing stripped."""
        return b"".join([self[token_id] for token_id in ids])

    def text(self, ids: Iterable[int]) -> str:
        """The text of `ids` from the very beginning, as one-shot decoding gives it."""
        return self.join(ids).removeprefix(self.rules.strip).decode("utf-8", self.rules.errors)
