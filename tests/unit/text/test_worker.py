"""The text worker's answers: its own session and sockets aside, from a request to its replies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from frontend.fake_engine import FakeEngine
from pagoda.text.tokenizer import Tokenizer
from pagoda.text.wire import TextReply, TextRequest, TextStart
from pagoda.text.worker import TextWorker


@pytest.fixture
async def engine(smol_folder: Path, smol: Tokenizer) -> FakeEngine:
    """Always answers " Paris. It is big."."""
    ids = smol.encode(" Paris. It is big.")
    return FakeEngine(smol_folder, smol.vocab_size, lambda asked, index: ids)


async def ask(engine: FakeEngine, *, stream: bool = False, **parameters: Any) -> list[TextReply]:
    worker = TextWorker(TextStart("m", engine.facts.folder, "", "", ""))
    replies: list[TextReply] = []

    async def keep(reply: TextReply) -> None:
        replies.append(reply)

    worker._reply = keep  # type: ignore[method-assign]
    worker.session = engine.session
    engine.session.open()
    raw = json.dumps(parameters)
    await worker._serve(TextRequest(1, "The capital is", stream, {}, raw, None, True, True, True))
    return replies


async def test_a_whole_answer(engine: FakeEngine, smol: Tokenizer) -> None:
    [reply] = await ask(engine)
    assert reply.text == "The capital is Paris. It is big."
    assert (reply.final, reply.finish_reason) == (True, "length")
    assert reply.num_output_tokens == len(smol.encode(" Paris. It is big."))


async def test_a_stream_with_its_stop_string_shown(engine: FakeEngine) -> None:
    replies = await ask(engine, stream=True, stop=["is b"], include_stop_str_in_output=True)
    assert "".join(reply.text for reply in replies) == " Paris. It is b"
    assert [reply.final for reply in replies] == [False] * (len(replies) - 1) + [True]
    assert replies[-1].finish_reason == "stop"


async def test_min_tokens_hold_for_stop_strings_too(engine: FakeEngine) -> None:
    [early] = await ask(engine, stop=["."])
    [late] = await ask(engine, stop=["."], min_tokens=3)
    assert (early.text, late.text) == ("The capital is Paris", "The capital is Paris. It is big")


async def test_parameters_travel(engine: FakeEngine) -> None:
    await ask(engine, priority=-1, timeout=5, presence_penalty=1, logit_bias={"7": -3})
    sent = engine.generates[-1]
    assert (sent.priority, sent.timeout, sent.n) == (-1, 5, 1)
    assert (sent.params.presence_penalty, sent.params.logit_bias) == (1, {7: -3})


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"presence_penalty": 3}, "presence_penalty must be in [-2, 2], not 3.0"),
        ({"min_tokens": 17}, "min_tokens must be at most max_tokens (16), not 17"),
        ({"no_such": 1}, "parameter 'no_such' is not available"),
    ],
)
async def test_a_bad_parameter_is_an_error_reply(engine: FakeEngine, parameters: dict[str, Any], words: str) -> None:
    [reply] = await ask(engine, **parameters)
    assert (reply.final, reply.error_code) == (True, "invalid_request")
    assert words in reply.error_message
    assert not engine.generates
