"""POST /v1/completions."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter
from msgspec import UNSET, UnsetType
from pagoda.errors import InvalidRequest
from pagoda.text.generation import Delta
from starlette.requests import Request
from starlette.responses import Response

from pagoda_openai.answer import answer
from pagoda_openai.ask import ask_completion
from pagoda_openai.generation import Answer, Choice, Generation
from pagoda_openai.logprobs import Placed, TokenNames
from pagoda_openai.model import Model, Prompt, model_of
from pagoda_openai.parsing import parse, read_body
from pagoda_openai.requests import MAX_PROMPTS, CompletionRequest
from pagoda_openai.responses import Completion, CompletionChoice, CompletionLogprobs, PromptLogprobs, UsageBody
from pagoda_openai.state import frontend_of

router = APIRouter()


@router.post("/v1/completions")
async def completions(request: Request) -> Response:
    """Continue one prompt or several, given as text or as token ids."""
    frontend = frontend_of(request)
    asked = parse(await read_body(request, frontend.settings.max_body_bytes), CompletionRequest)
    include_usage = asked.include_usage
    model = await model_of(frontend, asked.model)
    ask = ask_completion(asked, model)
    prompts = await prompts_of(asked.prompt, model, asked.truncate_prompt_tokens)
    generation = Generation(model, prompts, ask)
    shape = CompletionShape(generation)
    return await answer(request, frontend.settings, generation, shape, asked.streams, include_usage)


async def prompts_of(prompt: str | list[str | int | list[int]], model: Model, keep: int | None) -> list[Prompt]:
    """Each prompt, or its last `keep` tokens. Raises InvalidRequest for an empty one, a mixture, or too many."""
    if isinstance(prompt, str):
        return [await model.encode(prompt, keep)]
    texts = [p for p in prompt if isinstance(p, str)]
    ids = [p for p in prompt if isinstance(p, int)]
    lists = [p for p in prompt if isinstance(p, list)]
    if len(prompt) not in (len(texts), len(ids), len(lists)):
        raise InvalidRequest("prompt mixes texts, token ids and lists of them: use one kind", field="prompt")
    if ids:
        return [Prompt(ids).last(keep)]
    if not 1 <= len(prompt) <= MAX_PROMPTS:
        raise InvalidRequest(f"prompt must hold 1 to {MAX_PROMPTS} prompts, not {len(prompt)}", field="prompt")
    return [Prompt(ids).last(keep) for ids in lists] or [await model.encode(text, keep) for text in texts]


class CompletionShape:
    """How a generation looks on this endpoint."""

    def __init__(self, generation: Generation) -> None:
        self._head = {
            "id": f"cmpl-{generation.id}",
            "object": "text_completion",
            "created": generation.created,
            "model": generation.model.facts.name,
        }
        self._ask = generation.ask
        self._answers = generation.answers
        self.is_text_only = not generation.ask.echo and generation.ask.logprobs is None
        self._names = TokenNames(generation.model.tokenizer)

    def whole(self, choices: list[Choice], usage: UsageBody) -> msgspec.Struct:
        done = [self._whole_choice(index, choice) for index, choice in enumerate(choices)]
        return Completion(**self._head, choices=done, usage=usage)  # type: ignore[arg-type]

    def chunks(self, index: int, delta: Delta, *, is_first: bool) -> list[msgspec.Struct]:
        if self.is_text_only:
            choice = CompletionChoice(index, delta.text, finish_reason=delta.finish_reason)
        else:
            choice = self._reporting_choice(index, delta, is_first)
        return [Completion(**self._head, choices=[choice])]  # type: ignore[arg-type]

    def usage_chunk(self, usage: UsageBody) -> msgspec.Struct:
        return Completion(**self._head, choices=[], usage=usage)  # type: ignore[arg-type]

    def _whole_choice(self, index: int, choice: Choice) -> CompletionChoice:
        answer = choice.answer
        logprobs = self._logprobs(answer, choice.shown, with_prompt=True)
        return CompletionChoice(
            index, answer.echo + choice.text, logprobs, choice.finish_reason, self._prompt_logprobs(answer)
        )

    def _reporting_choice(self, index: int, delta: Delta, is_first: bool) -> CompletionChoice:
        """With log-probabilities; the first delta of a choice carries the echo."""
        answer = self._answers[index]
        text = answer.echo + delta.text if is_first else delta.text
        logprobs = self._logprobs(answer, answer.report(delta), with_prompt=is_first)
        return CompletionChoice(index, text, logprobs, delta.finish_reason)

    def _logprobs(self, answer: Answer, shown: list[Placed], *, with_prompt: bool) -> CompletionLogprobs | None:
        top = self._ask.logprobs
        if top is None:
            return None
        lists = self._names.completion(shown, base=len(answer.echo), top=top)
        if not with_prompt or not self._ask.echo:
            return lists
        return self._names.echoed(answer.prompt.ids, answer.prompt_logprobs, answer.echo, top) + lists

    def _prompt_logprobs(self, answer: Answer) -> PromptLogprobs | UnsetType:
        top = self._ask.prompt_logprobs
        return UNSET if top is None else self._names.prompt(answer.prompt_logprobs, top=top)
