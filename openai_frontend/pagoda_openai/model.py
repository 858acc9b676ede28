"""The models a frontend serves: their sessions, their tokenizers, and prompts made for them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from pagoda import sampling_params
from pagoda.client import Session
from pagoda.errors import InvalidRequest
from pagoda.protocol import ModelFacts
from pagoda.registry import Registry
from pagoda.sampling_params import SamplingParams
from pagoda.text.tokenizer import Tokenizer

from pagoda_openai.settings import Settings

T = TypeVar("T")
log = logging.getLogger("pagoda.frontend")

LONG_TEXT = 4096
"""Characters from which on text is tokenized beside the event loop."""
READ_AHEAD_INTERVAL = 0.2
"""Seconds between two looks for models whose tokenizer has not been read."""


class Frontend:
    """What the routes share: settings, models with their sessions, tokenizers."""

    def __init__(self, settings: Settings, registry: Registry) -> None:
        self.settings = settings
        self.registry = registry
        self.is_draining = False
        self._tokenizers: dict[str, asyncio.Future[Tokenizer]] = {}

    async def tokenizer(self, facts: ModelFacts) -> Tokenizer:
        """The model's tokenizer, read once, however many requests ask for it at the same moment."""
        reading = self._tokenizers.get(facts.folder)
        if reading is None or (reading.done() and reading.exception() is not None):
            reading = asyncio.ensure_future(asyncio.to_thread(Tokenizer.from_folder, Path(facts.folder)))
            self._tokenizers[facts.folder] = reading
        return await asyncio.shield(reading)  # a client that leaves must not take it from the others

    async def read_ahead(self) -> None:
        """For life: read each model's tokenizer once it serves, so that no request waits for it.

        One that cannot be read is tried again by the model's requests, which get the reason.
        """
        while True:
            for _, entry in self.registry:
                facts = entry.session.facts
                if facts is not None and facts.folder not in self._tokenizers:
                    try:
                        await self.tokenizer(facts)
                    except Exception as error:  # the loop goes on for the other models
                        log.warning("the tokenizer of model %s cannot be read: %s", facts.name, error)
            await asyncio.sleep(READ_AHEAD_INTERVAL)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as the engine takes it, and as the client wrote it where that was text."""

    ids: list[int]
    text: str | None = None
    field: str = "prompt"
    """The request's field that it came in."""

    def last(self, count: int | None) -> Prompt:
        """Its last `count` tokens; all for None. Raises InvalidRequest for a count below 1."""
        if count is None:
            return self
        if count < 1:
            raise InvalidRequest(
                f"truncate_prompt_tokens must be at least 1, not {count}", field="truncate_prompt_tokens"
            )
        return self if count >= len(self.ids) else replace(self, ids=self.ids[-count:], text=None)


@dataclass(frozen=True, slots=True)
class Model:
    """A model that answers now."""

    session: Session
    facts: ModelFacts
    tokenizer: Tokenizer

    async def encode(self, text: str, keep: int | None = None) -> Prompt:
        """The last `keep` tokens of a prompt, or all.

        Raises InvalidRequest; a text far too long is refused before it is tokenized.
        """
        ids = await self._beside(len(text), self.tokenizer.encode if keep else self._encode, text)
        return Prompt(ids, text).last(keep)

    def _encode(self, text: str) -> list[int]:
        self._check_size(self.tokenizer.min_tokens(text), "prompt")
        return self.tokenizer.encode(text)

    async def encode_chat(self, messages: list[dict[str, str]], keep: int | None = None) -> Prompt:
        """A conversation by the model's chat template, or its last `keep` tokens. Raises InvalidRequest."""
        size = sum(len(m["content"]) for m in messages)
        for message in messages if keep is None else []:
            self._check_size(self.tokenizer.min_tokens(message["content"]), "messages")
        ids = await self._beside(size, self.tokenizer.encode_chat, messages)
        return Prompt(ids, field="messages").last(keep)

    async def _beside(self, size: int, encode: Callable[[T], list[int]], value: T) -> list[int]:
        return await asyncio.to_thread(encode, value) if size > LONG_TEXT else encode(value)

    def _check_size(self, at_least: int, field: str) -> None:
        sampling_params.check_least_length(at_least, max_model_len=self.facts.max_model_len, field=field)

    def shown(self, prompt: Prompt) -> str:
        """The prompt's text: as the client wrote it, else as its tokens read, control tokens and all."""
        return self.tokenizer.decode(prompt.ids, skip_special_tokens=False) if prompt.text is None else prompt.text

    def check(self, prompt: Prompt, params: SamplingParams) -> None:
        """Every rule of the engine's about prompt and parameters, applied here. Raises InvalidRequest."""
        sampling_params.check(params, vocab_size=self.facts.vocab_size)
        sampling_params.check_prompt(prompt.ids, vocab_size=self.facts.vocab_size)
        limit = self.facts.max_model_len
        sampling_params.check_length(len(prompt.ids), params, max_model_len=limit, field=prompt.field)


async def model_of(frontend: Frontend, name: str) -> Model:
    """Raises ModelNotFound or EngineUnavailable."""
    session = await frontend.registry.find(name)
    assert session.facts is not None
    return Model(session, session.facts, await frontend.tokenizer(session.facts))
