"""A session of a test's own with the real engine, and the answers that it takes from its streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from lone_judge import Given
from pagoda.client import RequestStream, Session
from pagoda.triton_client import GrpcSession, Triton
from service import Service


@asynccontextmanager
async def session_of(service: Service, model: str) -> AsyncIterator[Session]:
    """A session of our own with the engine, as the frontend's workers have."""
    triton = Triton(service.instance.grpc_address, service.instance.secret)
    transport = GrpcSession(triton, model, "test")
    task = asyncio.create_task(transport.run())
    try:
        await transport.session.wait_ready(30)
        yield transport.session
    finally:
        await transport.close("the test is over")
        await task
        await triton.close()


@dataclass
class Answer:
    given: Given
    finish_reasons: list[str] = field(default_factory=list)
    aborted: bool = False

    @property
    def token_ids(self) -> list[int]:
        return list(self.given.token_ids)


async def take(
    stream: RequestStream,
    prompt_ids: Sequence[int] = (),
    keep: int | None = None,
    temperature: float = 0,
    seed: int = 0,
) -> Answer:
    """Read a stream to its end, or abort it once it has given `keep` tokens."""
    tokens: list[int] = []
    answer = Answer(Given(prompt_ids, tokens, temperature, seed))
    if keep == 0:
        await asyncio.sleep(0.05)
        stream.abort("client_gone")
        answer.aborted = True
        return answer
    async for output in stream:
        assert output.index == len(tokens), "tokens are lost or come twice"
        tokens += output.token_ids
        if output.finish_reason is not None:
            answer.finish_reasons.append(output.finish_reason)
        if keep is not None and len(tokens) >= keep and output.finish_reason is None:
            stream.abort("client_gone")
            answer.aborted = True
            break
    return answer
