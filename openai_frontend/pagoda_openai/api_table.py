"""docs/api.md's tables, made from the request types: `python -m pagoda_openai.api_table docs/api.md` writes them anew.

Everything between the two marks of the page is replaced; the words around them are written by hand.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
from pagoda.sampling_params import RANGES

from pagoda_openai.refused import IGNORED, NEUTRAL
from pagoda_openai.requests import ChatRequest, CompletionRequest, SamplingFields

BEGIN = "<!-- begin: python -m pagoda_openai.api_table docs/api.md -->\n"
END = "<!-- end -->\n"
HEAD = "| field | meaning | range | default | source |\n| --- | --- | --- | --- | --- |\n"
TYPES = {int: "integer", float: "number", bool: "true or false", str: "text"}


def tables() -> str:
    """The Markdown of all tables."""
    shared = SamplingFields.__struct_fields__
    return "\n".join(
        [
            "### Both endpoints\n",
            _table(SamplingFields, shared),
            "### `/v1/completions` alone\n",
            _table(CompletionRequest, _own_fields(CompletionRequest)),
            "### `/v1/chat/completions` alone\n",
            _table(ChatRequest, _own_fields(ChatRequest)),
            "### Refused unless they ask for nothing\n",
            f"{_names(NEUTRAL)}; of these, `best_of` and `echo` are served by `/v1/completions`, `top_logprobs` and "
            "`max_completion_tokens` by `/v1/chat/completions`. In `stream_options`, `continuous_usage_stats` is "
            "refused alike. Null asks for nothing, as does what is done anyway: `add_special_tokens` is true in "
            "completions and false in chats, `truncation_side` is `left`, `include_reasoning` true.\n",
            "### Taken and without effect\n",
            f"{_names(sorted(IGNORED))}.\n",
        ]
    )


def updated(page: str) -> str:
    """The page with its tables made anew. Raises ValueError when the page has no place for them."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page must hold the lines {BEGIN.strip()!r} and {END.strip()!r}")
    return f"{before}{begin}\n{tables()}\n{end}{after}"


def _own_fields(kind: type[SamplingFields]) -> tuple[str, ...]:
    return tuple(name for name in kind.__struct_fields__ if name not in SamplingFields.__struct_fields__)


def _table(kind: type[msgspec.Struct], names: tuple[str, ...]) -> str:
    hints = get_type_hints(kind, include_extras=True)
    defaults = {f.name: f.default for f in msgspec.structs.fields(kind)}
    return HEAD + "".join([_row(name, hints[name], defaults[name]) for name in names])


def _row(name: str, hint: Any, default: Any) -> str:
    if get_origin(hint) is not Annotated:
        raise TypeError(f"the field {name} needs a description: Annotated[…, openai(…)]")
    kind, meta = get_args(hint)
    extra = meta.extra
    allowed = extra["allowed"] or _range(name, kind)
    shown = extra["default"] or ("required" if default is msgspec.NODEFAULT else str(default))
    return f"| `{name}` | {meta.description} | {allowed} | {shown} | {extra['source']} |\n"


def _range(name: str, kind: Any) -> str:
    types = [part for part in _parts(kind) if part is not NoneType]
    words = " or ".join([TYPES[part] for part in types])
    return f"{words} {RANGES[name]}" if name in RANGES else words


def _parts(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType, Literal) else (kind,)


def _names(names: Any) -> str:
    return ", ".join([f"`{name}`" for name in names])


def main() -> None:
    path = Path(sys.argv[1])
    path.write_text(updated(path.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
