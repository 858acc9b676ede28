"""The wire between a session's client and the engine: msgpack, typed once, torch-free.

A *session* is one open decoupled Triton request. Its client sends `Frame`s, each in a small infer request of its own;
everything the engine has to say comes back through the session's response sender, one payload per engine step.

    client ──Frame(session, kind, body)──> stub ──same bytes──> engine      body: list[ClientMessage]
    client <──────── payload ──────────── stub <── same bytes ── engine      payload: list[EngineMessage]

The stub reads a frame's head only (`FrameHead`), and nothing at all of a payload.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from pagoda.sampling_params import SamplingParams

VERSION = 1
MAX_FRAME_BYTES = 16 << 20
"""A frame larger than this is refused unread (a prompt of a million tokens takes 5 MB)."""

FinishReason = Literal["stop", "length", "abort"]
AbortReason = Literal["client_gone", "stop_string", "deadline", "unload", "slow_client"]


# ── client to engine ──────────────────────────────────────────────────────────────────────────────────────────────


class Open(msgspec.Struct, tag="open", frozen=True):
    """Begin a session. Answered by `Ready` once the engine can serve."""

    version: int
    client: str


class Generate(msgspec.Struct, tag="generate", frozen=True, omit_defaults=True):
    """`n` answers to one prompt, the requests id … id + n - 1. Ids are the client's own, unique in its session.

    The answers share the prompt's blocks. With a seed, answer i draws with seed + i.
    """

    id: int
    prompt_ids: list[int]
    params: SamplingParams
    cache_salt: str = ""
    n: int = 1
    priority: int = 0
    """Lower runs first."""
    timeout: float | None = None
    """Seconds from admission after which the request ends by DeadlineExceeded."""


class Abort(msgspec.Struct, tag="abort", frozen=True, omit_defaults=True):
    """End a request. With `stop_string` it counts as finished by `stop`, with `tokens_kept` output tokens."""

    id: int
    reason: AbortReason
    tokens_kept: int | None = None


class Ping(msgspec.Struct, tag="ping", frozen=True):
    """Sign of life and credit: `acked` is the number of payloads this client has read."""

    nonce: int
    acked: int


class Close(msgspec.Struct, tag="close", frozen=True):
    """End the session; what is still running in it is aborted."""


ClientMessage = Open | Generate | Abort | Ping | Close


class Frame(msgspec.Struct, array_like=True, frozen=True):
    session: str
    """128 random bits in hex, chosen by the client: nobody else can name it."""
    kind: Literal["open", "data"]
    messages: list[ClientMessage]


class FrameHead(msgspec.Struct, array_like=True, frozen=True):
    """A frame whose messages stay undecoded: all that the stub reads."""

    session: str
    kind: Literal["open", "data"]
    messages: msgspec.Raw


# ── engine to client ──────────────────────────────────────────────────────────────────────────────────────────────


class ModelFacts(msgspec.Struct, frozen=True):
    """What a client must know of the model to prepare requests for it."""

    name: str
    folder: str
    """The model's folder on this host, for its tokenizer and chat template."""
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    default_params: SamplingParams
    """From generation_config.json; a request's own fields replace them."""


class Ready(msgspec.Struct, tag="ready", frozen=True):
    facts: ModelFacts
    epoch: int
    """Grows by one at each start of the engine."""


class Usage(msgspec.Struct, array_like=True, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class TokenLogprob(msgspec.Struct, array_like=True, frozen=True):
    """Natural logarithm of a token's probability by the model itself: before penalties, masks and temperature."""

    token_id: int
    logprob: float
    rank: int
    """1 for the most likely token."""
    top: list[tuple[int, float]] = []
    """The most likely tokens, best first, as (id, logprob)."""


class Output(msgspec.Struct, array_like=True, frozen=True):
    """New tokens of one request in one payload."""

    id: int
    index: int
    """Position of the first new token in the request's output."""
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    """Comes with the first tokens and with the finish reason."""
    logprobs: list[TokenLogprob] | None = None
    """One for each of `token_ids`, where asked for."""
    prompt_logprobs: list[TokenLogprob] | None = None
    """With the first tokens, where asked for: one for each prompt token but the first."""


class Tokens(msgspec.Struct, tag="tokens", frozen=True):
    step: int
    outputs: list[Output]


class Failed(msgspec.Struct, tag="failed", frozen=True, omit_defaults=True):
    """A request's end by an error; `code` names a class of pagoda.errors."""

    id: int
    code: str
    message: str
    field: str | None = None


class Pong(msgspec.Struct, tag="pong", frozen=True):
    """The engine's pulse; `is_frozen` judges it."""

    nonce: int
    step: int
    busy: bool
    seconds_since_step: float
    longest_step: float


class Histogram(msgspec.Struct, array_like=True):
    """Cumulative since start. `counts[i]` observations lie in (bounds[i-1], bounds[i]]; the last beyond all bounds."""

    bounds: list[float]
    counts: list[int]
    sum: float = 0.0


class Metrics(msgspec.Struct, tag="metrics"):
    """A whole snapshot, cumulative since the engine's start; names without their prefix."""

    gauges: dict[str, float]
    counters: dict[str, float]
    finished: dict[str, int]
    """Requests ended, by finish reason."""
    histograms: dict[str, Histogram]


class Down(msgspec.Struct, tag="down", frozen=True):
    """Said by the stub: the engine is gone, every request in flight has ended with it. `Ready` follows a restart."""

    reason: str


class Closed(msgspec.Struct, tag="closed", frozen=True):
    """The last message of a session."""

    reason: str


EngineMessage = Ready | Tokens | Failed | Pong | Metrics | Down | Closed

encode = msgspec.msgpack.Encoder().encode
decode_frame = msgspec.msgpack.Decoder(Frame).decode
decode_frame_head = msgspec.msgpack.Decoder(FrameHead).decode
decode_payload = msgspec.msgpack.Decoder(list[EngineMessage]).decode


def is_frozen(pong: Pong) -> bool:
    """True when the engine's loop has work and does not move."""
    return pong.busy and pong.seconds_since_step > max(5.0, 10 * pong.longest_step)
