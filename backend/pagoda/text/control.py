"""Control tokens that a chat template wrote, told apart from the same words typed by a user.

A tokenizer turns `<|im_end|>` into a control token wherever it stands. In a chat only those of the template may become
one. So, when what a user sent could make one:

1. `Guard.mark` puts a private-use character, one that appears nowhere else, inside of every such place of the user's
   strings. A place is a whole control token, or a beginning of one at a string's end, or an end of one at its start:
   templates glue strings together.
2. The template renders the marked strings.
3. `Guard.encode` swaps the control tokens still whole, which only the template can have written, for stand-ins that
   nobody can guess, takes the marks out, and encodes the text in one piece with a twin of the tokenizer that knows the
   stand-ins instead of the control tokens. One piece, so that prefix spaces and merges fall as in any other text.

Other added tokens (`<think>`, runs of spaces) are ordinary text with an id of its own; they stay as they are. A control
token of a single character has no inside to mark; no model has one.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, pairwise
from typing import Any

import tokenizers

from pagoda.errors import InvalidRequest

_PRIVATE_USE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))


class Guard:
    """Marks users' strings and encodes chats rendered from them. `tokenizer` stays as it is; its model is shared."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        added = tokenizer.get_added_tokens_decoder()
        self._control = {
            token.content: token_id for token_id, token in added.items() if token.special and token.content
        }
        self._stand_ins = _stand_ins(self._control)
        self._twin = _twin(tokenizer, [added[token_id] for token_id in sorted(added)], self._stand_ins)
        self._ids = {self._twin_id(token.content): token_id for token_id, token in added.items()}
        unknown = getattr(tokenizer.model, "unk_token", None)
        self._forbidden = frozenset(token_id for text, token_id in self._control.items() if text != unknown)
        self._whole, self._starts = _patterns(self._control)
        self._heads = frozenset(text[:n] for text in self._control for n in range(1, len(text)))
        self._tails = frozenset(text[n:] for text in self._control for n in range(1, len(text)))
        self._first_chars = frozenset(text[0] for text in self._control)
        self._last_chars = frozenset(text[-1] for text in self._control)
        self._reach = max(1, max(map(len, self._control), default=1) - 1)

    def _twin_id(self, content: str) -> int | None:
        return self._twin.token_to_id(self._stand_ins.get(content, content))

    def needed(self, strings: Iterable[str]) -> bool:
        """Whether any of a user's `strings` could become a control token, or a part of one."""
        return any(next(self._places(text), None) is not None for text in set(strings))

    def _places(self, text: str) -> Iterator[int]:
        """Where marks go: indices into `text`, each between two characters of a control token."""
        starts = (match.start() + 1 for match in self._starts.finditer(text))
        return chain(starts, self._places_at_end(text), self._places_at_start(text))

    def _places_at_end(self, text: str) -> list[int]:
        """After the first character of each beginning of a control token that `text` ends with, whitespace aside."""
        stripped = text.rstrip()
        window = stripped[-self._reach :]
        if self._first_chars.isdisjoint(window):
            return []
        return [len(stripped) - n + 1 for n in range(1, len(window) + 1) if window[-n:] in self._heads]

    def _places_at_start(self, text: str) -> list[int]:
        """Before the last character of each end of a control token that `text` starts with, whitespace aside."""
        stripped = text.lstrip()
        window = stripped[: self._reach]
        if self._last_chars.isdisjoint(window):
            return []
        return [len(text) - len(stripped) + n - 1 for n in range(1, len(window) + 1) if window[:n] in self._tails]

    def mark(self, value: Any, marker: str) -> Any:
        """`value`, plain JSON, with `marker` in every place of its strings that needs one."""
        if isinstance(value, str):
            return _insert(value, sorted(set(self._places(value))), marker)
        if isinstance(value, Mapping):
            return {self.mark(key, marker): self.mark(item, marker) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.mark(item, marker) for item in value]
        return value

    def encode(self, rendered: str, marker: str) -> list[int]:
        """Ids of a chat rendered from marked strings. Ids of control tokens are only those that the template wrote."""
        swapped = self._whole.sub(lambda match: self._stand_ins[match[0]], rendered)
        encoding = self._twin.encode_batch_fast([swapped.replace(marker, "")], add_special_tokens=False)[0]
        return [known for token_id in encoding.ids for known in self._original(token_id)]

    def _original(self, token_id: int) -> list[int]:
        """The tokenizer's own id for one of its twin's; a control token that merges made of plain text, in pieces."""
        if token_id in self._ids:
            return [self._ids[token_id]]
        if token_id in self._forbidden:
            return [
                token.id for char in self._twin.id_to_token(token_id) or "" for token in self._twin.model.tokenize(char)
            ]
        return [token_id]


def unused_character(strings: Iterable[str]) -> str:
    """A private-use character that none of `strings` holds. Raises InvalidRequest when they hold all 137,468."""
    used = set(chain.from_iterable(strings))
    for code in chain(*_PRIVATE_USE):
        if chr(code) not in used:
            return chr(code)
    raise InvalidRequest("messages use every private-use character of Unicode. Remove some.", field="messages")


def _insert(text: str, places: list[int], marker: str) -> str:
    cuts = [0, *places, len(text)]
    return marker.join(text[start:end] for start, end in pairwise(cuts))


def _stand_ins(control: Mapping[str, int]) -> dict[str, str]:
    """A text for each control token that no user can send, because none can know it."""
    nonce = secrets.token_hex(8)
    return {text: f"\U000f0000{nonce}{token_id:x}\U000f0001" for text, token_id in control.items()}


def _twin(
    tokenizer: tokenizers.Tokenizer, added: list[tokenizers.AddedToken], stand_ins: Mapping[str, str]
) -> tokenizers.Tokenizer:
    """A tokenizer with the same model and added tokens, except that stand-ins take the control tokens' places."""
    twin = tokenizers.Tokenizer(tokenizer.model)
    if tokenizer.normalizer is not None:
        twin.normalizer = tokenizer.normalizer
    if tokenizer.pre_tokenizer is not None:
        twin.pre_tokenizer = tokenizer.pre_tokenizer
    twin.add_tokens([_renamed(token, stand_ins.get(token.content, token.content)) for token in added])
    return twin


def _renamed(token: tokenizers.AddedToken, content: str) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(
        content, lstrip=token.lstrip, rstrip=token.rstrip, normalized=token.normalized, special=token.special
    )


def _patterns(control: Iterable[str]) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Control tokens, the longest first; and the places where one starts, overlapping ones too."""
    tree = _Tree()
    for text in control:
        node = tree
        for char in text:
            node = node.setdefault(char, _Tree())
        node[""] = _Tree()
    pattern = _branches(tree) or "(?!)"
    return re.compile(pattern), re.compile(f"(?={pattern})")


class _Tree(dict[str, "_Tree"]):
    """Texts by their characters; "" where one ends."""


def _branches(tree: _Tree) -> str:
    """A pattern for the texts of `tree` that looks at each character once, however many texts (Llama 3 has 256)."""
    options = [re.escape(char) + _branches(rest) for char, rest in tree.items() if char]
    if len(options) == 1 and "" not in tree:
        return options[0]
    return f"(?:{'|'.join(options)})" + "?" * ("" in tree) if options else ""
