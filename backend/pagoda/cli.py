"""The command line. `pagoda --help` lists it."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from pagoda import __version__, openai_stream
from pagoda.bench.cli import app as bench_app
from pagoda.bench.console import ClearErrors
from pagoda.bench.options import ApiKey
from pagoda.errors import ConfigError, PagodaError
from pagoda.server import settings as service
from pagoda.server import store

app = typer.Typer(cls=ClearErrors, no_args_is_help=True, add_completion=False)
app.add_typer(bench_app, name="bench")
console = Console(highlight=False, markup=False, soft_wrap=True)
"""It prints texts as they are: no path is cut in two where there is no terminal, no bracket taken for a colour."""

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]

RunFolder = Annotated[
    Path | None,
    typer.Option(
        "--run-folder", help="Logs and instance file of one running service.", show_default="$PAGODA_HOME/run"
    ),
]
Port = Annotated[int, typer.Option(min=1, max=65535, help="Of the OpenAI frontend.")]
GrpcPort = Annotated[int, typer.Option(min=1, max=65535, help="Of Triton's gRPC.")]
MetricsPort = Annotated[int, typer.Option(min=1, max=65535, help="Of Triton's metrics.")]
HttpPort = Annotated[int, typer.Option(min=1, max=65535, help="Of Triton's HTTP, with --triton-http.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        console.print(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Serve language models with Triton."""


@app.command()
def serve(
    model: Annotated[str | None, typer.Option(help="Serve this one model: a folder, or a name in the store.")] = None,
    model_repository: Annotated[Path | None, typer.Option(help="Serve every model of a Triton repository.")] = None,
    served_model_name: Annotated[str | None, typer.Option(help="Name of --model in the API.")] = None,
    host: Annotated[str, typer.Option(help="Address of the frontend; 0.0.0.0 opens it to others.")] = "127.0.0.1",
    port: Port = service.PORT,
    grpc_port: GrpcPort = service.GRPC_PORT,
    metrics_port: MetricsPort = service.METRICS_PORT,
    http_port: HttpPort = service.HTTP_PORT,
    triton_http: Annotated[bool, typer.Option("--triton-http", help="Open Triton's HTTP port, on loopback.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Frontend processes.")] = 2,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Engine parameter of --model, as name=value.")] = None,
    api_key: ApiKey = None,
    run_folder: RunFolder = None,
) -> None:
    """Start Triton and the OpenAI frontend, watch them, end both on Ctrl-C.

    Without --model and --model-repository the embedded default model is served.
    """
    if model is not None and model_repository is not None:
        raise typer.BadParameter("give --model or --model-repository, not both")
    if set_ and model_repository is not None:
        raise typer.BadParameter("--set goes with --model; a repository's parameters are in its config.pbtxt")
    if served_model_name is not None and model_repository is not None:
        raise typer.BadParameter("--served-model-name goes with --model; a repository's folders name its models")
    ports = {"--port": port, "--grpc-port": grpc_port, "--metrics-port": metrics_port}
    _check_ports(ports | ({"--http-port": http_port} if triton_http else {}))
    from pagoda.server import repository

    _log()
    scratch = Path(tempfile.mkdtemp(prefix="pagoda-repository-"))
    try:
        folder = model_repository or _repository_of(scratch, model, served_model_name, set_ or [])
        repository.check(folder)
        settings = service.ServeSettings(
            model_repository=folder,
            configs_are_complete=model_repository is None,
            hide_gpus=not repository.needs_gpus(folder),
            host=host,
            port=port,
            grpc_port=grpc_port,
            metrics_port=metrics_port,
            http_port=http_port,
            triton_http=triton_http,
            workers=workers,
            api_key=api_key,
            run_folder=run_folder or service.default_run_folder(),
        )
        _run(settings)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _log() -> None:
    """In colours and columns on a terminal, and elsewhere a line a message."""
    if console.is_terminal:
        logging.basicConfig(
            level="INFO", format="%(message)s", handlers=[RichHandler(console=console, show_path=False)]
        )
    else:
        logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)-8s %(message)s", stream=sys.stdout)


def _check_ports(ports: dict[str, int]) -> None:
    for port in ports.values():
        options = [option for option, value in ports.items() if value == port]
        if len(options) > 1:
            raise typer.BadParameter(f"{' and '.join(options)} are the same, {port}: give each a port of its own")


def _repository_of(scratch: Path, model: str | None, name: str | None, assignments: list[str]) -> Path:
    from pagoda.server import repository

    with _store_errors():
        if model is None:
            with _progress("the embedded default model") as update:
                model = str(store.pull_default(update))
        given = store.resolve(model, relative_to=Path.cwd())
        with _progress(given.name) as update:
            folder = store.prepared(given, update)
    parameters = dict(_assignment(text) for text in assignments)
    return repository.single_model(scratch, str(folder), name or given.name, parameters)


@contextmanager
def _store_errors() -> Iterator[None]:
    """A full disk or a folder of someone else's is no fault of ours."""
    try:
        yield
    except OSError as error:
        home, file = store.home(), Path(str(error.filename or store.home()))
        what = error.strerror or str(error)
        if file.is_relative_to(home) or home.is_relative_to(file):
            remedy = "set it to a folder of yours with room for a model"
            raise ConfigError(f"PAGODA_HOME = {str(home)!r} cannot be used: {what} ({file}); {remedy}") from None
        raise ConfigError(f"{file} cannot be read: {what}; give a model whose files are yours to read") from None


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise typer.BadParameter(f"--set {text}: write name=value")
    return name, value


def _run(settings: service.ServeSettings) -> None:
    from pagoda.server.supervisor import Supervisor

    def announce(supervisor: Supervisor) -> None:
        names = supervisor.registry.names()
        console.print(f"\n[bold]Pagoda {__version__}[/bold] serves {escape(', '.join(names))}", markup=True)
        instance = supervisor.instance()
        console.print(f"  OpenAI API     {instance.url}/v1")
        console.print(f"  health         {instance.url}/health")
        console.print(f"  Triton gRPC    {instance.grpc_address}")
        console.print(f"  Triton metrics {instance.metrics_url}")
        if instance.http_url:
            console.print(f"  Triton HTTP    {instance.http_url}")
        console.print(f"  logs           {settings.logs}\n")
        console.print(_curl_line(instance.url, names[0], settings.api_key))
        proof.append(asyncio.create_task(asyncio.to_thread(_prove, instance.url, names[0], settings.api_key)))

    proof: list[asyncio.Task[None]] = []
    asyncio.run(Supervisor(settings, announce).run())
    console.print("stopped")


def _curl_line(url: str, model: str, api_key: str | None) -> str:
    key = " -H 'authorization: Bearer ...'" if api_key else ""
    body = json.dumps({"model": model, "messages": QUESTION, "temperature": 0})
    return f"curl -s {url}/v1/chat/completions -H 'content-type: application/json'{key} -d {shlex.quote(body)}\n"


def _start_of_process() -> float:
    """In seconds of time.monotonic(): what has been imported since counts, too."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - age


def _prove(url: str, model: str, api_key: str | None) -> None:
    """One short answer, streamed, to show that the whole path works."""
    try:
        pieces = []
        first = None
        for piece in openai_stream.stream_chat(url, model, QUESTION, api_key=api_key, temperature=0, max_tokens=32):
            first = first or (time.monotonic() if piece else None)
            pieces.append(piece)
        took = (first or time.monotonic()) - _start_of_process()
        console.print(f"> {QUESTION[0]['content']}\n{''.join(pieces)}")
        console.print(f"(first token {took:.1f} s after the start; Ctrl-C ends the service)\n")
    except PagodaError as error:
        console.print(f"[red]the first answer failed:[/red] {escape(error.message)}", markup=True)


@app.command()
def stop(run_folder: RunFolder = None) -> None:
    """End the service that runs from a run folder."""
    folder = run_folder or service.default_run_folder()
    instance = service.read_instance(folder)
    if instance is None:
        console.print(f"no service runs from {folder}")
        return
    os.kill(instance.pid, signal.SIGTERM)
    deadline = time.monotonic() + 15
    while service.read_instance(folder) is not None:
        if time.monotonic() > deadline:
            raise PagodaError(f"process {instance.pid} did not end in 15 s; see {folder / 'logs'}")
        time.sleep(0.1)
    console.print("stopped")


@app.command()
def load(name: str, run_folder: RunFolder = None) -> None:
    """Load a model of the running service's repository."""
    _repository_call("load", name, run_folder)


@app.command()
def unload(name: str, run_folder: RunFolder = None) -> None:
    """Unload a model; its requests get a few seconds to finish."""
    _repository_call("unload", name, run_folder)


def _repository_call(verb: str, name: str, run_folder: Path | None) -> None:
    from pagoda.triton_client import Triton

    instance = service.read_instance(run_folder or service.default_run_folder())
    if instance is None:
        raise ConfigError("no service runs; start one with `pagoda serve`")

    async def call() -> None:
        triton = Triton(instance.grpc_address, instance.secret)
        known = [state.name for state in await triton.models()]
        if name not in known:
            raise ConfigError(f"the repository has no model {name!r}; its models: {', '.join(known)}")
        await getattr(triton, verb)(name)
        await triton.close()

    asyncio.run(call())
    console.print(f"{verb}ed {name}" if verb == "load" else f"{name} is being unloaded")


@app.command()
def pull(
    folder: Annotated[
        Path | None,
        typer.Argument(help="A local Hugging Face folder, or one with a GGUF file; without it, the embedded default."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The folder's name in the store.")] = None,
) -> None:
    """Put a model into the store."""
    if name is not None and folder is None:
        raise typer.BadParameter("--name goes with a folder; the embedded default keeps its own name")
    with _store_errors():
        with _progress("the embedded default model" if folder is None else folder.name) as update:
            path = store.pull_default(update) if folder is None else store.pull_folder(folder, name, update)
        console.print(f"{path}")


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"preparing {what}", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@app.command()
def chat(
    url: Annotated[str, typer.Option(help="A running frontend, with or without its /v1.")] = "http://127.0.0.1:9000",
    model: Annotated[str | None, typer.Option(help="By default the first one.")] = None,
    temperature: float = 0.2,
    max_tokens: int = 512,
    api_key: ApiKey = None,
) -> None:
    """Talk to a running server; an empty line or Ctrl-D ends."""
    url = openai_stream.root(url)
    name = model or openai_stream.first_model(url, api_key)
    console.print(f"{name} at {url}; an empty line ends\n")
    messages: list[dict[str, str]] = []
    while question := _ask():
        messages.append({"role": "user", "content": question})
        answer = ""
        parameters = {"temperature": temperature, "max_tokens": max_tokens}
        for piece in openai_stream.stream_chat(url, name, messages, api_key=api_key, **parameters):
            console.out(piece, end="", highlight=False)
            answer += piece
        console.print("\n")
        messages.append({"role": "assistant", "content": answer})


def _ask() -> str:
    try:
        return console.input("[bold]you>[/bold] ").strip()
    except (EOFError, KeyboardInterrupt):
        console.print()
        return ""


@app.command()
def doctor(
    port: Port = service.PORT,
    grpc_port: GrpcPort = service.GRPC_PORT,
    metrics_port: MetricsPort = service.METRICS_PORT,
    http_port: HttpPort = service.HTTP_PORT,
) -> None:
    """Check this machine: what is there, what is missing, and how to mend it. The ports are those given to serve."""
    from pagoda.server.doctor import checks, service_ports

    found = checks(service_ports(port, grpc_port, metrics_port, http_port))
    marks = {"ok": "[green]ok  [/green]", "warn": "[yellow]warn[/yellow]", "fail": "[red]fail[/red]"}
    for check in found:
        console.print(f"{marks[check.status]}  [bold]{check.name}[/bold]: {escape(check.detail)}", markup=True)
        if check.remedy:
            console.print(f"      → {check.remedy}")
    if any(check.status == "fail" for check in found):
        raise typer.Exit(1)


@app.command()
def version() -> None:
    """Print the version."""
    console.print(__version__)
