"""What the frontend's own code spends on a streamed token.

`PYTHONPATH=tests python tests/frontend/stream_cost.py FOLDER`, where FOLDER holds a tokenizer: from an output that the
session hands over to the bytes of its event. The best of many short runs, which a busy machine spoils least.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import Any

from frontend.fake_engine import MODEL, FakeEngine
from pagoda import protocol as wire
from pagoda.text.tokenizer import Tokenizer
from pagoda_openai.answer import EventEncoder, Shape
from pagoda_openai.ask import Ask, ask_chat, ask_completion
from pagoda_openai.generation import Generation
from pagoda_openai.model import Model, Prompt
from pagoda_openai.requests import ChatMessage, ChatRequest, CompletionRequest
from pagoda_openai.routes.chat import ChatShape
from pagoda_openai.routes.completions import CompletionShape

TOKENS = 300
RUNS = 150
COMPLETIONS: list[tuple[str, dict[str, Any]]] = [
    ("completions", {}),
    ("completions, a stop string", {"stop": ["\0never"]}),
    ("completions, 5 logprobs", {"logprobs": 5}),
]
CHATS: list[tuple[str, dict[str, Any]]] = [("chat", {}), ("chat, 5 logprobs", {"logprobs": True, "top_logprobs": 5})]


def outputs(first_id: int, top: int | None) -> list[wire.Output]:
    """One token each."""
    made = []
    for index in range(TOKENS):
        token = 1000 + 7 * index
        report = wire.TokenLogprob(token, -1.0, 1, [(token + i, -1.0 - i) for i in range(top or 0)])
        made.append(wire.Output(first_id, index, [token], None, None, None if top is None else [report]))
    return made


async def microseconds(generation: Generation, shape: Shape) -> float:
    """Per token, over one answer."""
    encode = EventEncoder(shape).encode
    stream = generation.answers[0].stream
    first, *rest = outputs(stream.id, generation.ask.params.logprobs)
    stream.put(first)
    encode(generation.take())
    began = time.perf_counter()
    for output in rest:
        stream.put(output)
        encode(generation.take())
    seconds = time.perf_counter() - began
    generation.abort("client_gone")
    return seconds / len(rest) * 1e6


async def best(name: str, ask: Ask, model: Model, kind: type[CompletionShape] | type[ChatShape]) -> None:
    found = []
    for _ in range(RUNS):
        generation = Generation(model, [Prompt([1, 2, 3])], ask)
        found.append(await microseconds(generation, kind(generation)))
    print(f"{name:28s} {min(found):6.2f} µs a token")


async def run(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(Path("none"), tokenizer.vocab_size, lambda asked, index: [])
    engine.session.open()
    model = Model(engine.session, engine.facts, tokenizer)
    for name, fields in COMPLETIONS:
        asked = CompletionRequest(model=MODEL, prompt="a", max_tokens=TOKENS, **fields)
        await best(name, ask_completion(asked, model), model, CompletionShape)
    for name, fields in CHATS:
        chat = ChatRequest(model=MODEL, messages=[ChatMessage("user", "a")], **fields)
        await best(name, ask_chat(chat, model), model, ChatShape)


def main() -> None:
    asyncio.run(run(Tokenizer.from_folder(sys.argv[1])))


if __name__ == "__main__":
    main()
