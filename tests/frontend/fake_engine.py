"""A fake engine behind a real session: what a test's script says comes back over the real wire types.

The application, its routes and the session are the real ones; requests enter by HTTP.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
from fastapi import FastAPI
from pagoda import protocol as wire
from pagoda.client import Session
from pagoda.errors import ModelNotFound
from pagoda.registry import Entry
from pagoda.sampling_params import SamplingParams
from pagoda_openai.app import create_app
from pagoda_openai.settings import Settings

MODEL = "fake"

Script = Callable[[wire.Generate, int], list[int]]
"""The output tokens of answer i to a request."""


class FakeEngine:
    """Takes frames and answers `Generate` with the script's tokens, `burst` of them in each payload.

    Every token has the log-probability `logprob_of(token)`; its alternatives are the ids 0, 1, 2, … A token of
    `eos_token_ids` ends an answer by `stop`, the script's end by `length`; an empty script says nothing.
    """

    def __init__(
        self, folder: Path, vocab_size: int, script: Script, *, eos: tuple[int, ...] = (), burst: int = 1
    ) -> None:
        self.facts = wire.ModelFacts(
            name=MODEL,
            folder=str(folder),
            max_model_len=512,
            vocab_size=vocab_size,
            eos_token_ids=eos,
            default_params=SamplingParams(),
        )
        self.generates: list[wire.Generate] = []
        self.aborts: list[wire.Abort] = []
        self.session = Session("test", self._take)
        self._script = script
        self._burst = burst
        self._tasks: list[asyncio.Task[None]] = []

    def app(self) -> FastAPI:
        """The real application whose only model is this engine."""
        made = create_app(Settings(triton_address="127.0.0.1:1"))
        made.state.frontend.registry = _OneModel(self.session)
        self.session.open()
        return made

    async def post(self, path: str, **fields: Any) -> httpx.Response:
        """One request to the application; a stream is read to its end."""
        return await self.post_raw(path, json.dumps({"model": MODEL, **fields}).encode())

    async def post_raw(self, path: str, body: bytes) -> httpx.Response:
        transport = httpx.ASGITransport(self.app())
        async with httpx.AsyncClient(transport=transport, base_url="http://pagoda") as client:
            return await client.post(path, content=body)

    async def events(self, path: str, **fields: Any) -> list[dict[str, Any]]:
        """The events of a stream, which ends by [DONE]."""
        answer = await self.post(path, stream=True, **fields)
        assert answer.status_code == 200, answer.text
        lines = [line.removeprefix("data: ") for line in answer.text.split("\n") if line]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]

    def feed(self, message: wire.EngineMessage) -> None:
        self.session.feed(wire.encode([message]))

    def _take(self, frame: wire.Frame) -> None:
        for message in wire.decode_frame(wire.encode(frame)).messages:
            match message:
                case wire.Open():
                    self.feed(wire.Ready(self.facts, 1))
                case wire.Generate():
                    self.generates.append(message)
                    for index in range(message.n):
                        self._tasks.append(asyncio.get_running_loop().create_task(self._answer(message, index)))
                case wire.Abort():
                    self.aborts.append(message)

    async def _answer(self, asked: wire.Generate, index: int) -> None:
        tokens = self._script(asked, index)
        starts = list(range(0, len(tokens), self._burst))
        for start in starts:
            part = tokens[start : start + self._burst]
            ends = start == starts[-1]
            reason = ("stop" if part[-1] in self.facts.eos_token_ids else "length") if ends else None
            usage = wire.Usage(len(asked.prompt_ids), start + len(part), 0) if ends or not start else None
            output = wire.Output(asked.id + index, start, part, reason, usage, *_logprobs(asked, part, start))
            self.feed(wire.Tokens(start, [output]))
            await asyncio.sleep(0)


def logprob_of(token_id: int) -> float:
    return -(1 + token_id % 8) / 8


def _logprobs(
    asked: wire.Generate, tokens: list[int], start: int
) -> tuple[list[wire.TokenLogprob] | None, list[wire.TokenLogprob] | None]:
    of_output, of_prompt = asked.params.logprobs, asked.params.prompt_logprobs
    output = None if of_output is None else [_logprob(token, of_output) for token in tokens]
    first = of_prompt is not None and start == 0
    prompt = [_logprob(token, of_prompt or 0) for token in asked.prompt_ids[1:]] if first else None
    return output, prompt


def _logprob(token_id: int, num_top: int) -> wire.TokenLogprob:
    return wire.TokenLogprob(token_id, logprob_of(token_id), 1, [(i, logprob_of(i)) for i in range(num_top)])


class _OneModel:
    """In place of the registry, which needs a Triton."""

    is_connected = True

    def __init__(self, session: Session) -> None:
        self._session = session

    def __iter__(self) -> Iterator[tuple[str, Entry]]:
        yield MODEL, Entry(SimpleNamespace(session=self._session), None)  # type: ignore[arg-type]

    async def find(self, name: str) -> Session:
        if name != MODEL:
            raise ModelNotFound(f"the model {name!r} does not exist; loaded models: {MODEL}")
        return self._session
