"""A structure's text as a grammar that llguidance reads. Runs in the trial's child process only."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec
from llguidance import LLMatcher, regex_to_lark
from llguidance.gbnf_to_lark import any_to_lark

from pagoda.sampling_params import Structure

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

WHITESPACE = r"(\n {0,16}| )"
"""Between JSON's tokens: nothing, one space, or one line break with an indent. Whitespace without an end, which models
fall into at high temperatures, is not possible."""

_JSON_OPTIONS: JsonCompileOptions = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_flexible": True,
    "whitespace_pattern": WHITESPACE,
    "coerce_one_of": False,
    "lenient": False,
}


def grammar_of(structure: Structure) -> str:
    """Raises ValueError, in words for the user, when the text is not of its kind."""
    return _BUILDERS[structure.kind](structure.text)


def _json_schema(text: str) -> str:
    schema = _decoded(text)
    if not isinstance(schema, dict) and schema is not True:
        raise ValueError("it must be a JSON object")
    # As text, in which the order of properties is kept and numbers stay as they were written.
    return LLMatcher.grammar_from_json_schema("{}" if schema is True else text, overrides=_JSON_OPTIONS)


def _decoded(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except msgspec.DecodeError as error:
        raise ValueError(f"it is not valid JSON: {error}") from None


def _json_object(text: str) -> str:
    return _json_schema('{"type": "object"}')


def _regex(text: str) -> str:
    """`\\d` is an ASCII digit: other scripts' digits are not what a program reads as a number."""
    return _lark_grammar(f"start: /{regex_to_lark(text, 'd')}/")


def _choice(text: str) -> str:
    choices = _decoded(text)
    if not isinstance(choices, list) or not choices or not all(isinstance(c, str) and c for c in choices):
        raise ValueError("it must be a list of strings, none of them empty")
    # One terminal, so that many choices make one automaton and not as many rules.
    return _lark_grammar("start: CHOICE\nCHOICE: " + " | ".join(map(_quoted, dict.fromkeys(choices))))


def _quoted(choice: str) -> str:
    return json.dumps(choice, ensure_ascii=False).replace("\x7f", "\\u007f")


def _lark(text: str) -> str:
    """Lark's syntax as llguidance has it; GBNF (llama.cpp's EBNF, `root ::= …`) is converted."""
    if "::=" not in text:
        return _lark_grammar(text)
    try:
        return _lark_grammar(any_to_lark(text))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except Exception as error:  # the converter raises nothing narrower
        raise ValueError(f"it looks like GBNF and cannot be read as such: {error}") from None


def _lark_grammar(lark: str) -> str:
    return json.dumps({"grammars": [{"lark_grammar": lark}]})


_BUILDERS: dict[str, Callable[[str], str]] = {
    "json_schema": _json_schema,
    "json_object": _json_object,
    "regex": _regex,
    "choice": _choice,
    "lark": _lark,
}
