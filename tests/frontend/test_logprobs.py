"""Log-probabilities in OpenAI's shapes: whole and streamed alike, for shown tokens only, offsets and bytes true."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pagoda_openai.answer as answer_module
import pytest
from frontend.fake_engine import FakeEngine, logprob_of
from hypothesis import given, settings
from hypothesis import strategies as st
from pagoda.protocol import TokenLogprob
from pagoda.text.generation import Delta
from pagoda.text.stream import TextStream
from pagoda.text.tokenizer import Tokenizer
from pagoda_openai.logprobs import LogprobTrace, Placed, TokenNames

TEXT = "/v1/completions"
CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hello"}]
PARTS = [*"é日😀".encode()]
"""The tokens of characters that take two to four."""


def engine_of(folder: Path, tokenizer: Tokenizer, text: str, *, burst: int = 1, end: bool = False) -> FakeEngine:
    """Answers `text`, perhaps with the end token behind it."""
    ids = tokenizer.encode(text)
    eos = tokenizer.eos_token_id
    assert eos is not None
    script = [*ids, eos] if end else ids
    return FakeEngine(folder, tokenizer.vocab_size, lambda asked, index: script, eos=(eos,), burst=burst)


async def streamed(engine: FakeEngine, **fields: Any) -> tuple[str, dict[str, list[Any]]]:
    """Text and lists of a streamed completion, put together."""
    text, lists = "", {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for event in await engine.events(TEXT, **fields):
        for choice in event["choices"]:
            text += choice["text"]
            for name, found in lists.items():
                found += choice["logprobs"][name]
    return text, lists


async def test_completion_lists(folder: Path, tokenizer: Tokenizer) -> None:
    answer = (await engine_of(folder, tokenizer, "Hello Paris").post(TEXT, prompt="The", logprobs=2)).json()
    [choice] = answer["choices"]
    lists = choice["logprobs"]
    ids = tokenizer.encode("Hello Paris")
    assert lists["tokens"] == ["Hello", " Paris"]
    assert lists["token_logprobs"] == [logprob_of(i) for i in ids]
    assert lists["text_offset"] == [0, 5]
    assert [len(top) for top in lists["top_logprobs"]] == [3, 3]
    assert all(top[name] == value for name, value, top in zip(*lists_of(lists), strict=True))
    assert "prompt_logprobs" not in choice


def lists_of(lists: dict[str, list[Any]]) -> tuple[list[Any], list[Any], list[Any]]:
    return lists["tokens"], lists["token_logprobs"], lists["top_logprobs"]


async def test_zero_alternatives_report_the_token_itself(folder: Path, tokenizer: Tokenizer) -> None:
    answer = (await engine_of(folder, tokenizer, "Hello").post(TEXT, prompt="The", logprobs=0)).json()
    assert list(answer["choices"][0]["logprobs"]["top_logprobs"][0]) == ["Hello"]


@pytest.mark.parametrize("burst", [1, 3, 100])
@pytest.mark.parametrize("text", ["Hello Paris is big", "é日😀 Hello é", "日日"])
@pytest.mark.parametrize("stop", [None, [" is"], ["日"], ["s is b"], ["\x00"]])
@pytest.mark.parametrize("include", [False, True])
async def test_streamed_lists_equal_the_whole_ones(
    folder: Path, tokenizer: Tokenizer, text: str, stop: list[str] | None, burst: int, include: bool
) -> None:
    fields = {"prompt": "The", "logprobs": 1, "stop": stop, "include_stop_str_in_output": include}
    whole = (await engine_of(folder, tokenizer, text, burst=100).post(TEXT, **fields)).json()["choices"][0]
    assert await streamed(engine_of(folder, tokenizer, text, burst=burst), **fields) == (
        whole["text"],
        whole["logprobs"],
    )
    for name, start in zip(whole["logprobs"]["tokens"], whole["logprobs"]["text_offset"], strict=True):
        if not name.startswith("bytes:"):
            expected = name[: len(whole["text"]) - start]
            assert whole["text"][start : start + len(expected)] == expected
            assert expected


async def test_tokens_behind_a_stop_string_are_not_reported(folder: Path, tokenizer: Tokenizer) -> None:
    engine = engine_of(folder, tokenizer, "Hello Paris is big")
    answer = (await engine.post(TEXT, prompt="The", logprobs=0, stop=["s is"])).json()
    assert answer["choices"][0]["text"] == "Hello Pari"
    assert answer["choices"][0]["logprobs"]["tokens"] == ["Hello", " Paris"]
    assert answer["usage"]["completion_tokens"] == 3
    assert engine.aborts[0].tokens_kept == 3


@pytest.mark.parametrize(("include", "shown"), [(False, "Hello"), (True, "Hello Paris")])
async def test_a_token_that_ends_the_answer_is_reported(
    folder: Path, tokenizer: Tokenizer, include: bool, shown: str
) -> None:
    """Its text is shown only when asked for."""
    fields = {
        "prompt": "The",
        "logprobs": 0,
        "stop": ["never"],
        "stop_token_ids": tokenizer.encode(" Paris"),
        "include_stop_str_in_output": include,
    }
    [choice] = (await engine_of(folder, tokenizer, "Hello Paris").post(TEXT, **fields)).json()["choices"]
    assert choice["text"] == shown
    assert choice["logprobs"]["tokens"] == ["Hello", " Paris"]
    assert await streamed(engine_of(folder, tokenizer, "Hello Paris"), **fields) == (shown, choice["logprobs"])


async def test_many_reports_are_worded_beside_the_loop(
    folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And are the same then."""
    fields = {"prompt": [5, 260, 7], "logprobs": 1, "echo": True, "n": 2}
    few = (await engine_of(folder, tokenizer, "Hello").post(TEXT, **fields)).json()["choices"]
    monkeypatch.setattr(answer_module, "MANY_REPORTS", 1)
    threads: list[str] = []
    naming = TokenNames.echoed

    def watched(*arguments: Any) -> Any:
        threads.append(threading.current_thread().name)
        return naming(*arguments)

    monkeypatch.setattr(TokenNames, "echoed", watched)
    engine = engine_of(folder, tokenizer, "Hello")
    assert (await engine.post(TEXT, **fields)).json()["choices"] == few
    assert await streamed(engine, **{**fields, "n": 1}) == (few[0]["text"], few[0]["logprobs"])
    assert len(threads) == 3
    assert threading.main_thread().name not in threads


async def test_a_part_of_a_character_is_named_by_its_bytes(folder: Path, tokenizer: Tokenizer) -> None:
    engine = engine_of(folder, tokenizer, "a€b")
    lists = (await engine.post(TEXT, prompt="The", logprobs=0)).json()["choices"][0]["logprobs"]
    assert lists["tokens"] == ["a", "bytes:\\xe2", "bytes:\\x82", "bytes:\\xac", "b"]
    assert lists["text_offset"] == [0, 1, 1, 1, 2]
    answer = (await engine.post(CHAT, messages=MESSAGES, logprobs=True)).json()
    content = answer["choices"][0]["logprobs"]["content"]
    assert bytes(byte for token in content for byte in token["bytes"]).decode() == "a€b"
    assert content[1]["token"] == "\\xe2"


async def test_chat_content_whole_and_streamed(folder: Path, tokenizer: Tokenizer) -> None:
    fields = {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2}
    engine = engine_of(folder, tokenizer, "Hello Paris", end=True)
    whole = (await engine.post(CHAT, **fields)).json()["choices"][0]
    content = whole["logprobs"]["content"]
    assert [token["token"] for token in content] == ["Hello", " Paris", "<|end|>"]
    assert [len(token["top_logprobs"]) for token in content] == [2, 2, 2]
    assert whole["message"]["content"] == "Hello Paris"
    assert whole["logprobs"]["refusal"] is None
    chunks = [event["choices"][0] for event in await engine.events(CHAT, **fields)]
    assert [token for chunk in chunks for token in (chunk["logprobs"] or {"content": []})["content"]] == content
    assert chunks[-1]["finish_reason"] == "stop"


async def test_nothing_is_asked_of_the_engine_unasked(folder: Path, tokenizer: Tokenizer) -> None:
    engine = engine_of(folder, tokenizer, "Hello")
    answer = (await engine.post(CHAT, messages=MESSAGES)).json()
    assert answer["choices"][0]["logprobs"] is None
    assert engine.generates[0].params.logprobs is None
    assert engine.generates[0].params.prompt_logprobs is None


async def test_prompt_logprobs_in_vllms_shape(folder: Path, tokenizer: Tokenizer) -> None:
    engine = engine_of(folder, tokenizer, "Hello")
    prompt = "The Paris"
    ids = tokenizer.encode(prompt)
    answer = (await engine.post(TEXT, prompt=prompt, prompt_logprobs=1, n=2)).json()
    for choice in answer["choices"]:
        first, *rest = choice["prompt_logprobs"]
        assert first is None
        assert [next(iter(token)) for token in rest] == [str(i) for i in ids[1:]]
        assert rest[-1][str(ids[-1])] == {"logprob": logprob_of(ids[-1]), "rank": 1, "decoded_token": " Paris"}
    chat = (await engine.post(CHAT, messages=MESSAGES, prompt_logprobs=0)).json()
    assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]


@pytest.mark.parametrize("prompt", ["The Paris é", "<|start|>The Paris<|end|>", [5, 260, 7]])
async def test_echo_with_logprobs(folder: Path, tokenizer: Tokenizer, prompt: Any) -> None:
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    shown = prompt if isinstance(prompt, str) else tokenizer.decode(prompt, skip_special_tokens=False)
    engine = engine_of(folder, tokenizer, "Hello Paris")
    fields = {"prompt": prompt, "logprobs": 1, "echo": True}
    [choice] = (await engine.post(TEXT, **fields)).json()["choices"]
    assert choice["text"] == f"{shown}Hello Paris"
    lists = choice["logprobs"]
    assert {len(found) for found in lists.values()} == {len(ids) + 2}
    assert lists["token_logprobs"] == [None, *(logprob_of(i) for i in [*ids[1:], *tokenizer.encode("Hello Paris")])]
    assert lists["top_logprobs"][0] is None
    assert lists["text_offset"][-2:] == [len(shown), len(shown) + 5]
    for name, start in zip(lists["tokens"], lists["text_offset"], strict=True):
        assert name.startswith("bytes:") or choice["text"].startswith(name, start)
    assert await streamed(engine, **fields) == (choice["text"], lists)


async def test_echo_alone_shows_the_prompt(folder: Path, tokenizer: Tokenizer) -> None:
    engine = engine_of(folder, tokenizer, "Hello")
    answer = (await engine.post(TEXT, prompt=["The", "Paris"], echo=True, n=2)).json()
    assert [c["text"] for c in answer["choices"]] == ["TheHello", "TheHello", "ParisHello", "ParisHello"]
    assert engine.generates[0].params.prompt_logprobs is None
    events = await engine.events(TEXT, prompt="The", echo=True)
    assert "".join(e["choices"][0]["text"] for e in events) == "TheHello"


def run(tokenizer: Tokenizer, pieces: list[list[int]], stops: list[str], prompt: list[int]) -> tuple[str, list[Placed]]:
    """Text and reports of an answer that comes in `pieces`."""
    text = TextStream(tokenizer, stops=stops, prompt_ids=prompt)
    trace = LogprobTrace(tokenizer, prompt_ids=prompt, skip_special_tokens=True)
    shown, reported, kept = "", [], 0
    for number, ids in enumerate(pieces, start=1):
        piece = text.push(ids)
        last = number == len(pieces)
        added = piece.text + (text.finish() if last and not piece.stopped else "")
        reports = [TokenLogprob(token, -1.0, 1) for token in ids[: piece.tokens_kept - kept]]
        reason = "stop" if last or piece.stopped else None
        reported += trace.push(Delta(added, len(ids), reason, None, reports, None, piece.stopped))
        shown, kept = shown + added, piece.tokens_kept
        if piece.stopped:
            break
    return shown, reported


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_pieces_change_no_report(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Bytes, words and control tokens at random, cut at random, after a prompt that may end within a character."""
    token = st.one_of(st.integers(0, 255), st.integers(0, tokenizer.vocab_size - 1), st.sampled_from(PARTS))
    ids = data.draw(st.lists(token, min_size=1, max_size=24))
    prompt = data.draw(st.lists(token, max_size=4))
    stops = data.draw(st.lists(st.text("abé日", min_size=1, max_size=2), max_size=3))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(ids)))) | {len(ids)})
    pieces = [ids[a:b] for a, b in zip([0, *cuts], cuts, strict=False)]
    text, reported = run(tokenizer, [ids], stops, prompt)
    assert run(tokenizer, pieces, stops, prompt) == (text, reported)
    assert [placed.report.token_id for placed in reported] == ids[: len(reported)]
    offsets = [placed.offset for placed in reported]
    assert offsets == sorted(offsets)
    assert not offsets or offsets[-1] <= len(text)
    if text == run(tokenizer, [ids], [], prompt)[0]:
        assert len(reported) == len(ids) or stops
