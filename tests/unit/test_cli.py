"""The command line: what cannot work is refused with a sentence, before anything starts."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from pagoda import __version__, openai_stream
from pagoda.bench.cli import _wanted
from pagoda.bench.loads import CPU_LOADS
from pagoda.cli import app
from typer.testing import CliRunner, Result

MODELS = b'{"data": [{"id": "fake"}]}'
WORD = b'data: {"choices": [{"delta": {"content": "Paris"}}]}\n\n'
DONE = b"data: [DONE]\n\n"


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No model store and no key of whoever runs the tests, and a terminal that breaks no line."""
    monkeypatch.setenv("PAGODA_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PAGODA_API_KEY", raising=False)
    monkeypatch.setenv("COLUMNS", "300")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    (folder / "m" / "1").mkdir(parents=True)
    (folder / "m" / "config.pbtxt").write_text('backend: "pagoda"')
    return folder


def pagoda(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, input="Where?\n\n")


@contextmanager
def answering(models: bytes, chat: bytes = WORD + DONE) -> Iterator[tuple[str, list[str]]]:
    """A server that gives `models` for its models and answers with `chat`; its address, and the paths asked."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(models if self.command == "GET" else chat)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


def is_sentence(ran: Result, said: str) -> bool:
    assert ran.exit_code == 1, ran.output
    assert isinstance(ran.exception, SystemExit)
    return f"error: {said}" in ran.output


def is_bad_parameter(ran: Result, said: str) -> bool:
    assert ran.exit_code == 2, ran.output
    return said in ran.output


@pytest.mark.parametrize("command", ["compare", "determinism", "offline", "prefix", "products", "profile"])
def test_what_no_bench_can_measure_is_a_sentence(command: str) -> None:
    assert is_sentence(pagoda("bench", command, "--model", "nope"), "model = 'nope' was not found: no ")


def test_a_parameter_that_no_engine_has_is_a_sentence() -> None:
    ran = pagoda("bench", "profile", "--model", "llama-3.1-8b", "--set", "bogus=1")
    assert is_sentence(ran, "unknown parameter 'bogus'. Known ones: ")


@pytest.mark.parametrize("option", ["--port", "--grpc-port", "--metrics-port", "--http-port"])
@pytest.mark.parametrize("value", ["0", "65536"])
def test_a_port_has_a_range(option: str, value: str) -> None:
    ran = pagoda("serve", "--model", "nope", option, value)
    assert is_bad_parameter(ran, f"Invalid value for '{option}'")


def test_two_services_cannot_share_a_port() -> None:
    ran = pagoda("serve", "--model", "nope", "--port", "8002")
    assert is_bad_parameter(ran, "--port and --metrics-port are the same, 8002: give each a port of its own")
    ran = pagoda("serve", "--model", "nope", "--triton-http", "--http-port", "8001")
    assert is_bad_parameter(ran, "--grpc-port and --http-port are the same, 8001")


def test_a_port_that_stays_closed_is_in_nobodys_way() -> None:
    assert is_sentence(pagoda("serve", "--model", "nope", "--port", "8000"), "model = 'nope' was not found")


@pytest.mark.parametrize("folder", ["/proc/foo", "/dev/null"])
def test_a_run_folder_that_cannot_be_written_is_a_sentence(folder: str, repository: Path) -> None:
    ran = pagoda("serve", "--model-repository", str(repository), "--run-folder", folder)
    assert is_sentence(ran, f"run_folder = '{folder}' cannot be written: ")
    assert "give a folder of yours with --run-folder" in ran.output


@pytest.mark.parametrize("arguments", [("pull",), ("pull", "{folder}"), ("serve",), ("serve", "--model", "{folder}")])
def test_a_store_that_cannot_be_written_is_a_sentence(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.gguf").touch()
    monkeypatch.setenv("PAGODA_HOME", "/proc/x")
    ran = pagoda(*(argument.format(folder=tmp_path) for argument in arguments))
    assert is_sentence(ran, "PAGODA_HOME = '/proc/x' cannot be used: ")
    assert "set it to a folder of yours" in ran.output


@pytest.mark.parametrize(
    "url", ["nonsense", "127.0.0.1:9000", "ftp://host", "http://", "http://host:99999", "http://["]
)
@pytest.mark.parametrize("command", [("chat",), ("chat", "--model", "m"), ("bench", "serve")])
def test_what_is_no_address_of_a_server_is_a_sentence(command: tuple[str, ...], url: str) -> None:
    said = f"url = '{url}' is no address of a server: write one like http://127.0.0.1:9000"
    assert is_sentence(pagoda(*command, "--url", url), said)


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_a_chat_takes_an_address_with_its_v1_or_without(end: str) -> None:
    with answering(MODELS) as (url, asked):
        ran = pagoda("chat", "--url", url + end)
    assert ran.exit_code == 0, ran.output
    assert asked == ["/v1/models", "/v1/chat/completions"]
    assert "fake at" in ran.output
    assert "Paris" in ran.output


def test_what_answers_in_html_is_no_server() -> None:
    with answering(b"<html>") as (url, _):
        assert is_sentence(pagoda("chat", "--url", url), f"what answers at {url}/v1/models sends no JSON")


@pytest.mark.parametrize(
    "command", ["serve", "compare", "determinism", "host", "offline", "prefix", "products", "profile"]
)
def test_results_that_could_not_be_written_are_not_measured(command: str, tmp_path: Path) -> None:
    missing = tmp_path / "missing" / "x.json"
    for file, why in ((missing, "No such file or directory"), (tmp_path, "Is a directory")):
        ran = pagoda("bench", command, "--json", str(file))
        assert is_sentence(ran, f"json = '{file}' cannot be written: {why}; give a file in a folder of yours")


def test_a_plot_that_could_not_be_written_is_not_measured() -> None:
    ran = pagoda("bench", "serve", "--plot", "/missing/x.png")
    assert is_sentence(ran, "plot = '/missing/x.png' cannot be written: No such")


def test_results_that_were_not_measured_leave_earlier_ones_and_no_file(tmp_path: Path) -> None:
    earlier, new = tmp_path / "earlier.json", tmp_path / "new.json"
    earlier.write_text("{}")
    for file in (earlier, new):
        assert is_sentence(pagoda("bench", "compare", "--model", "nope", "--json", str(file)), "model = 'nope'")
    assert earlier.read_text() == "{}"
    assert not new.exists()


@pytest.mark.parametrize("option", ["--port", "--grpc-port", "--metrics-port", "--http-port"])
def test_the_doctor_says_who_holds_a_port_that_serve_was_given(option: str) -> None:
    pytest.importorskip("psutil")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        ran = pagoda("doctor", option, str(number))
    [line] = [line for line in ran.output.splitlines() if f"Port {number}:" in line]
    assert f"(process {os.getpid()})" in line


@pytest.mark.parametrize(("option", "value"), [("--set", "block_size=8"), ("--served-model-name", "x")])
def test_what_a_repository_would_ignore_is_refused(option: str, value: str, repository: Path) -> None:
    ran = pagoda("serve", "--model-repository", str(repository), option, value)
    assert is_bad_parameter(ran, f"{option} goes with --model; a repository's")


def test_the_embedded_model_takes_no_name() -> None:
    assert is_bad_parameter(pagoda("pull", "--name", "x"), "--name goes with a folder; the embedded default keeps")


def test_help_says_what_is_served_by_default() -> None:
    said = "Without --model and --model-repository the embedded default model is served."
    assert said in pagoda("serve", "--help").output


@pytest.mark.parametrize("key", ["schlüssel", " padded", "line\n", ""])
@pytest.mark.parametrize("command", [("serve", "--model", "nope"), ("chat",), ("bench", "serve")])
def test_a_key_that_no_header_carries_is_refused_and_not_shown(command: tuple[str, ...], key: str) -> None:
    ran = pagoda(*command, "--api-key", key)
    assert is_bad_parameter(ran, "a key is printable ASCII without a space at an end")
    assert not key or key not in ran.output


def test_a_key_of_the_environment_is_looked_at_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGODA_API_KEY", "schlüssel")
    assert is_bad_parameter(pagoda("serve", "--model", "nope"), "a key is printable ASCII")
    monkeypatch.setenv("PAGODA_API_KEY", "sk-Aa0/+= ~")
    assert is_sentence(pagoda("serve", "--model", "nope"), "model = 'nope' was not found")
    monkeypatch.setenv("PAGODA_API_KEY", "")
    assert is_sentence(pagoda("serve", "--model", "nope"), "model = 'nope' was not found")


def test_what_is_printed_can_be_copied_however_narrow_the_output(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    folder = tmp_path / "a folder [of someone]"
    assert f"no service runs from {folder}\n" in pagoda("stop", "--run-folder", str(folder)).output
    assert is_sentence(pagoda("pull", str(folder), "--name", "x"), f"{folder} is not a folder. A model is a Hugging")
    assert is_sentence(pagoda("load", "x"), "no service runs; start one with `pagoda serve`\n")
    monkeypatch.setenv("PAGODA_HOME", str(folder))
    lines = pagoda("doctor").output.splitlines()
    assert any(line.endswith(f"free at {folder}") for line in lines)
    assert "      → `pagoda pull` gets the embedded default." in lines


def test_a_load_that_offline_does_not_have_is_refused_before_the_machine_is_measured() -> None:
    ran = pagoda("bench", "offline", "--model", "llama-3.1-8b", "--set", "device=cpu", "--only", "1x", "--only", "7x")
    said = "only = '7x' begins the name of no load: take the beginning of one of 1x64->64, 8x64->64, 32x64->64, "
    assert is_sentence(ran, said)


def test_loads_are_named_as_a_keyboard_has_them() -> None:
    names = [load.name for load in _wanted(CPU_LOADS, ["8x", "1 × 64"])]
    assert names == ["1 × 64 → 64", "8 × 64 → 64"]
    assert _wanted(CPU_LOADS, None) == list(CPU_LOADS)


@pytest.mark.parametrize("argument", ["--version", "version"])
def test_the_version_is_printed(argument: str) -> None:
    ran = pagoda(argument)
    assert (ran.exit_code, ran.output) == (0, f"{__version__}\n")


def test_an_answer_that_breaks_off_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(MODELS, WORD) as (url, _):
        ran = pagoda("chat", "--url", url)
    assert is_sentence(ran, f"the answer from {url} broke off: the connection was closed; ask again")
    assert "Paris" in ran.output

    def reset() -> Iterator[bytes]:
        yield WORD
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr(openai_stream, "_open", lambda request, timeout: nullcontext(reset()))
    ran = pagoda("chat", "--url", url, "--model", "fake")
    assert is_sentence(ran, f"the answer from {url} broke off: [Errno 104] Connection reset by peer; ask again")
