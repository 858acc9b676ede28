"""Locust against the real service; and Locust against a server with planted faults, to see that it finds them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from threading import Thread

import pytest
from service import MODEL, Service, wait_for

LOCUSTFILE = Path(__file__).parents[2] / "loadtests" / "locustfile.py"
SERIES = ("chat: first token", "chat: between tokens")
ANSWERS = ("chat: whole answer", "completion: whole answer")


def locust(url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A headless run with 48-token answers; users whose time is up finish what they began."""
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--host", url, "--headless", "--only-summary"]
    options = ["--stop-timeout", "30", "--model", MODEL, "--max-tokens", "48"]
    return subprocess.run([*command, *options, *arguments], capture_output=True, text=True, timeout=150)


@pytest.mark.timeout(240)
def test_eight_users(calm: Service, tmp_path: Path) -> None:
    """Nothing fails, nothing is left behind, and the clients were told of every token that the engine made."""
    before = calm.metric("generation_tokens_total")
    files = ["--csv", str(tmp_path / "load"), "--json-file", str(tmp_path / "load")]
    done = locust(calm.url, "-u", "8", "-r", "8", "-t", "20s", "--system-tokens", "64", *files)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "chat: first token" in (tmp_path / "load_stats.csv").read_text()
    # The CSV files may lack the last second, the JSON file does not.
    stats = {entry["name"]: entry for entry in json.loads((tmp_path / "load.json").read_text())}
    assert all(entry["num_failures"] == 0 for entry in stats.values())
    assert set(stats) == {*SERIES, *ANSWERS}
    assert all(entry["num_requests"] > 0 for entry in stats.values())
    assert "output tokens/s: " in done.stdout
    wait_for(calm.is_idle, 5, "the service to fall idle")
    told = sum(stats[name]["total_content_length"] for name in ANSWERS)
    wait_for(lambda: calm.metric("generation_tokens_total") - before == told, 5, f"{told} tokens in the metrics")


# ── streams with faults ───────────────────────────────────────────────────────────────────────────────────────────────


def chunk(content: str | None = None, finish: str | None = None) -> str:
    delta = {} if content is None else {"content": content}
    return _event({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})


def usage(tokens: int) -> str:
    return _event({"choices": [], "usage": {"completion_tokens": tokens}})


def _event(body: dict[str, object]) -> str:
    return f"data: {json.dumps(body)}\n\n"


DONE = "data: [DONE]\n\n"
WORD = chunk("word")
FAULTS = {
    "finish_reason came 0 times": WORD + usage(1) + DONE,
    "finish_reason came 2 times": WORD + chunk(finish="stop") + chunk(finish="stop") + usage(2) + DONE,
    "finish_reason 'length' with 1 tokens": WORD + chunk(finish="length") + usage(1) + DONE,
    "[DONE] came 0 times": WORD + chunk(finish="stop") + usage(2),
    "[DONE] came 2 times": WORD + chunk(finish="stop") + usage(2) + DONE + DONE,
    "usage came 0 times": WORD + chunk(finish="stop") + DONE,
    "usage says fewer tokens": WORD * 3 + chunk(finish="stop") + usage(2) + DONE,
    "the stream held no text": chunk("") * 3 + chunk(finish="stop") + usage(4) + DONE,
    "ended with an error: it broke": WORD + _event({"error": {"message": "it broke"}}) + DONE,
    "the stream broke: JSONDecodeError": WORD + "data: {\n\n",
}


class FaultyServer(BaseHTTPRequestHandler):
    """Sends one faulty stream after the other."""

    turns: Iterator[int]

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        faults = list(FAULTS.values())
        self.send_response(200)
        self.end_headers()
        self.wfile.write(faults[next(self.turns) % len(faults)].encode())

    def log_message(self, *_: object) -> None:
        pass


def test_faulty_streams_are_failures() -> None:
    """Every fault is named, and adds nothing to the latencies."""
    FaultyServer.turns = count()
    with ThreadingHTTPServer(("127.0.0.1", 0), FaultyServer) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        done = locust(f"http://127.0.0.1:{server.server_port}", "-u", "1", "-t", "3s", "ChatUser")
        server.shutdown()
    assert done.returncode == 1, done.stdout + done.stderr
    for fault in FAULTS:
        assert fault in done.stderr
    assert not any(name in done.stderr for name in SERIES)
