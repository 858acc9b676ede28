"""`pagoda bench`: measurements, each beside its peer."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from pagoda import hf_config
from pagoda.server import store

app = typer.Typer(no_args_is_help=True, help="Measure.")
console = Console(highlight=False)


@app.command()
def compare(
    model: Annotated[str, typer.Option(help="A folder, or a name in the store.")] = store.DEFAULT_MODEL,
    requests: Annotated[int, typer.Option(min=1)] = 64,
    lone_requests: Annotated[int, typer.Option(min=1, help="Requests of the one-at-a-time run (slow).")] = 16,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results there, too.")] = None,
) -> None:
    """The mixed load (16 to 256 tokens in, 32 to 256 out, greedy) by Pagoda and by transformers, in one run."""
    from pagoda.bench.compare import contestants, run
    from pagoda.bench.loads import mixed

    folder = store.resolve(model, relative_to=Path.cwd())
    vocab_size = hf_config.load(folder).vocab_size
    loads = mixed(requests, inputs=(16, 256), outputs=(32, 256), vocab_size=vocab_size)
    results = []
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console) as bar:
        for name, contender, count in contestants(lone_requests):
            task = bar.add_task(name, total=1)
            results.append(run(name, contender, str(folder), loads[:count]))
            bar.update(task, completed=1)
    slowest = results[-1].tokens_per_second
    table = Table("contender", "requests", "useful output tokens", "seconds", "tokens/s", "× one at a time")
    for r in results:
        row = (str(r.requests), str(r.useful_tokens), f"{r.seconds:.1f}", f"{r.tokens_per_second:.1f}")
        table.add_row(r.name, *row, f"{r.tokens_per_second / slowest:.1f}")
    console.print(table)
    console.print(f"{folder.name} on {platform.machine()}, Python {platform.python_version()}")
    if json_file is not None:
        json_file.write_bytes(msgspec.json.encode(results))


@app.command()
def scheduler() -> None:
    """Host time of one schedule and update at 256 running requests."""
    from pagoda.bench.scheduler import main

    main()
