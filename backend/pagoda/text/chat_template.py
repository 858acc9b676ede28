"""A model's chat template in the sandbox that transformers uses, with a bound on what one rendering may cost.

The template comes with the model and is trusted to mean well; what it is fed comes from anybody. So:

* inputs hold at most MAX_INPUT_CHARS characters and MAX_INPUT_VALUES values, nested at most MAX_DEPTH deep;
* the output holds at most MAX_OUTPUT_CHARS characters: more than any context holds, less than hurts;
* the rendering thread spends at most MAX_SECONDS of CPU time, looked at in the iterations of every loop, in macros and
  after chunks of output. Its own CPU time, so that a busy machine refuses nothing that an idle one renders;
* `range` is the sandbox's: at most 100,000 numbers.

A single expression is not interrupted; over inputs this small it takes milliseconds.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from pagoda.errors import CheckpointError, InvalidRequest

MAX_INPUT_CHARS = 4 * 2**20
MAX_INPUT_VALUES = 200_000
MAX_DEPTH = 64
MAX_OUTPUT_CHARS = 16 * 2**20
MAX_SECONDS = 2.0

_TICK = "_pagoda_tick"
_TICKS_PER_LOOK = 32
_REASONING = ("reasoning_content", "thinking", "reasoning")


class _RaisedByTemplate(jinja2.TemplateError):
    """The template refused its input through raise_exception."""


class _Exhausted(Exception):
    """The rendering reached one of its bounds; the text says which."""


class _Budget:
    """The CPU seconds and output characters that one rendering has left."""

    def __init__(self) -> None:
        self._deadline = time.thread_time() + MAX_SECONDS
        self._ticks = 0
        self._chars = 0

    def __call__(self) -> None:
        self._ticks += 1
        if self._ticks % _TICKS_PER_LOOK == 0:
            self._look()

    def spend(self, text: str) -> str:
        self._chars += len(text)
        if self._chars > MAX_OUTPUT_CHARS:
            raise _Exhausted(f"wrote more than {MAX_OUTPUT_CHARS} characters")
        self()
        return text

    def _look(self) -> None:
        if time.thread_time() > self._deadline:
            raise _Exhausted(f"took more than {MAX_SECONDS:g} seconds")


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with a tick at the head of every loop's and macro's body."""

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        bodies: list[nodes.For | nodes.Macro] = [*template.find_all(nodes.For), *template.find_all(nodes.Macro)]
        for node in bodies:
            node.body.insert(0, nodes.ExprStmt(_tick_call(), lineno=node.lineno))
        return template


def _tick_call() -> nodes.Call:
    return nodes.Call(nodes.Name(_TICK, "load"), [], [], None, None)


class _Generation(Extension):
    """`{% generation %}` marks the assistant's part for training; here its body is just rendered."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own way

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _TemplateNamespace(Namespace):
    """`namespace(...)` without underscore-prefixed attributes, as transformers has it."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # no `self`, so that an attribute may have that name
        attributes = dict(*args[1:], **kwargs)
        _refuse_private(attributes)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private([name])
        super().__setitem__(name, value)


def _refuse_private(names: Iterable[object]) -> None:
    for name in names:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot have an attribute {name!r}")


def _raise_exception(message: object) -> NoReturn:
    raise _RaisedByTemplate(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is; jinja2's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _environment() -> _Environment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "namespace": _TemplateNamespace,
    }
    return environment


class ChatTemplate:
    """A chat template, compiled once.

    Raises CheckpointError when `source` is not valid Jinja.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(
                f"The model's chat template cannot be compiled: {error}. Correct it in the model folder."
            ) from error

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text of the template for `variables`, which are plain JSON values (see `check_plain`).

        Raises InvalidRequest with the template's own words when it refuses the input, and with a plain sentence when it
        fails or reaches a bound.
        """
        try:
            return "".join(self._chunks(variables))
        except _RaisedByTemplate as error:
            reason = f"refuses these messages: {error}"
        except _Exhausted as error:
            reason = f"gave up on these messages: it {error}. Send less"
        except RecursionError:
            reason = "nests too deep on these messages"
        except Exception as error:
            reason = f"cannot render these messages: {_in_short(error)}"
        end = "" if reason.endswith((".", "!", "?")) else "."
        raise InvalidRequest(f"The model's chat template {reason}{end}", field="messages")

    def _chunks(self, variables: Mapping[str, Any]) -> Iterator[str]:
        budget = _Budget()
        for chunk in self._template.generate({**variables, _TICK: budget}):
            yield budget.spend(chunk)


def _in_short(error: Exception) -> str:
    first_line = str(error).partition("\n")[0]
    return f"{first_line[:200] or type(error).__name__}"


def conversation(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`messages` as templates expect them: absent rather than None, and reasoning under all the names it goes by."""
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InvalidRequest(f"messages[{number}] is a {type(message).__name__}. Send objects.", field="messages")
    return [
        _with_reasoning({key: value for key, value in message.items() if value is not None}) for message in messages
    ]


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    reasoning = next((message[key] for key in _REASONING if key in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def strings_of(value: Any, *, field: str) -> list[str]:
    """Every string in `value`, keys included, which must be plain JSON within this module's bounds.

    Raises InvalidRequest, naming `field` and the bound, when it is not.
    """
    found: list[str] = []
    level, values, characters = [value], 0, 0
    for _ in range(MAX_DEPTH):
        if not level:
            return found
        values += len(level)
        _bound(values, MAX_INPUT_VALUES, "values", field)
        strings: list[str] = []
        level = [child for item in level for child in _open(item, strings, field)]
        characters += sum(map(len, strings))
        _bound(characters, MAX_INPUT_CHARS, "characters", field)
        found += strings
    raise InvalidRequest(f"{field} is nested more than {MAX_DEPTH} levels deep. Send it flatter.", field=field)


def _open(item: Any, found: list[str], field: str) -> Iterable[Any]:
    """What is inside of `item`; a string goes to `found`."""
    if isinstance(item, str):
        found.append(item)
    elif isinstance(item, Mapping):
        return [*item.keys(), *item.values()]
    elif isinstance(item, (list, tuple)):
        return item
    elif item is not None and not isinstance(item, (bool, int, float)):
        raise InvalidRequest(f"{field} holds a {type(item).__name__}; only JSON values are allowed.", field=field)
    return ()


def _bound(given: int, allowed: int, what: str, field: str) -> None:
    if given > allowed:
        raise InvalidRequest(f"{field} holds {given} {what}; at most {allowed} are allowed. Send less.", field=field)
