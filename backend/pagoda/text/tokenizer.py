"""A Hugging Face tokenizer folder through the `tokenizers` library alone: text to ids, ids to text, chats to ids.

All long work happens in `tokenizers`' `encode_batch_fast`: unlike `encode`, it lets other threads run meanwhile and
keeps no offsets (half the time).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from pagoda.errors import CheckpointError, InvalidRequest
from pagoda.text.bound import LowerBound
from pagoda.text.chat_template import ChatTemplate, conversation, strings_of
from pagoda.text.control import Guard, unused_character
from pagoda.text.decoding import TokenBytes, byte_rules

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_NOT_FOR_REQUESTS = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "conversation", "chat_template", "tokenize", "padding"}
    | {"truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"}
    | {"continue_final_message", *_NAMED}
)


class Tokenizer:
    """A model's tokenizer. Safe to share between threads.

    Attributes:
        vocab_size: ids of the tokenizer, added tokens included. The model's own vocabulary may be padded beyond it.
        bos_token_id, eos_token_id: None when the folder names none.
        special_tokens, special_ids: the control tokens, in the order of their ids.
        max_token_chars: characters of the longest token.
        chat_template: None when the folder has none.
    """

    def __init__(self, backend: tokenizers.Tokenizer, named: Mapping[str, str], template: str | None = None) -> None:
        """`named` are the special tokens by the names that chat templates use: `{"eos_token": "</s>"}`."""
        self.backend = backend
        self._named = dict(named)
        added = backend.get_added_tokens_decoder()
        special = {token_id: added[token_id].content for token_id in sorted(added) if added[token_id].special}
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = len(vocabulary)
        self.max_token_chars = max(map(len, vocabulary), default=1)
        self.special_ids = frozenset(special)
        self.special_tokens = tuple(special.values())
        self.bos_token_id = self._id_of("bos_token")
        self.eos_token_id = self._id_of("eos_token")
        self.chat_template = ChatTemplate(template) if template is not None else None
        self._guard = Guard(backend)
        self._bound = LowerBound(backend, vocabulary)
        rules = byte_rules(backend.decoder)
        self._bytes = TokenBytes(backend, rules) if rules else None
        self._shown_bytes = TokenBytes(backend, rules, self.special_ids) if rules else None

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """The tokenizer of a model folder: tokenizer.json, tokenizer_config.json and what else is there of it.

        Raises CheckpointError, saying what to do, when the folder has no readable tokenizer.
        """
        folder = Path(path)
        config = _read_json(folder / "special_tokens_map.json") | _read_json(folder / "tokenizer_config.json")
        backend = _load(folder)
        named = _named_tokens(config)
        _make_special(backend, [*named.values(), *_extra_tokens(config)])
        return cls(backend, named, _template_source(folder, config))

    def _id_of(self, name: str) -> int | None:
        return self.backend.token_to_id(self._named[name]) if name in self._named else None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; control tokens written in it are control tokens, as completions want it.

        Lets other threads run: about 0.25 s a megabyte. Ask `min_tokens` first. Raises InvalidRequest for text that
        is not Unicode (lone surrogates), and nothing else.
        """
        _require_unicode(text)
        return self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`. Ids beyond the vocabulary have none; invalid bytes become U+FFFD (see decoding.py)."""
        table = self.token_bytes(skip_special_tokens=skip_special_tokens)
        if table is not None:
            return table.text(ids)
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, *, skip_special_tokens: bool = False) -> TokenBytes | None:
        """What each token stands for; None for the rare tokenizer whose tokens do not stand for bytes."""
        return self._shown_bytes if skip_special_tokens else self._bytes

    def min_tokens(self, text: str) -> int:
        """How many tokens `text` needs at the least, without tokenizing it (bound.py): milliseconds a megabyte."""
        return self._bound.tokens(text)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt that the model's chat template makes of `messages`, which are plain JSON values.

        Raises InvalidRequest for a model without a template, for inputs beyond the bounds of chat_template.py, and with
        the template's own words when it refuses them.
        """
        inputs, _ = self._chat_inputs(messages, tools, template_kwargs)
        return self._render(inputs, add_generation_prompt)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of `render_chat`'s prompt, in which control tokens are those of the template only.

        Raises InvalidRequest as `render_chat` and `encode` do.
        """
        inputs, strings = self._chat_inputs(messages, tools, template_kwargs)
        if not self._guard.needed(strings):
            return self.encode(self._render(inputs, add_generation_prompt), add_special_tokens=False)
        marker = unused_character([*strings, self._template.source, *self.special_tokens])
        rendered = self._render(self._guard.mark(inputs, marker), add_generation_prompt)
        _require_unicode(rendered)
        return self._guard.encode(rendered, marker)

    @property
    def _template(self) -> ChatTemplate:
        if self.chat_template is None:
            raise InvalidRequest(
                "This model has no chat template. Send the whole prompt to /v1/completions.", field="model"
            )
        return self.chat_template

    def _chat_inputs(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        template_kwargs: Mapping[str, Any] | None,
    ) -> tuple[dict[str, Any], list[str]]:
        """The template's variables that come from a user, and every string in them."""
        kwargs = dict(template_kwargs or {})
        _check_names(kwargs)
        inputs = {**kwargs, "messages": conversation(messages), "tools": list(tools) if tools else None}
        kwargs_strings = strings_of(kwargs, field="chat_template_kwargs")
        named = [strings_of(inputs[field], field=field) for field in ("messages", "tools")]
        return inputs, [*kwargs_strings, *named[0], *named[1]]

    def _render(self, inputs: Mapping[str, Any], add_generation_prompt: bool) -> str:
        return self._template.render(
            {**self._named, "documents": None, **inputs, "add_generation_prompt": add_generation_prompt}
        )


def _check_names(template_kwargs: Mapping[str, Any]) -> None:
    for name in template_kwargs:
        if name in _NOT_FOR_REQUESTS or not name.isidentifier() or name.startswith("_"):
            raise InvalidRequest(
                f"chat_template_kwargs cannot set {name[:80]!r}: only variables of the model's own template.",
                field="chat_template_kwargs",
            )


def _require_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"The text is not valid Unicode: a lone surrogate U+{ord(text[error.start]):04X} "
            f"at character {error.start}. Send surrogates in pairs, or the character itself."
        ) from None


def _load(folder: Path) -> tokenizers.Tokenizer:
    """tokenizer.json, with the truncation and padding that some folders left switched on taken out."""
    try:
        text = (folder / "tokenizer.json").read_text(encoding="utf-8")
        backend = tokenizers.Tokenizer.from_str(text)
    except FileNotFoundError as error:
        raise CheckpointError(
            "The model folder has no tokenizer.json. Make one with transformers: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
        ) from error
    except Exception as error:  # the library raises no narrower class
        raise CheckpointError(f"The model folder's tokenizer.json cannot be read: {error}. Copy it anew.") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when there is no file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise CheckpointError(f"The model folder's {path.name} is not valid JSON: {error}. Copy it anew.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"The model folder's {path.name} is not a JSON object. Copy it anew.")
    return content


def _content(token: Any) -> str | None:
    """The text of a token as configs write it: a string, or an object with `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by name, a model's own (`image_token`) included."""
    own = config.get("extra_special_tokens")
    pairs = {**{name: config.get(name) for name in _NAMED}, **(own if isinstance(own, dict) else {})}
    return {name: text for name, token in pairs.items() if (text := _content(token)) is not None}


def _extra_tokens(config: Mapping[str, Any]) -> list[str]:
    lists = [config.get("additional_special_tokens"), config.get("extra_special_tokens")]
    tokens = [_content(token) for extra in lists if isinstance(extra, list) for token in extra]
    return [token for token in tokens if token is not None]


def _make_special(backend: tokenizers.Tokenizer, tokens: Sequence[str]) -> None:
    """Make `tokens` control tokens, as transformers does; those the vocabulary lacks have no embedding and stay out."""
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    named = [token for token in tokens if token not in special and backend.token_to_id(token) is not None]
    backend.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in named])


def _template_source(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The default chat template: its own file before the config's entry."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    entry = config.get("chat_template")
    if isinstance(entry, list):
        entry = next((item.get("template") for item in entry if item.get("name") == "default"), None)
    return entry if isinstance(entry, str) else None
