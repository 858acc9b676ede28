"""`pagoda bench`: measurements, each beside its peer."""

from __future__ import annotations

import typer

app = typer.Typer(no_args_is_help=True, help="Measure.")


@app.callback()
def bench() -> None:
    """Measure."""
