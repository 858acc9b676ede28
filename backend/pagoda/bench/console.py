"""Where `pagoda bench` prints: as wide as the terminal, and wide enough for every table in a file or a pipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from pagoda.errors import PagodaError

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
