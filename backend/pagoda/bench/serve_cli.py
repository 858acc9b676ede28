"""`pagoda bench serve` on the command line: what it asks for, and its tables."""

from __future__ import annotations

import platform
import random
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from pagoda import __version__, hf_config
from pagoda.bench.console import console
from pagoda.bench.loads import FIRST_ID
from pagoda.bench.options import ApiKey, writable
from pagoda.errors import ConfigError
from pagoda.server import store

if TYPE_CHECKING:
    from pagoda.bench.loads import OfflineLoad
    from pagoda.bench.serve import Target
    from pagoda.bench.serve_figures import Latencies, Result
    from pagoda.bench.serve_stream import Answer


BUSY = 0.8
"""Share of a core beyond which the client's own waiting shows in the latencies."""
REFRESHES = 2.0
"""Of the bar, a second: drawing takes the interpreter from the streams for about a millisecond."""
PLOT_FORMATS = (".png", ".svg", ".pdf")
NAMES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "end_to_end": "end to end"}


class Report(msgspec.Struct, frozen=True):
    """What --json holds: the command's parameters as they were resolved, and every figure."""

    parameters: dict[str, Any]
    client: dict[str, str]
    began: str
    results: list[Result]


def serve(
    url: Annotated[str, typer.Option(help="The server, with or without its /v1.")] = "http://127.0.0.1:9000",
    model: Annotated[str | None, typer.Option(help="Name in the API; by default the first of /v1/models.")] = None,
    load: Annotated[
        list[str] | None,
        typer.Option(help="cpu, gpu, or loads whose name begins so, like 64x128; repeatable.", show_default="cpu"),
    ] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Most requests at once, in place of a load's.")] = None,
    request_rate: Annotated[float | None, typer.Option(min=1e-3, help="Poisson arrivals a second.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of prompts and arrivals; one used before meets caches.")] = None,
    vocab_size: Annotated[
        str, typer.Option(help="Token ids are drawn below it: a number, or a model's folder or name in the store.")
    ] = store.DEFAULT_MODEL,
    api_key: ApiKey = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", callback=writable, help="Write parameters and figures there, too.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(callback=writable, help="TTFT and ITL as cumulative curves: .png, .svg, .pdf.")
    ] = None,
) -> None:
    """Any OpenAI-compatible server through HTTP, streamed and greedy, under the loads of `offline`."""
    from pagoda.bench.serve import Target, chosen
    from pagoda.openai_stream import first_model, root

    draw, url = _plotter(plot), root(url)
    loads = chosen(load or ["cpu"])
    target = Target(url, model or first_model(url, api_key), _vocab_size(vocab_size), api_key)
    seed = random.SystemRandom().randrange(1 << 32) if seed is None else seed
    parameters = {
        "url": url, "model": target.model, "loads": [one.name for one in loads], "concurrency": concurrency,
        "request_rate": request_rate, "seed": seed, "vocab_size": target.vocab_size,
    }  # fmt: skip
    client = {"pagoda": __version__, "python": platform.python_version(), "machine": platform.machine()}
    began = datetime.now(timezone.utc).isoformat(timespec="seconds")
    measured = _measured(target, loads, concurrency, request_rate, seed)
    results = [result for result, _ in measured]
    _show(results, target)
    if json_file is not None:
        json_file.write_bytes(msgspec.json.encode(Report(parameters, client, began, results)))
    draw(f"{target.model} at {url}", {result.load: taken for result, taken in measured})
    if any(result.failures for result in results):
        raise typer.Exit(1)


def _vocab_size(given: str) -> int:
    if not given.isdecimal():
        return hf_config.load(store.resolve(given, relative_to=Path.cwd())).vocab_size
    if int(given) <= FIRST_ID:
        raise ConfigError(f"vocab_size = {given}: prompts are drawn from the ids from {FIRST_ID} on, give a larger one")
    return int(given)


def _plotter(file: Path | None) -> Callable[[str, dict[str, Latencies]], None]:
    """Raises ConfigError before anything is measured, not after, when there is nothing to draw with."""
    if file is None:
        return lambda title, taken: None
    if file.suffix not in PLOT_FORMATS:
        raise ConfigError(f"plot = {str(file)!r} has no format: end its name with one of {', '.join(PLOT_FORMATS)}")
    try:
        from pagoda.bench.serve_plot import plot
    except ImportError:
        raise ConfigError("plot needs matplotlib: `pip install 'pagoda-serving[bench]'`") from None
    return lambda title, taken: plot(file, title, taken)


def _measured(
    target: Target, loads: list[OfflineLoad], concurrency: int | None, rate: float | None, seed: int
) -> list[tuple[Result, Latencies]]:
    import uvloop

    from pagoda.bench.serve import Pace, measure, probe

    uvloop.run(probe(target))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    measured = []
    with Progress(*columns, console=console, refresh_per_second=REFRESHES) as bar:
        for load in loads:
            requests = len(load.make(target.vocab_size))
            task = bar.add_task(load.name, total=requests)
            pace = Pace(concurrency or load.at_once, rate, seed)

            def done(answer: Answer, task: Any = task) -> None:
                bar.advance(task)

            measured.append(uvloop.run(measure(target, load, pace, done)))
    return measured


def _show(results: list[Result], target: Target) -> None:
    console.print(f"{target.model} at {target.url}, token ids below {target.vocab_size}")
    console.print(_rates(results))
    console.print(_latencies(results))
    for result in results:
        for problem, count in result.failures.items():
            console.print(f"[red]failed:[/red] {result.load}: {count} × {escape(problem)}", markup=True)
        if result.client_share > BUSY:
            share = f"{100 * result.client_share:.0f} % of a core"
            console.print(f"{result.load}: the client itself used {share}: its own waiting is in these latencies.")


def _rates(results: list[Result]) -> Table:
    table = _table("answered", "failed", "s", "requests/s", "output/s", "total/s", "client")
    for r in results:
        failed = sum(r.failures.values())
        rates = (f"{r.request_rate:,.2f}", f"{r.output_rate:,.1f}", f"{r.total_rate:,.1f}")
        counts = (str(r.requests - failed), str(failed), f"{r.seconds:.2f}")
        table.add_row(r.load, *counts, *rates, f"{100 * r.client_share:.1f} %")
    table.caption = "output and total: tokens; client: what this command used of a core"
    return table


def _latencies(results: list[Result]) -> Table:
    table = _table("ms", "mean", "P50", "P95", "P99")
    for r in results:
        for name, shown in NAMES.items():
            if (spread := r.spreads[name]) is not None:
                table.add_row(r.load, shown, *(f"{value:,.1f}" for value in msgspec.structs.astuple(spread)))
        table.add_section()
    return table


def _table(*columns: str) -> Table:
    return Table(*(Column(name, no_wrap=True) for name in ("load", *columns)))
