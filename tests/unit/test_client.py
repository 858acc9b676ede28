"""A session's streams: several answers to one request, and outputs that merge while nobody takes them."""

from __future__ import annotations

from pagoda import protocol as wire
from pagoda.client import Session
from pagoda.protocol import Output, TokenLogprob, Usage
from pagoda.sampling_params import SamplingParams

FACTS = wire.ModelFacts("m", "/", 100, 10, (), SamplingParams())


def ready_session() -> tuple[Session, list[wire.Frame]]:
    frames: list[wire.Frame] = []
    session = Session("test", frames.append)
    session.feed(wire.encode([wire.Ready(FACTS, 1)]))
    return session, frames


async def taken(session: Session, outputs: list[Output]) -> Output:
    """What one stream gets of outputs that came before anybody took one."""
    [stream] = session.generate([1], SamplingParams())
    session.feed(wire.encode([wire.Tokens(1, outputs)]))
    return await anext(aiter(stream))


async def test_n_answers_are_one_message_and_n_streams() -> None:
    session, frames = ready_session()
    [one] = session.generate([1, 2], SamplingParams())
    three = session.generate([3], SamplingParams(), n=3, priority=-1, timeout=2.0, cache_salt="s")
    [after] = session.generate([4], SamplingParams())
    session._flush()
    assert [one.id, *(s.id for s in three), after.id] == [1, 2, 3, 4, 5]
    assert session.num_requests == 5
    [first, second, third] = frames[0].messages
    assert second == wire.Generate(2, [3], SamplingParams(), "s", 3, -1, 2.0)
    assert isinstance(first, wire.Generate)
    assert isinstance(third, wire.Generate)
    assert (first.n, third.id) == (1, 5)


async def test_one_answer_may_end_before_the_others() -> None:
    session, _ = ready_session()
    first, second = session.generate([1], SamplingParams(), n=2)
    first.abort("stop_string", 3)
    session.feed(wire.encode([wire.Tokens(1, [Output(2, 0, [5], "length")])]))
    assert [o.token_ids async for o in second] == [[5]]
    assert session.num_requests == 0


async def test_merged_outputs_keep_their_logprobs_in_order() -> None:
    session, _ = ready_session()
    reports = [TokenLogprob(token, -1.0, 1) for token in (5, 6, 7)]
    prompt = [TokenLogprob(9, -2.0, 1)]
    merged = await taken(
        session,
        [
            Output(1, 0, [5, 6], None, Usage(1, 2, 0), reports[:2], prompt),
            Output(1, 2, [7], None, None, reports[2:]),
            Output(1, 3, [], "stop", Usage(1, 3, 0)),
        ],
    )
    assert merged == Output(1, 0, [5, 6, 7], "stop", Usage(1, 3, 0), reports, prompt)


async def test_merged_outputs_without_logprobs_have_none() -> None:
    session, _ = ready_session()
    merged = await taken(session, [Output(1, 0, [5], None, Usage(1, 1, 0)), Output(1, 1, [6], "length")])
    assert merged == Output(1, 0, [5, 6], "length", Usage(1, 1, 0))
