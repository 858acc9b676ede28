"""The answers to one HTTP request: sent through the model's session, their deltas collected as they come."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Awaitable
from typing import TypeVar

from pagoda import sampling_params
from pagoda.client import Arrivals, RequestStream
from pagoda.errors import InvalidRequest, PagodaError
from pagoda.protocol import Output, TokenLogprob, Usage
from pagoda.text.generation import Delta, DeltaReader
from pagoda.text.stream import TextStream
from starlette.requests import Request
from starlette.types import Receive

from pagoda_openai.ask import Ask
from pagoda_openai.logprobs import LogprobTrace, Placed
from pagoda_openai.model import Model, Prompt
from pagoda_openai.responses import PromptTokensDetails, UsageBody
from pagoda_openai.sse import disconnected

T = TypeVar("T")

MAX_ANSWERS = 1024
"""Answers to all prompts of one request."""


class ClientGone(Exception):
    """The client left before its answer began."""


class Answer:
    """One answer as it grows. `echo` is what stands before it."""

    def __init__(self, model: Model, ask: Ask, prompt: Prompt, echo: str, stream: RequestStream) -> None:
        self.prompt = prompt
        self.echo = echo
        self.stream = stream
        self.usage: Usage | None = None
        self.prompt_logprobs: list[TokenLogprob] = []
        shows = {"skip_special_tokens": ask.skip_special_tokens}
        text = TextStream(
            model.tokenizer,
            stops=ask.stops,
            include_stop=ask.include_stop,
            prompt_ids=prompt.ids,
            min_tokens=ask.params.min_tokens,
            ends=ask.params.stop_ids(model.facts.eos_token_ids),
            **shows,
        )
        self.push = DeltaReader(stream, text).push
        """The delta that the next output adds."""
        self._trace = None if ask.logprobs is None else LogprobTrace(model.tokenizer, prompt_ids=prompt.ids, **shows)

    def report(self, delta: Delta) -> list[Placed]:
        """The tokens that `delta`, the next one, lets be reported; none when nobody asked."""
        return [] if self._trace is None else self._trace.push(delta)


class Choice:
    """A whole answer."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.text = ""
        self.finish_reason = ""
        self.shown: list[Placed] = []
        """Reports of the shown tokens, where asked for."""
        self._sum = 0.0
        self._num_tokens = 0

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.finish_reason = delta.finish_reason or self.finish_reason
        self.shown += self.answer.report(delta)
        if delta.logprobs is not None:
            self._sum += sum(report.logprob for report in delta.logprobs)
            self._num_tokens += len(delta.logprobs)

    @property
    def mean_logprob(self) -> float:
        """Of its tokens, shown or not; 0 for none."""
        return self._sum / max(1, self._num_tokens)


class Generation:
    """All answers, `ask.best_of` for each prompt, in the order of the prompts."""

    def __init__(self, model: Model, prompts: list[Prompt], ask: Ask) -> None:
        """Raises InvalidRequest for what the engine would refuse, and EngineUnavailable."""
        if len(prompts) * ask.best_of > MAX_ANSWERS:
            raise InvalidRequest(
                f"{len(prompts)} prompts with {ask.best_of} answers each pass {MAX_ANSWERS}, the most answers of one "
                f"request: lower n or best_of",
                field="n",
            )
        for prompt in prompts:
            model.check(prompt, ask.params)
        num_prompt_tokens = sum(len(prompt.ids) for prompt in prompts)
        field = "logprobs" if ask.prompt_logprobs is None else "prompt_logprobs"
        sampling_params.check_prompt_reports(num_prompt_tokens, ask.params, n=ask.n, field=field)
        self.num_prompt_reports = ask.n * sampling_params.num_prompt_reports(num_prompt_tokens, ask.params)
        self.created = int(time.time())
        self.id = secrets.token_hex(12)
        self.model = model
        self.ask = ask
        self.answers = [answer for prompt in prompts for answer in _answers(model, prompt, ask)]
        self._arrivals = Arrivals([answer.stream for answer in self.answers])
        self._error: PagodaError | None = None
        """Ends the generation once what came before it is shown."""

    def abort(self, reason: str) -> None:
        """Nobody wants the rest."""
        for answer in self.answers:
            answer.stream.abort("slow_client" if reason == "slow_client" else "client_gone")

    @property
    def is_over(self) -> bool:
        """Every answer's end was taken."""
        return self._error is None and self._arrivals.are_over

    async def arrival(self) -> None:
        """Until there is something to take."""
        if self._error is None:
            await self._arrivals.wait()

    def take(self) -> list[tuple[int, Delta]]:
        """(answer, delta) of all that has come; each answer's last has a finish reason.

        Raises what ended a request, once all that came before it was taken.
        """
        if self._error is not None:
            raise self._error
        news: list[tuple[int, Delta]] = []
        try:
            while (arrived := self._arrivals.take()) is not None:
                news.append((arrived[0], self._read(*arrived)))
        except PagodaError as error:
            if not news:
                raise
            self._error = error
        return news

    def _read(self, index: int, output: Output) -> Delta:
        answer = self.answers[index]
        delta = answer.push(output)
        if delta.usage is not None:
            answer.usage = delta.usage
        if delta.prompt_logprobs is not None:
            self._share(index, delta.prompt_logprobs)
        return delta

    def _share(self, index: int, reports: list[TokenLogprob]) -> None:
        """A prompt's reports are the same for all its answers."""
        first = index - index % self.ask.best_of
        for answer in self.answers[first : first + self.ask.best_of]:
            answer.prompt_logprobs = reports

    async def whole(self) -> list[Choice]:
        """The answers to show, `ask.n` for each prompt; the likeliest first when there were more to choose from."""
        choices = [Choice(answer) for answer in self.answers]
        try:
            while not self.is_over:
                await self.arrival()
                for index, delta in self.take():
                    choices[index].add(delta)
        finally:
            self.abort("client_gone")  # does nothing for those that have ended
        ask = self.ask
        if ask.best_of == ask.n:
            return choices
        groups = [choices[i : i + ask.best_of] for i in range(0, len(choices), ask.best_of)]
        return [best for group in groups for best in sorted(group, key=_likelihood, reverse=True)[: ask.n]]

    def usage(self) -> UsageBody:
        """A prompt counts once however many answers it got; every generated token counts."""
        firsts = [a.usage for a in self.answers[:: self.ask.best_of] if a.usage is not None]
        prompt = sum(usage.prompt_tokens for usage in firsts)
        completion = sum(a.usage.completion_tokens for a in self.answers if a.usage is not None)
        cached = sum(usage.cached_tokens for usage in firsts)
        return UsageBody(prompt, completion, prompt + completion, PromptTokensDetails(cached))


def _answers(model: Model, prompt: Prompt, ask: Ask) -> list[Answer]:
    """Sends the prompt, once for all its answers."""
    streams = model.session.generate(
        prompt.ids,
        ask.params,
        cache_salt=ask.cache_salt,
        n=ask.best_of,
        priority=ask.priority,
        timeout=ask.timeout,
    )
    echo = model.shown(prompt) if ask.echo else ""
    return [Answer(model, ask, prompt, echo, stream) for stream in streams]


def _likelihood(choice: Choice) -> float:
    return choice.mean_logprob


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
