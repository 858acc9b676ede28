"""The text worker's answers: its own session and sockets aside, from a request to its replies."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from frontend.fake_engine import FakeEngine, logprob_of
from pagoda import protocol as wire
from pagoda.text.tokenizer import Tokenizer
from pagoda.text.wire import TextReply, TextRequest, TextStart
from pagoda.text.worker import TextWorker


@pytest.fixture
async def engine(smol_folder: Path, smol: Tokenizer) -> FakeEngine:
    """Always answers " Paris. It is big."."""
    ids = smol.encode(" Paris. It is big.")
    return FakeEngine(smol_folder, smol.vocab_size, lambda asked, index: ids)


async def ask(
    engine: FakeEngine, *, stream: bool = False, shown: tuple[str, ...] = (), **parameters: Any
) -> list[TextReply]:
    """`shown`: inputs return_… beside those of counts and reasons."""
    worker = TextWorker(TextStart("m", engine.facts.folder, "", "", ""))
    replies: list[TextReply] = []

    async def keep(reply: TextReply) -> None:
        replies.append(reply)

    worker._reply = keep  # type: ignore[method-assign]
    worker.session = engine.session
    engine.session.open()
    raw = json.dumps(parameters)
    request = TextRequest(1, "The capital is", stream, {}, raw, None, True, True, True)
    try:
        await worker._serve(msgspec.structs.replace(request, **dict.fromkeys(shown, True)))
    finally:
        worker._context.destroy(linger=0)  # left to the garbage collector, it may wait for sockets for ever
    return replies


async def test_a_whole_answer(engine: FakeEngine, smol: Tokenizer) -> None:
    [reply] = await ask(engine)
    assert reply.text_output == ["The capital is Paris. It is big."]
    assert (reply.final, reply.finish_reason) == (True, ["length"])
    assert reply.num_input_tokens == [len(smol.encode("The capital is"))]
    assert reply.num_output_tokens == [len(smol.encode(" Paris. It is big."))]
    assert (reply.logprobs, reply.cumulative_logprob, reply.prompt_logprobs) == (None, None, None)


async def test_a_stream_with_its_stop_string_shown(engine: FakeEngine) -> None:
    replies = await ask(engine, stream=True, stop=["is b"], include_stop_str_in_output=True)
    assert "".join(reply.text_output[0] for reply in replies) == " Paris. It is b"
    assert [reply.final for reply in replies] == [False] * (len(replies) - 1) + [True]
    assert replies[-1].finish_reason == ["stop"]


async def test_min_tokens_hold_for_stop_strings_too(engine: FakeEngine) -> None:
    [early] = await ask(engine, stop=["."])
    [late] = await ask(engine, stop=["."], min_tokens=3)
    assert early.text_output == ["The capital is Paris"]
    assert late.text_output == ["The capital is Paris. It is big"]


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


# ── several answers ───────────────────────────────────────────────────────────────────────────────────────────────

TEXTS = [" Paris.", " Paris. It is big.", " London"]


@pytest.fixture
async def trio(smol_folder: Path, smol: Tokenizer) -> FakeEngine:
    """Answer i is TEXTS[i]."""
    ids = [smol.encode(text) for text in TEXTS]
    return FakeEngine(smol_folder, smol.vocab_size, lambda asked, index: ids[index])


async def test_a_whole_response_has_an_element_for_each_answer(trio: FakeEngine, smol: Tokenizer) -> None:
    [reply] = await ask(trio, n=3)
    assert [sent.n for sent in trio.generates] == [3]
    assert reply.text_output == [f"The capital is{text}" for text in TEXTS]
    assert reply.finish_reason == ["length"] * 3
    assert reply.num_output_tokens == [len(smol.encode(text)) for text in TEXTS]


async def test_a_stream_brings_what_is_new_of_each_answer(trio: FakeEngine, smol: Tokenizer) -> None:
    replies = await ask(trio, stream=True, n=3)
    assert ["".join(parts) for parts in zip(*(reply.text_output for reply in replies), strict=True)] == TEXTS
    counts = [reply.num_output_tokens or [] for reply in replies]
    assert [sum(column) for column in zip(*counts, strict=True)] == [len(smol.encode(text)) for text in TEXTS]
    assert [reply.final for reply in replies] == [False] * (len(replies) - 1) + [True]
    for column in zip(*(reply.finish_reason or [] for reply in replies), strict=True):
        ended = column.index("length")
        assert column == ("None",) * ended + ("length",) * (len(replies) - ended)


async def test_a_stop_string_ends_its_own_answer(trio: FakeEngine) -> None:
    [reply] = await ask(trio, n=3, stop=[" It"])
    assert reply.text_output == [f"The capital is{text}" for text in (" Paris.", " Paris.", " London")]
    assert reply.finish_reason == ["length", "stop", "length"]
    await asyncio.sleep(0)  # what was posted in a turn is sent after it
    assert [abort.reason for abort in trio.aborts] == ["stop_string"]


async def test_an_answer_that_fails_ends_the_request(smol_folder: Path, smol: Tokenizer) -> None:
    ids = smol.encode(TEXTS[1])
    engine = FakeEngine(smol_folder, smol.vocab_size, lambda asked, index: ids if index == 0 else [])
    asked = asyncio.create_task(ask(engine, n=3))
    while not engine.generates:
        await asyncio.sleep(0.01)
    engine.feed(wire.Failed(engine.generates[0].id + 1, "deadline_exceeded", "too late"))
    [reply] = await asked
    assert (reply.final, reply.error_code, reply.error_message) == (True, "deadline_exceeded", "too late")
    await asyncio.sleep(0)
    assert engine.generates[0].id + 2 in [abort.id for abort in engine.aborts]


async def test_the_likeliest_answers_are_shown_the_best_first(trio: FakeEngine, smol: Tokenizer) -> None:
    [reply] = await ask(trio, n=2, best_of=3, prompt_logprobs=0)
    assert [sent.n for sent in trio.generates] == [3]
    means = {text: sum(map(logprob_of, smol.encode(text))) / len(smol.encode(text)) for text in TEXTS}
    likeliest = sorted(TEXTS, key=means.__getitem__, reverse=True)[:2]
    assert reply.text_output == [f"The capital is{text}" for text in likeliest]
    assert reply.prompt_logprobs is not None


async def test_what_one_step_brings_comes_in_one_response(smol_folder: Path, smol: Tokenizer) -> None:
    engine = FakeEngine(smol_folder, smol.vocab_size, lambda asked, index: [])
    asked = asyncio.create_task(ask(engine, stream=True, n=3))
    while not engine.generates:
        await asyncio.sleep(0.01)
    first, ids = engine.generates[0].id, smol.encode(TEXTS[1])
    for step in range(3):
        reason: wire.FinishReason | None = "length" if step == 2 else None
        outputs = [wire.Output(first + i, step, [ids[step]], reason) for i in range(3)]
        engine.feed(wire.Tokens(step, outputs))
        await asyncio.sleep(0.01)
    replies = await asked
    assert [reply.text_output for reply in replies] == [[smol.decode([token])] * 3 for token in ids[:3]]


async def test_what_came_before_an_error_is_still_sent(smol_folder: Path, smol: Tokenizer) -> None:
    engine = FakeEngine(smol_folder, smol.vocab_size, lambda asked, index: [])
    asked = asyncio.create_task(ask(engine, stream=True, n=2))
    while not engine.generates:
        await asyncio.sleep(0.01)
    first = engine.generates[0].id
    engine.feed(wire.Tokens(0, [wire.Output(first, 0, smol.encode(TEXTS[0]))]))
    engine.feed(wire.Failed(first + 1, "invalid_request", "barred"))
    before, last = await asked
    assert before.text_output == [TEXTS[0], ""]
    assert (before.final, last.final, last.error_message) == (False, True, "barred")


# ── log-probabilities ─────────────────────────────────────────────────────────────────────────────────────────────


def expected_report(smol: Tokenizer, token: int, top: int) -> dict[str, dict[str, Any]]:
    """As the fake engine reports: rank 1, and the ids 0, 1, … as alternatives."""
    ranked = [(token, 1), *((other, other + 1) for other in range(top))]
    return {
        str(t): {
            "logprob": logprob_of(t),
            "rank": rank,
            "decoded_token": smol.decode([t], skip_special_tokens=False),
        }
        for t, rank in ranked
    }


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_logprobs_are_vllms_objects_as_json(engine: FakeEngine, smol: Tokenizer, stream: bool) -> None:
    replies = await ask(engine, stream=stream, logprobs=2, shown=("return_logprobs", "return_cumulative_logprob"))
    ids = smol.encode(" Paris. It is big.")
    reports = [report for reply in replies for report in json.loads((reply.logprobs or [""])[0])]
    assert reports == [expected_report(smol, token, 2) for token in ids]
    assert replies[-1].cumulative_logprob == pytest.approx([sum(map(logprob_of, ids))])
    assert all(reply.prompt_logprobs is None for reply in replies)


async def test_a_stopped_answer_sums_the_tokens_it_counts(engine: FakeEngine, smol: Tokenizer) -> None:
    [reply] = await ask(engine, stop=["."], shown=("return_cumulative_logprob",))
    ids = smol.encode(" Paris. It is big.")[: (reply.num_output_tokens or [0])[0]]
    assert reply.logprobs is None
    assert reply.cumulative_logprob == pytest.approx([sum(map(logprob_of, ids))])


async def test_prompt_logprobs_come_once_for_all_answers(trio: FakeEngine, smol: Tokenizer) -> None:
    replies = await ask(trio, stream=True, n=2, prompt_logprobs=1)
    [text] = [only for reply in replies for only in reply.prompt_logprobs or ()]
    prompt = smol.encode("The capital is")
    assert json.loads(text) == [None, *(expected_report(smol, token, 1) for token in prompt[1:])]
