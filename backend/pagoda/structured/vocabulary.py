"""A model's vocabulary as llguidance has it, and matchers over it."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from pagoda.structured.limits import parser_limits

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer


class Vocabulary(msgspec.Struct, frozen=True):
    """Where to find it. `vocab_size` is the model's, which may be padded beyond the tokenizer's."""

    tokenizer_folder: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]

    def load(self) -> LLTokenizer:
        """Takes 0.3 s and 60 MB for 49,152 tokens. Raises ValueError for a tokenizer that llguidance cannot read."""
        from llguidance import LLTokenizer

        if not self.eos_token_ids:
            raise ValueError("the model names no end-of-text token, without which no structure can end")
        try:
            text = deaf_to_control_tokens((Path(self.tokenizer_folder) / "tokenizer.json").read_bytes())
        except (OSError, msgspec.MsgspecError, RecursionError):
            raise ValueError("the model's folder has no readable tokenizer.json") from None
        eos = list(self.eos_token_ids)
        try:
            return LLTokenizer(text, n_vocab=self.vocab_size, eos_token=eos)
        except ValueError:  # a few tokenizers have more tokens than their model has logits
            return LLTokenizer(text, eos_token=eos)


def deaf_to_control_tokens(tokenizer_json: bytes) -> str:
    """The same tokenizer with control tokens of other names, which no text can spell.

    llguidance tokenizes text that a grammar forces. By their own names it would take a control token for that text,
    which then does not match.
    """
    spec: dict[str, Any] = msgspec.json.decode(tokenizer_json)
    prefix = f"control-{secrets.token_hex(16)}-"
    names = {t["content"]: f"{prefix}{t['id']}" for t in spec.get("added_tokens") or () if t.get("special")}
    for token in spec.get("added_tokens") or ():
        token["content"] = names.get(token["content"], token["content"])
    model = spec.get("model") or {}
    pieces = model.get("vocab")
    if isinstance(pieces, dict):
        model["vocab"] = {names.get(piece, piece): number for piece, number in pieces.items()}
    elif isinstance(pieces, list):
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in pieces]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    return msgspec.json.encode(spec).decode()


def open_matcher(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """A matcher at the grammar's start. Lets other threads run. Raises ValueError with llguidance's own words."""
    from llguidance import LLMatcher

    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=parser_limits(tokenizer.vocab_size))
    if matcher.is_error():
        raise ValueError(matcher.get_error())
    return matcher


_PLAIN = {
    "NoExtensionBias": "no text can satisfy it",
    "too many expressions constructed": "it is too complex to follow",
    "too many states": "it is too complex to follow",
    "Too many items": "it is too ambiguous to follow",
    "consider making your grammar left-recursive": "it is too ambiguous to follow",
    "recursion limit exceeded": "it is nested too deeply",
    "unknown special token": "it names a control token: write text, which may look like one",
}
MAX_REASON_CHARS = 300


def reason(error: str) -> str:
    """llguidance's error in a line; positions and quotes of the grammar come after the first."""
    for part, plain in _PLAIN.items():
        if part in error:
            return plain
    told = error.partition("<non-verbose/>")[0]
    cause = next((line for line in told.splitlines() if line.startswith("error: ")), told.strip().partition("\n")[0])
    return (
        cause
        if len(cause) <= MAX_REASON_CHARS
        else f"{cause[: MAX_REASON_CHARS // 2]} … {cause[-MAX_REASON_CHARS // 2 :]}"
    )
