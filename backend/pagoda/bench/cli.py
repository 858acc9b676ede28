"""`pagoda bench`: measurements, each beside its peer."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from pagoda import config, hf_config, torch_settings
from pagoda.bench import serve_cli, shapes
from pagoda.bench.console import ClearErrors, console
from pagoda.bench.loads import OfflineLoad, is_named, typed
from pagoda.bench.options import writable
from pagoda.errors import ConfigError
from pagoda.server import store

if TYPE_CHECKING:
    from pagoda.bench.offline import Result
    from pagoda.bench.prefix import PrefixResult
    from pagoda.bench.profile import StepProfile

app = typer.Typer(cls=ClearErrors, no_args_is_help=True, help="Measure.")
app.command()(serve_cli.serve)

Model = Annotated[
    str, typer.Option(help=f"A folder, a name in the store, or random weights: {', '.join(shapes.SHAPES)}.")
]
JsonFile = Annotated[Path | None, typer.Option("--json", callback=writable, help="Write the results there, too.")]
Parameters = Annotated[
    list[str] | None, typer.Option("--set", help="An engine parameter, name=value; may be repeated.")
]
PEER_SHAPES = {"cuda": (4096, 32, 128256), "cpu": (576, 30, 49152)}
"""(hidden size, layers, vocabulary) of the models that the peer was measured with, by device."""


def _bar() -> Progress:
    return Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console)


def _write(json_file: Path | None, results: object) -> None:
    if json_file is not None:
        json_file.write_bytes(msgspec.json.encode(results))


@app.command()
def compare(
    model: Annotated[str, typer.Option(help="A folder, or a name in the store.")] = store.DEFAULT_MODEL,
    requests: Annotated[int, typer.Option(min=1)] = 64,
    lone_requests: Annotated[int, typer.Option(min=1, help="Requests of the one-at-a-time run (slow).")] = 16,
    json_file: JsonFile = None,
) -> None:
    """The mixed load (16 to 256 tokens in, 32 to 256 out, greedy) by Pagoda and by transformers, in one run."""
    from pagoda.bench.compare import contestants, run
    from pagoda.bench.loads import mixed

    folder = store.resolve(model, relative_to=Path.cwd())
    vocab_size = hf_config.load(folder).vocab_size
    loads = mixed(requests, inputs=(16, 256), outputs=(32, 256), vocab_size=vocab_size)
    results = []
    with _bar() as bar:
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
    _write(json_file, results)


@app.command()
def determinism(model: Model = store.DEFAULT_MODEL, parameters: Parameters = None, json_file: JsonFile = None) -> None:
    """Requests together and each alone: at how many of their tokens they differ."""
    from pagoda.bench.alone import Alone
    from pagoda.bench.determinism import SAMPLINGS, Case, measure

    results = []
    with _settings(model, parameters) as (settings, folder), _bar() as bar:
        task = bar.add_task("together and alone", total=len(SAMPLINGS))
        engine = Alone(settings, folder)
        for sampling in SAMPLINGS:
            results.append(measure(engine, Case(), sampling))
            bar.update(task, advance=1)
    table = Table("sampling", "tokens", "that differ", "%", "preemptions", "prompt tokens spared")
    for r in results:
        share = f"{100 * r.differences / r.tokens:.3f}"
        table.add_row(r.sampling, str(r.tokens), str(r.differences), share, str(r.preemptions), str(r.hit_tokens))
    console.print(table)
    _write(json_file, results)


@app.command()
def host(json_file: JsonFile = None) -> None:
    """What a step of decodes costs the host, by phases, without a model; graph launches are not in it."""
    from pagoda.bench.host import COUNTS, LOADS, PHASES, measure

    results = []
    with _bar() as bar:
        task = bar.add_task("decodes", total=len(LOADS) * len(COUNTS))
        for load in LOADS:
            for count in COUNTS:
                results.append(measure(load, count))
                bar.update(task, advance=1)
    table = Table("µs a step", *(Column(f"{r.load}\n{r.requests}", justify="right") for r in results))
    for phase in PHASES:
        table.add_row(phase, *(f"{r.phases[phase]:.0f}" for r in results))
    table.add_row("all", *(f"{r.step:.0f}" for r in results))
    table.add_row("all, P99", *(f"{r.worst:.0f}" for r in results))
    console.print(table)
    _write(json_file, results)


@app.command()
def products(model: Model = store.DEFAULT_MODEL, parameters: Parameters = None, json_file: JsonFile = None) -> None:
    """Every matrix product of one step, by torch and by our own operation."""
    from pagoda.bench.machine import measure_bandwidth
    from pagoda.bench.products import measure, weight_bytes
    from pagoda.runner import resolve_device, resolve_dtype

    with _settings(model, parameters) as (settings, folder), _bar() as bar:
        bar.add_task("matrix products")
        shape, device = hf_config.load(folder), resolve_device(settings.device)
        dtype = resolve_dtype(settings.dtype, shape.dtype, device)
        results = measure(shape, dtype, device)
        floor = weight_bytes(shape, dtype) / measure_bandwidth(device) * 1e3
    table = Table("rows", "torch, ms", "ours, ms", "bytes read, ms")
    for r in results:
        table.add_row(str(r.rows), f"{r.torch:.2f}", f"{r.ours:.2f}", f"{floor:.2f}")
    console.print(table)
    _write(json_file, results)


@app.command()
def waste() -> None:
    """How much of the KV cache is reserved and holds no token, over the peer's mixed load."""
    from pagoda.bench.waste import mean_waste

    table = Table("block size", "reserved and unused, % of what is reserved")
    for block_size in (8, 16, 32, 64):
        table.add_row(str(block_size), f"{100 * mean_waste(block_size=block_size):.2f}")
    console.print(table)


@app.command()
def offline(
    model: Model = store.DEFAULT_MODEL,
    parameters: Parameters = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Loads whose name begins so, like 64x128; may be repeated.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """The engine alone, greedy, under the loads that its peer was measured with; beside the machine's limits."""
    torch_settings.apply()
    from pagoda.bench import machine
    from pagoda.bench.alone import Alone
    from pagoda.bench.loads import CPU_LOADS, GPU_LOADS
    from pagoda.bench.offline import measure
    from pagoda.runner import resolve_device, resolve_dtype

    with _settings(model, parameters) as (settings, folder), _bar() as bar:
        shape, device = hf_config.load(folder), resolve_device(settings.device)
        loads = _wanted(CPU_LOADS if device.type == "cpu" else GPU_LOADS, only)
        task = bar.add_task("the machine's limits")
        limits = machine.measure(shape, resolve_dtype(settings.dtype, shape.dtype, device), device)
        machine.release(device)
        bar.update(task, description="start")
        engine = Alone(settings, folder)
        peers = (shape.hidden_size, shape.num_layers, shape.vocab_size) == PEER_SHAPES[device.type]
        bar.update(task, description="loads", total=len(loads))

        def done(result: Result) -> None:
            bar.update(task, advance=1, description=f"{result.load}: {result.seconds:.2f} s")

        results = measure(engine, limits, loads, peers=peers, done=done)
    console.print(_offline_table(results))
    bandwidth, rate = limits.bandwidth / 1e9, limits.matrix_rate / 1e9
    console.print(f"Memory is read at {bandwidth:,.1f} GB/s, matrices are multiplied at {rate:,.0f} GFLOP/s.")
    if limits.products:
        products = ", ".join(f"{rows}: {ms:.2f}" for rows, ms in limits.products.items())
        console.print(f"The model's matrices alone, by the vendor's library, ms by rows: {products}.")
    console.print(f"The engine started in {engine.start_seconds:.1f} s: {engine.runner.num_blocks} blocks.")
    _write(json_file, {"machine": limits, "results": results})


def _wanted(loads: Sequence[OfflineLoad], only: list[str] | None) -> list[OfflineLoad]:
    """Raises ConfigError for a beginning that no load's name has."""
    for start in only or []:
        if not any(is_named(load, start) for load in loads):
            names = ", ".join(typed(load.name) for load in loads)
            raise ConfigError(f"only = {start!r} begins the name of no load: take the beginning of one of {names}")
    return [load for load in loads if not only or any(is_named(load, start) for start in only)]


def _offline_table(results: list[Result]) -> Table:
    table = Table(
        Column("load", no_wrap=True),
        "s",
        "output/s",
        "total/s",
        "steps",
        "ms a step",
        "% of floor",
        "peer's s",
        "× peer",
    )
    for r in results:
        peer = (f"{r.peer_seconds:.2f}", f"{r.peer_seconds / r.seconds:.2f}") if r.peer_seconds else ("", "")
        rates = (f"{r.seconds:.2f}", f"{r.output_rate:,.0f}", f"{r.total_rate:,.0f}")
        steps = (str(r.steps), f"{r.seconds / r.steps * 1e3:.2f}", f"{100 * r.floor_seconds / r.seconds:.0f}")
        table.add_row(r.load, *rates, *steps, *peer)
    return table


@app.command()
def shape(
    name: Annotated[str, typer.Argument(help=", ".join(shapes.SHAPES))],
    folder: Annotated[Path, typer.Argument(help="Is made if it does not exist.")],
) -> None:
    """Write a model's config.json and a made-up tokenizer, to be served with --set load_format=dummy."""
    if name not in shapes.SHAPES:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(shapes.SHAPES)}", param_hint="name")
    shapes.write_servable(name, folder)


@app.command()
def prefix(model: Model = store.DEFAULT_MODEL, parameters: Parameters = None, json_file: JsonFile = None) -> None:
    """A shared system prompt of 512 tokens, with prefix caching and without: first token and throughput."""
    from pagoda.bench.alone import Alone
    from pagoda.bench.prefix import Case, measure

    with _settings(model, parameters) as (settings, folder), _bar() as bar:
        task = bar.add_task("without and with prefix caching", total=2)
        results = measure(Alone(settings, folder), Case(), done=lambda result: bar.update(task, advance=1))
    table = Table("prefix caching", "first token, ms", "output tokens/s at 16 at a time", "prompt tokens spared")

    def row(result: PrefixResult) -> tuple[str, ...]:
        latency = f"{result.first_token_seconds * 1e3:.0f}"
        return ("with" if result.caching else "without", latency, f"{result.output_rate:.1f}", str(result.hit_tokens))

    for result in results:
        table.add_row(*row(result))
    without, with_it = results
    faster = 100 * (1 - with_it.first_token_seconds / without.first_token_seconds)
    more = 100 * (with_it.output_rate / without.output_rate - 1)
    console.print(table)
    console.print(f"First token {faster:.0f} % earlier, throughput {more:.0f} % higher.")
    _write(json_file, results)


@app.command()
def profile(model: Model = store.DEFAULT_MODEL, parameters: Parameters = None, json_file: JsonFile = None) -> None:
    """Where the time of a step goes: the engine's phases on the host, groups of kernels on the device."""
    torch_settings.apply()
    from pagoda.bench.alone import Alone
    from pagoda.bench.profile import ClockedRunner, decode, mixed, prefill

    with _settings(model, parameters) as (settings, folder), _bar() as bar:
        task = bar.add_task("start")
        engine = Alone(settings, folder, ClockedRunner)
        small = engine.runner.device.type == "cpu"
        decodes, length, steps = ((1, 8, 32), 64, 8) if small else ((1, 64, 256), 512, 30)
        profiles = []
        for count in decodes:
            bar.update(task, description=f"decode, {count} at a time")
            profiles.append(decode(engine, count, length, steps))
        bar.update(task, description="mixed")
        profiles.append(mixed(engine, *((8, 64, 4) if small else (128, 512, steps))))
        bar.update(task, description="prefill")
        profiles.append(prefill(engine, *((8, 128) if small else (32, 2048))))
    for p in profiles:
        console.print(_profile_table(p))
    _write(json_file, profiles)


def _profile_table(p: StepProfile) -> Table:
    table = Table("host", "ms", "%", "device", "ms", "%", title=f"{p.name}: {p.milliseconds:.2f} ms a step")
    busy = sum(phase.milliseconds for phase in p.device)
    for i in range(max(len(p.host), len(p.device))):
        cells: list[str] = []
        for phases, whole in ((p.host, p.milliseconds), (p.device, busy)):
            if i < len(phases):
                phase = phases[i]
                cells += [phase.name, f"{phase.milliseconds:.3f}", f"{100 * phase.milliseconds / whole:.0f}"]
            else:
                cells += ["", "", ""]
        table.add_row(*cells)
    return table


@contextlib.contextmanager
def _settings(model: str, parameters: list[str] | None) -> Iterator[tuple[config.EngineConfig, Path]]:
    """The engine's configuration and the model's folder, a made-up one for a shape."""
    given: dict[str, Any] = dict(item.partition("=")[::2] for item in parameters or [])
    with TemporaryDirectory(prefix="pagoda-bench-") as scratch:
        if model in shapes.SHAPES:
            folder = shapes.write(model, Path(scratch))
            given = {"load_format": "dummy", "max_model_len": 8192, **given}
        else:
            folder = store.resolve(model, relative_to=Path.cwd())
        yield config.from_parameters({"model": str(folder), **given}), folder
