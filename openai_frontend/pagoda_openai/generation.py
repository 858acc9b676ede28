"""From a checked request to text: prompts are encoded, sent through the model's session, and their deltas collected."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pagoda import sampling_params
from pagoda.client import Session
from pagoda.errors import InvalidRequest
from pagoda.protocol import ModelFacts, Usage
from pagoda.registry import Registry
from pagoda.sampling_params import SamplingParams
from pagoda.text.generation import Delta, deltas
from pagoda.text.stream import TextStream
from pagoda.text.tokenizer import Tokenizer
from starlette.requests import Request
from starlette.types import Receive

from pagoda_openai.settings import Settings
from pagoda_openai.sse import disconnected

T = TypeVar("T")

MAX_PROMPTS = 256
"""Prompts in one completion request."""
LONG_TEXT = 4096
"""Characters from which on text is tokenized beside the event loop."""


class ClientGone(Exception):
    """The client left before its answer began."""


class Frontend:
    """What the routes share: settings, models with their sessions, tokenizers."""

    def __init__(self, settings: Settings, registry: Registry) -> None:
        self.settings = settings
        self.registry = registry
        self.is_draining = False
        self._tokenizers: dict[str, Tokenizer] = {}

    async def tokenizer(self, facts: ModelFacts) -> Tokenizer:
        """The model's tokenizer, read once."""
        known = self._tokenizers.get(facts.folder)
        if known is None:
            known = await asyncio.to_thread(Tokenizer.from_folder, Path(facts.folder))
            self._tokenizers[facts.folder] = known
        return known


@dataclass(frozen=True, slots=True)
class Model:
    """A model that answers now."""

    session: Session
    facts: ModelFacts
    tokenizer: Tokenizer

    async def encode(self, text: str) -> list[int]:
        """A prompt's token ids. Raises InvalidRequest; a text far too long is refused before it is tokenized."""
        return await self._beside(len(text), self._encode, text)

    def _encode(self, text: str) -> list[int]:
        self._check_size(self.tokenizer.min_tokens(text))
        return self.tokenizer.encode(text)

    async def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """A conversation's token ids by the model's chat template. Raises InvalidRequest."""
        size = sum(len(m["content"]) for m in messages)
        for message in messages:
            self._check_size(self.tokenizer.min_tokens(message["content"]))
        return await self._beside(size, self.tokenizer.encode_chat, messages)

    async def _beside(self, size: int, encode: Callable[[T], list[int]], value: T) -> list[int]:
        return await asyncio.to_thread(encode, value) if size > LONG_TEXT else encode(value)

    def _check_size(self, at_least: int) -> None:
        limit = self.facts.max_model_len
        if at_least >= limit:
            raise InvalidRequest(
                f"the prompt has at least {at_least} tokens; the model's context of {limit} tokens is passed by "
                f"{at_least - limit} or more: shorten it",
                field="prompt",
            )

    def check(self, prompt_ids: list[int], params: SamplingParams) -> None:
        """Everything the engine would refuse, refused here. Raises InvalidRequest."""
        sampling_params.check(params, vocab_size=self.facts.vocab_size)
        sampling_params.check_prompt(prompt_ids, vocab_size=self.facts.vocab_size)
        sampling_params.check_length(len(prompt_ids), params, max_model_len=self.facts.max_model_len)


async def model_of(frontend: Frontend, name: str) -> Model:
    """Raises ModelNotFound or EngineUnavailable."""
    session = await frontend.registry.find(name)
    assert session.facts is not None
    return Model(session, session.facts, await frontend.tokenizer(session.facts))


class Generation:
    """The choices of one HTTP request, each a request of the engine's."""

    def __init__(
        self, model: Model, prompts: list[list[int]], params: SamplingParams, stops: tuple[str, ...], salt: str | None
    ) -> None:
        for prompt_ids in prompts:
            model.check(prompt_ids, params)
        self.created = int(time.time())
        self.id = secrets.token_hex(12)
        self.model = model.facts.name
        self._streams = [model.session.generate(ids, params, cache_salt=salt or "") for ids in prompts]
        self._texts = [TextStream(model.tokenizer, stops=stops, prompt_ids=ids) for ids in prompts]
        self._usages: dict[int, Usage] = {}

    @property
    def usages(self) -> list[Usage]:
        return [self._usages[i] for i in sorted(self._usages)]

    def abort(self, reason: str) -> None:
        """Nobody wants the rest."""
        for stream in self._streams:
            stream.abort("slow_client" if reason == "slow_client" else "client_gone")

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """(choice, delta) as they come; each choice's last has a finish reason. Raises what ended a request."""
        try:
            async for index, delta in _merge([deltas(s, t) for s, t in zip(self._streams, self._texts, strict=True)]):
                if delta.usage is not None:
                    self._usages[index] = delta.usage
                yield index, delta
        finally:
            self.abort("client_gone")  # does nothing for those that have ended

    async def whole(self) -> list[tuple[str, str]]:
        """(text, finish reason) of each choice."""
        texts = ["" for _ in self._streams]
        reasons = ["" for _ in self._streams]
        async for index, delta in self.deltas():
            texts[index] += delta.text
            reasons[index] = delta.finish_reason or reasons[index]
        return list(zip(texts, reasons, strict=True))


async def _merge(sources: list[AsyncIterator[Delta]]) -> AsyncIterator[tuple[int, Delta]]:
    """Items of several iterators as they come. One that raises ends all."""
    if len(sources) == 1:
        async for item in sources[0]:
            yield 0, item
        return
    pending = {asyncio.ensure_future(anext(source)): index for index, source in enumerate(sources)}
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=lambda t: pending[t]):
                index = pending.pop(task)
                try:
                    item = task.result()
                except StopAsyncIteration:
                    continue
                yield index, item
                pending[asyncio.ensure_future(anext(sources[index]))] = index
    finally:
        for task in pending:
            task.cancel()


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """The work's result. Raises ClientGone, and cancels the work, when the client leaves first."""
    receive: Receive = request.receive
    watch = asyncio.create_task(disconnected(receive))
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait((watch, task), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        watch.cancel()
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
