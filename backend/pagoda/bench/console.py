"""Where `pagoda bench` prints and writes: as wide as the terminal, wide enough for every table in a file or a pipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from pagoda.errors import ConfigError, PagodaError

WIDTH = 120

console = Console(highlight=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDTH)


@contextmanager
def clear_errors() -> Iterator[None]:
    """What we raise on purpose is shown as a sentence, not as a stack."""
    try:
        yield
    except PagodaError as error:
        console.print(f"[red]error:[/red] {escape(error.message)}", soft_wrap=True)
        raise typer.Exit(1) from None


class ClearErrors(TyperGroup):
    """Commands whose errors are sentences."""

    def invoke(self, ctx: Any) -> Any:
        with clear_errors():
            return super().invoke(ctx)


def writable(option: typer.CallbackParam, file: Path | None) -> Path | None:
    """An option's callback: a file that could not be written is refused before anything is measured, not after."""
    if file is not None:
        try:
            is_new = not file.exists()
            file.open("ab").close()
            if is_new:
                file.unlink()
        except OSError as error:
            name, remedy = option.opts[0].lstrip("-"), "give a file in a folder of yours"
            raise ConfigError(f"{name} = {str(file)!r} cannot be written: {error.strerror}; {remedy}") from None
    return file
