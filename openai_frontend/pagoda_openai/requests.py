"""The requests of both endpoints, typed. Checked strictly: no number in a string, no true for 1.

Each field says what it means, what it may hold and who defined it: docs/api.md is made of that. Ranges of numbers stand
in `pagoda.sampling_params.RANGES`, where the engine checks them too. Null is the same as leaving a field out.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import msgspec
from pagoda import sampling_params as bounds
from pagoda.errors import InvalidRequest
from pagoda.text.bad_words import MAX_WORD_CHARS, MAX_WORDS
from pagoda.text.parameters import MAX_STOP_CHARS, MAX_STOPS
from pagoda.text.structured_outputs import KEYS

MAX_PROMPTS = 256
"""Prompts in one completion request."""
MAX_MESSAGES = 2048
"""Messages in one conversation."""
ROLES = ("system", "developer", "user", "assistant", "tool")
"""Who speaks a message."""


def openai(meaning: str, allowed: str = "", default: str = "") -> msgspec.Meta:
    """A field of OpenAI's. `allowed` and `default` say in words what the type and its default do not."""
    return _field("OpenAI", meaning, allowed, default)


def vllm(meaning: str, allowed: str = "", default: str = "") -> msgspec.Meta:
    """A field of vLLM's server."""
    return _field("vLLM", meaning, allowed, default)


def own(meaning: str, allowed: str = "", default: str = "") -> msgspec.Meta:
    """A field of Pagoda's own."""
    return _field("Pagoda", meaning, allowed, default)


def _field(source: str, meaning: str, allowed: str, default: str) -> msgspec.Meta:
    return msgspec.Meta(description=meaning, extra={"source": source, "allowed": allowed, "default": default})


MODEL_DEFAULT = "the model's generation_config.json, else {}"


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool = False
    continuous_usage_stats: Any = None
    """Refused unless it is false."""


class SamplingFields(msgspec.Struct, kw_only=True):
    """What both endpoints share."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Values that ask for nothing on this endpoint alone, for fields of `refused.NEUTRAL`."""

    model: Annotated[str, openai("The model's name, as /v1/models lists it.")]
    stream: Annotated[bool | None, openai("Answer by server-sent events as tokens come.", default="false")] = None
    stream_options: Annotated[
        StreamOptions | None,
        openai("`include_usage`: a last chunk with the usage.", "an object, only with stream", "none"),
    ] = None
    n: Annotated[
        int | None,
        openai(
            "Answers to each prompt. They share the prompt's memory; with a seed, answer i draws by seed + i.", "", "1"
        ),
    ] = None
    temperature: Annotated[
        float | None, openai("0 is greedy; above 1 flattens the distribution.", default=MODEL_DEFAULT.format(1))
    ] = None
    top_p: Annotated[
        float | None,
        openai("Draw from the fewest tokens that hold this much probability.", default=MODEL_DEFAULT.format(1)),
    ] = None
    top_k: Annotated[
        int | None,
        vllm("Draw from this many most likely tokens; 0 and -1 turn it off.", default=MODEL_DEFAULT.format(0)),
    ] = None
    min_p: Annotated[
        float | None,
        vllm("Draw from tokens at least this likely, relative to the best one.", default=MODEL_DEFAULT.format(0)),
    ] = None
    seed: Annotated[
        int | None, openai("The same seed draws the same tokens, whatever else runs.", default="a new one each time")
    ] = None
    presence_penalty: Annotated[
        float | None, openai("Taken from the logit of each token that the output holds.", default="0")
    ] = None
    frequency_penalty: Annotated[
        float | None, openai("Taken from a token's logit for each time that the output holds it.", default="0")
    ] = None
    repetition_penalty: Annotated[
        float | None,
        vllm(
            "Above 1 makes tokens of prompt and output less likely ([CTRL](https://arxiv.org/abs/1909.05858)).",
            default=MODEL_DEFAULT.format(1),
        ),
    ] = None
    logit_bias: Annotated[
        dict[str, float] | None,
        openai(
            "Token id, as a string, to what is added to its logit.",
            f"at most {bounds.MAX_LOGIT_BIAS} ids of the vocabulary, values {bounds.BIAS_RANGE}",
            "none",
        ),
    ] = None
    allowed_token_ids: Annotated[
        list[int] | None, vllm("Only these tokens may come.", "at least one id of the vocabulary", "every token")
    ] = None
    bad_words: Annotated[
        list[str] | None,
        vllm(
            "Texts that must not come, as tokenized with and without a space before them.",
            f"at most {MAX_WORDS} strings of 1 to {MAX_WORD_CHARS} characters, each at most "
            f"{bounds.MAX_BAD_WORD_TOKENS} tokens",
            "none",
        ),
    ] = None
    min_tokens: Annotated[
        int | None, vllm("Output tokens before which nothing ends the answer. At most max_tokens.", default="0")
    ] = None
    stop: Annotated[
        str | list[str] | None,
        openai(
            "Texts that end the answer; found across token borders.",
            f"a string or at most {MAX_STOPS}, of 1 to {MAX_STOP_CHARS} characters",
            "none",
        ),
    ] = None
    include_stop_str_in_output: Annotated[
        bool | None, vllm("Show the stop string too, or the text of the stop token.", default="false")
    ] = None
    stop_token_ids: Annotated[
        list[int] | None,
        vllm(
            "Tokens that end the answer, which leaves their text out.",
            f"at most {bounds.MAX_STOP_TOKEN_IDS} ids of the vocabulary",
            "none",
        ),
    ] = None
    ignore_eos: Annotated[bool | None, vllm("Go on after the model's own end of text.", default="false")] = None
    skip_special_tokens: Annotated[bool | None, vllm("Leave control tokens out of the text.", default="true")] = None
    prompt_logprobs: Annotated[
        int | None,
        vllm(
            "Log-probabilities of the prompt's tokens, with this many alternatives each. Not with stream.",
            default="not reported",
        ),
    ] = None
    response_format: Annotated[
        dict[str, Any] | None,
        openai("Make the whole output JSON.", "`text`, `json_object`, or `json_schema` with a schema", "`text`"),
    ] = None
    structured_outputs: Annotated[
        dict[str, Any] | None,
        vllm("Make the whole output follow a structure.", f"one of {', '.join([f'`{k}`' for k in KEYS])}", "none"),
    ] = None
    truncate_prompt_tokens: Annotated[
        int | None, vllm("Keep only this many of the prompt's last tokens.", "integer, at least 1", "the whole prompt")
    ] = None
    priority: Annotated[int | None, vllm("Lower runs first.", default="0")] = None
    timeout: Annotated[
        float | None, own("Seconds after which the request ends by an error (504).", default="no deadline")
    ] = None
    cache_salt: Annotated[
        str | None,
        vllm(
            "Only requests with the same salt share cached prompts.",
            f"at most {bounds.MAX_SALT_CHARS} characters",
            "empty",
        ),
    ] = None

    @property
    def streams(self) -> bool:
        return bool(self.stream)

    @property
    def include_usage(self) -> bool:
        """Raises InvalidRequest for stream options without a stream, or not available."""
        if self.stream_options is None:
            return False
        if not self.streams:
            raise InvalidRequest("stream_options is allowed only when stream is true", field="stream_options")
        if self.stream_options.continuous_usage_stats not in (None, False):
            raise InvalidRequest(
                "stream_options.continuous_usage_stats is not available here: send include_usage for the usage at the "
                "stream's end",
                field="stream_options",
            )
        return self.stream_options.include_usage


class CompletionRequest(SamplingFields, kw_only=True):
    """POST /v1/completions."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {"add_special_tokens": (True,)}

    prompt: Annotated[
        str | list[str | int | list[int]],
        openai("A text, token ids, or a list of either.", f"1 to {MAX_PROMPTS} prompts, none empty"),
    ]
    max_tokens: Annotated[
        int | None,
        openai("Output tokens at most. Prompt and output must fit the context; null asks for all that is left of it."),
    ] = 16
    best_of: Annotated[
        int | None,
        openai(
            "Answers to generate, of which the `n` with the highest mean log-probability of a token are shown. Not "
            "with stream.",
            f"integer from n to {bounds.RANGES['n'].high:.0f}",
            "n",
        ),
    ] = None
    echo: Annotated[bool | None, openai("Show the prompt before the answer.", default="false")] = None
    logprobs: Annotated[
        int | None,
        openai(
            "Log-probabilities of the shown tokens, with this many alternatives each.",
            f"integer {bounds.RANGES['logprobs']} (OpenAI: up to 5)",
            "not reported",
        ),
    ] = None


class TextPart(msgspec.Struct, frozen=True):
    type: str
    text: str | None = None

    def shown(self, where: str) -> str:
        """The part's text. Raises InvalidRequest, saying `where`, for a part that is none."""
        if self.type != "text":
            raise InvalidRequest(
                f"{where} is of type {self.type[:40]!r}: only parts of type 'text' are available here", field="messages"
            )
        if self.text is None:
            raise InvalidRequest(f"{where} is of type 'text' and has no text: give it one", field="messages")
        return self.text


class ChatMessage(msgspec.Struct, frozen=True):
    role: str
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[Any] | None = None
    function_call: Any = None
    audio: Any = None

    def text(self, where: str) -> str:
        """The message's text. Raises InvalidRequest, saying `where`, for what is not text, or of no known role."""
        if self.role not in ROLES:
            allowed = ", ".join(map(repr, ROLES))
            raise InvalidRequest(f"{where}.role must be one of {allowed}; not {self.role[:40]!r}", field="messages")
        for name in ("tool_calls", "function_call", "audio"):
            if getattr(self, name):
                raise InvalidRequest(f"{where}.{name} is not available here: send messages of text", field="messages")
        if self.content is None:
            raise InvalidRequest(f"{where}, of the {self.role}, has no content: give it a text", field="messages")
        if isinstance(self.content, str):
            return self.content
        return "".join([part.shown(f"{where}.content[{i}]") for i, part in enumerate(self.content)])


class ChatRequest(SamplingFields, kw_only=True):
    """POST /v1/chat/completions."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {"add_special_tokens": (False,)}

    messages: Annotated[
        list[ChatMessage],
        openai(
            "The conversation, laid out by the model's chat template.",
            f"1 to {MAX_MESSAGES} messages with `role`, `content` (a text or text parts) and perhaps `name`",
        ),
    ]
    max_tokens: Annotated[int | None, openai("Output tokens at most.", default="what is left of the context")] = None
    max_completion_tokens: Annotated[
        int | None,
        openai("The newer name of max_tokens; it wins.", f"integer {bounds.RANGES['max_tokens']}", "max_tokens"),
    ] = None
    logprobs: Annotated[
        bool | None, openai("Report the log-probability of each shown token.", "true or false", "false")
    ] = None
    top_logprobs: Annotated[
        int | None,
        openai("Alternatives reported at each token.", f"integer {bounds.RANGES['logprobs']}, only with logprobs", "0"),
    ] = None

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
