"""Load on an OpenAI-compatible server, with streams measured as their readers feel them.

    locust -f loadtests/locustfile.py --host http://127.0.0.1:9000 --headless -u 8 -t 1m

A streamed chat is one entry, "chat: whole answer", and two more series: "chat: first token" and "chat: between tokens"
(one event for every gap: a request's mean would hide a step that stalled). Every stream is checked, and one that breaks
the protocol is a failure with its reason. README.md beside this file says what the columns mean.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-call"
# Locust has types, but not for its hooks.

from __future__ import annotations

import itertools
import json
import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from locust import HttpUser, constant, events, task
from locust.argument_parser import LocustArgumentParser
from locust.clients import ResponseContextManager
from locust.env import Environment
from locust.exception import StopUser
from locust.runners import WorkerRunner
from locust.stats import StatsEntry
from requests import RequestException

FIRST = "chat: first token"
BETWEEN = "chat: between tokens"
WHOLE = "chat: whole answer"
COMPLETION = "completion: whole answer"
STREAM = "STREAM"
"""Type of the series that are no HTTP requests of their own."""

PERCENTILES = (0.50, 0.95, 0.99)
PROMPT_WORDS = (8, 96)
"""Shortest and longest prompt."""
WORDS = (
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state",
    "family", "student", "group", "country", "problem", "hand", "part", "place", "case", "week", "company", "system",
)  # fmt: skip


@events.init_command_line_parser.add_listener
def add_arguments(parser: LocustArgumentParser) -> None:
    group = parser.add_argument_group("Language model")
    group.add_argument("--model", default="", help="Model to ask (default: the first of /v1/models)")
    group.add_argument("--max-tokens", type=int, default=64, help="Longest answer, in tokens (default: %(default)s)")
    group.add_argument(
        "--system-tokens",
        type=int,
        default=0,
        help="Length, about, of a system prompt that all chats share; 0 for none (default: %(default)s)",
    )
    group.add_argument("--api-key", default="", env_var="PAGODA_API_KEY", help="Key the server asks for")
    group.add_argument(
        "--seed", type=int, default=0, help="Seed of the prompts and of the sampling (default: %(default)s)"
    )


# ── what a user asks ──────────────────────────────────────────────────────────────────────────────────────────────────


def words(source: random.Random, count: int) -> str:
    """`count` common words: about as many tokens."""
    return " ".join(source.choices(WORDS, k=count))


class ModelUser(HttpUser):
    """A user who asks again as soon as it is answered: there are as many requests in flight as users."""

    abstract = True
    wait_time = constant(0)
    numbers: ClassVar[itertools.count[int]] = itertools.count()

    def on_start(self) -> None:
        options = self.environment.parsed_options
        worker = getattr(self.environment.runner, "worker_index", 0)
        self.source = random.Random(f"{options.seed}/{worker}/{next(self.numbers)}")
        self.system = words(random.Random(options.seed), options.system_tokens)
        self.max_tokens: int = options.max_tokens
        if options.api_key:
            self.client.headers["authorization"] = f"Bearer {options.api_key}"
        self.model: str = options.model or self.first_model()

    def first_model(self) -> str:
        with self.client.get("/v1/models", catch_response=True) as response:
            models = response.json()["data"] if response.status_code == 200 else []
            if not models:
                response.failure(refusal(response) or "the server has no model loaded")
                raise StopUser
            return str(models[0]["id"])

    def prompt(self) -> str:
        return words(self.source, self.source.randint(*PROMPT_WORDS))

    def body(self, **fields: Any) -> dict[str, Any]:
        seed = self.source.getrandbits(31)
        return {"model": self.model, "max_tokens": self.max_tokens, "temperature": 0.7, "seed": seed, **fields}


class ChatUser(ModelUser):
    """Streams chats."""

    weight = 4

    @task
    def chat(self) -> None:
        messages = [{"role": "system", "content": self.system}] if self.system else []
        messages.append({"role": "user", "content": f"Tell a story with these words: {self.prompt()}"})
        body = self.body(messages=messages, stream=True, stream_options={"include_usage": True})
        stream = Stream(began=time.perf_counter())
        with self.client.post(
            "/v1/chat/completions", name=WHOLE, json=body, stream=True, catch_response=True
        ) as response:
            problem = refusal(response) or broken(stream, response) or stream.problem(self.max_tokens)
            report(response, stream.seconds, stream.num_tokens, problem)
        if not problem:
            self.measure(stream)

    def measure(self, stream: Stream) -> None:
        """The series beside "whole answer"; a stream that broke the protocol adds nothing to them."""
        for name, seconds in stream.latencies():
            self.environment.events.request.fire(
                request_type=STREAM,
                name=name,
                response_time=1000 * seconds,
                response_length=0,
                exception=None,
                context=self.context(),
            )


class CompletionUser(ModelUser):
    """Asks for completions in one piece."""

    weight = 1

    @task
    def complete(self) -> None:
        began = time.perf_counter()
        body = self.body(prompt=self.prompt())
        with self.client.post("/v1/completions", name=COMPLETION, json=body, catch_response=True) as response:
            problem = refusal(response)
            answer = {} if problem else response.json()
            tokens = 0 if problem else int(answer["usage"]["completion_tokens"])
            reasons = [choice["finish_reason"] for choice in answer.get("choices", [])]
            problem = problem or wrong_end(reasons, tokens, self.max_tokens)
            report(response, time.perf_counter() - began, tokens, problem)


# ── what comes back ───────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Stream:
    """What one streamed answer held, as far as it came. Times are `time.perf_counter()` seconds."""

    began: float
    ended: float = 0.0
    times: list[float] = field(default_factory=list)
    """When each piece of text came. Tokens that a slow reader finds together are one piece."""
    num_pieces: int = 0
    """Pieces with or without text: a token that completes no character has none."""
    finish_reasons: list[str] = field(default_factory=list)
    usages: list[int] = field(default_factory=list)
    """`completion_tokens` of every usage sent."""
    num_done: int = 0
    after_done: int = 0
    error: str | None = None

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    @property
    def num_tokens(self) -> int:
        return sum(self.usages)

    def latencies(self) -> Iterator[tuple[str, float]]:
        """(series, seconds): one until the first text, and one for each gap after it."""
        for earlier, later in itertools.pairwise([self.began, *self.times]):
            yield (FIRST if later is self.times[0] else BETWEEN), later - earlier

    def take(self, lines: Iterable[bytes]) -> None:
        """Read server-sent events to their end."""
        for line in lines:
            self.ended = time.perf_counter()
            if line.startswith(b"data: "):
                self._event(line[6:])

    def _event(self, data: bytes) -> None:
        self.after_done += self.num_done
        if data == b"[DONE]":
            self.num_done += 1
            return
        chunk = json.loads(data)
        if "error" in chunk:
            self.error = str(chunk["error"]["message"])
            return
        if chunk.get("usage"):
            self.usages.append(int(chunk["usage"]["completion_tokens"]))
        for choice in chunk["choices"]:
            self._choice(choice)

    def _choice(self, choice: dict[str, Any]) -> None:
        delta = choice["delta"]
        if choice["finish_reason"] is not None:
            self.finish_reasons.append(choice["finish_reason"])
        if "content" not in delta or "role" in delta:
            return
        self.num_pieces += 1
        if delta["content"]:
            self.times.append(self.ended)

    def problem(self, max_tokens: int) -> str | None:
        """What is wrong with the stream, or None."""
        if self.error is not None:
            return f"the stream ended with an error: {self.error}"
        if self.num_done != 1 or self.after_done:
            return f"[DONE] came {self.num_done} times, with {self.after_done} events after it"
        if len(self.usages) != 1:
            return f"usage came {len(self.usages)} times"
        if self.num_pieces > self.num_tokens:
            return f"usage says fewer tokens than pieces came: {self.num_tokens} and {self.num_pieces}"
        if not self.times and self.num_tokens > 1:
            return "the stream held no text"
        return wrong_end(self.finish_reasons, self.num_tokens, max_tokens)


def broken(stream: Stream, response: ResponseContextManager) -> str | None:
    """Read the stream; the reason when it broke off or could not be understood."""
    try:
        stream.take(response.iter_lines())
    except (RequestException, ValueError, KeyError, TypeError) as error:
        stream.ended = time.perf_counter()
        response.close()
        return f"the stream broke: {type(error).__name__}: {error}"
    return None


def wrong_end(reasons: list[str], tokens: int, max_tokens: int) -> str | None:
    """How the end of an answer contradicts its length, or None."""
    if len(reasons) != 1:
        return f"finish_reason came {len(reasons)} times: {reasons}"
    if reasons[0] not in ("stop", "length"):
        return f"finish_reason is {reasons[0]!r}"
    if tokens > max_tokens or (reasons[0] == "length" and tokens != max_tokens):
        return f"finish_reason {reasons[0]!r} with {tokens} tokens of at most {max_tokens}"
    return None


def refusal(response: ResponseContextManager) -> str | None:
    """The server's own words when it refused, or why nothing came."""
    if response.status_code == 200:
        return None
    if response.error is not None:
        return f"no answer: {response.error}"
    try:
        return f"{response.status_code}: {response.json()['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"{response.status_code}: {response.text[:200]}"


def report(response: ResponseContextManager, seconds: float, tokens: int, problem: str | None) -> None:
    """Count the request until its last event, with its tokens as length; left alone, Locust stops at the head."""
    meta: Any = response.request_meta
    if seconds > 0:
        meta["response_time"] = 1000 * seconds
    meta["response_length"] = tokens
    if problem:
        response.failure(problem)
    else:
        response.success()


# ── the end of a run ──────────────────────────────────────────────────────────────────────────────────────────────────


@events.test_stop.add_listener
def print_summary(environment: Environment, **_: Any) -> None:
    if isinstance(environment.runner, WorkerRunner):
        return  # the master has everybody's numbers
    series = ((FIRST, STREAM), (BETWEEN, STREAM), (WHOLE, "POST"), (COMPLETION, "POST"))
    entries = [environment.stats.entries[key] for key in series if key in environment.stats.entries]
    print(f"\n{'milliseconds':26}{'P50':>8}{'P95':>8}{'P99':>8}{'count':>9}")
    for entry in entries:
        numbers = "".join(f"{entry.get_response_time_percentile(p):8.0f}" for p in PERCENTILES)
        print(f"{entry.name:26}{numbers}{entry.num_requests:9}")
    tokens, seconds = produced([entry for entry in entries if entry.method != STREAM])
    print(f"\noutput tokens/s: {tokens / seconds if seconds else 0:.1f} ({tokens} tokens in {seconds:.1f} s)\n")


def produced(entries: list[StatsEntry]) -> tuple[int, float]:
    """Output tokens of the run, and its seconds from the start to the last answer."""
    tokens = sum(entry.total_content_length for entry in entries)
    ends = [entry.last_request_timestamp for entry in entries if entry.last_request_timestamp]
    return tokens, max(ends) - min(entry.start_time for entry in entries) if ends else 0.0
