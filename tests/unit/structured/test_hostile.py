"""Structures that would stall or flood the engine: refused, or ended on the way, at a bounded cost."""

from __future__ import annotations

import json
import socket
import threading
import time

import numpy as np
import psutil
import pytest
from pagoda.errors import InvalidRequest
from pagoda.sampling_params import Structure
from pagoda.structured import MAX_TEXT_BYTES, Compiler
from pagoda.structured.limits import TRIAL_CPU_SECONDS
from unit.structured.walk import EOS, PADDED, Walker, walker

DOUBLING = "start: T40\nT0: /[ab]/\n" + "\n".join(f"T{i}: T{i - 1} T{i - 1}" for i in range(1, 41))
PRODUCT = {"allOf": [{"anyOf": [{"properties": {f"p{i}_{j}": {}}} for j in range(4)]} for i in range(20)]}
MANY_RULES = "start: " + " ".join(f"r{i}?" for i in range(2500)) + "".join(f'\nr{i}: "a"' for i in range(2500))
HOSTILE = {
    "repetition bomb": ("regex", "(a{1000}){1000}"),
    "longer bomb": ("regex", "((a{1000}){1000}){1000}"),
    "count": ("regex", "a{1000000000}"),
    "optional": ("regex", ".?" * 32_000),
    "optional then as many": ("regex", "(a?){3000}a{3000}"),
    "parentheses": ("regex", "(" * 30_000 + "a" + ")" * 30_000),
    "long literal": ("regex", "a" * 65_000),
    "never": ("regex", r"[^\s\S]"),
    "look ahead": ("regex", "(?=a)b"),
    "back reference": ("regex", r"(a)\1"),
    "broken": ("regex", "((("),
    "modulus": ("json_schema", '{"type": "integer", "multipleOf": 999983}'),
    "moduli": (
        "json_schema",
        json.dumps({"allOf": [{"type": "integer", "multipleOf": m} for m in (9973, 9967, 9949)]}),
    ),
    "pattern bomb": ("json_schema", '{"type": "string", "pattern": "^((a{1000}){1000}b|(a{999}){999}c)$"}'),
    "nested": ("json_schema", '{"items":' * 5000 + "{}" + "}" * 5000),
    "nested a little": ("json_schema", '{"items":' * 500 + "{}" + "}" * 500),
    "half": ("json_schema", '{"type":'),
    "list": ("json_schema", "[1]"),
    "itself": ("json_schema", '{"$ref": "#"}'),
    "circle": (
        "json_schema",
        '{"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}',
    ),
    "elsewhere": ("json_schema", '{"$ref": "http://127.0.0.1:9/schema.json"}'),
    "file": ("json_schema", '{"$ref": "file:///etc/passwd"}'),
    "dangling": ("json_schema", '{"$ref": "#/$defs/none"}'),
    "product": ("json_schema", json.dumps(PRODUCT)),
    "long constants": ("json_schema", json.dumps({"enum": ["x" * 30_000, "y" * 30_000]})),
    "unknown type": ("json_schema", '{"type": "strng"}'),
    "nothing fits": ("json_schema", '{"type": "integer", "minimum": 5, "maximum": 3}'),
    "not available": ("json_schema", '{"type": "array", "uniqueItems": true}'),
    "own options": ("json_schema", '{"type": "array", "uniqueItems": true, "x-guidance": {"lenient": true}}'),
    "endless rule": ("lark", "start: start"),
    "ambiguous": ("lark", 'start: s\ns: s s s | s s | "a" |'),
    "doubling": ("lark", DOUBLING),
    "many rules": (
        "lark",
        "start: " + " ".join(f"r{i}?" for i in range(2500)) + "".join(f'\nr{i}: "a"' for i in range(2500)),
    ),
    "deep rule": ("lark", "start: " + "(" * 9000 + '"a"' + ")" * 9000),
    "undefined": ("lark", "start: other"),
    "grammar elsewhere": ("lark", "start: @other"),
    "no start": ("lark", ""),
    "control token by its name": ("lark", 'start: "a" <|im_end|>'),
    "end before the end": ("lark", 'start: <[2]> "a"'),
    "token beyond the vocabulary": ("lark", "start: <[99999999]>"),
    "GBNF without root": ("lark", 'a ::= "b"'),
    "deep GBNF": ("lark", "root ::= " + "(" * 9000 + '"a"' + ")" * 9000),
    "no choices": ("choice", "[]"),
    "empty choice": ("choice", '["a", ""]'),
    "numbers": ("choice", "[1, 2]"),
    "too large": ("regex", "a" * (MAX_TEXT_BYTES + 1)),
}


def child_seconds() -> float:
    """Processor time of this process's children, and of theirs that have ended."""
    return sum(sum(child.cpu_times()[:4]) for child in psutil.Process().children())


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_structures_are_refused_in_bounded_time(compiler: Compiler, name: str) -> None:
    kind, text = HOSTILE[name]
    compiler.compile(Structure("regex", "warm"))
    here, there = time.process_time(), child_seconds()
    with pytest.raises(InvalidRequest, match=r"structured_outputs: the .* cannot be used: .{8}") as refused:
        compiler.compile(Structure(kind, text))  # type: ignore[arg-type]
    assert refused.value.field == "structured_outputs"
    assert len(refused.value.message) < 500
    assert "\n" not in refused.value.message
    assert time.process_time() - here < 0.1
    assert child_seconds() - there < TRIAL_CPU_SECONDS + 0.3
    here = time.process_time()
    with pytest.raises(InvalidRequest):
        compiler.compile(Structure(kind, text))  # type: ignore[arg-type]
    assert time.process_time() - here < 0.01


ENDLESS = {"$defs": {"a": {"properties": {"a": {"$ref": "#/$defs/a"}}, "required": ["a"]}}, "$ref": "#/$defs/a"}
BORDERLINE = {
    "exponential automaton": ("regex", "(a|b)*a(a|b){40}"),
    "nested stars": ("regex", "(a*)*b"),
    "equal alternatives": ("regex", "(a|a)*b"),
    "endless object": ("json_schema", json.dumps(ENDLESS)),
    "many items": ("json_schema", '{"type": "array", "minItems": 1000000000}'),
    "long string": ("json_schema", '{"type": "string", "maxLength": 1000000000}'),
    "large enum": ("json_schema", json.dumps({"enum": [f"e{i}" for i in range(6000)]})),
    "many choices": ("choice", json.dumps([f"c{i}" for i in range(6000)])),
    "own whitespace": ("json_schema", '{"type": "object", "x-guidance": {"whitespace_pattern": "(a|b)*a(a|b){20}"}}'),
}


@pytest.mark.parametrize("name", BORDERLINE)
def test_large_but_harmless_structures_are_served(compiler: Compiler, name: str) -> None:
    kind, text = BORDERLINE[name]
    grammar = compiler.compile(Structure(kind, text))  # type: ignore[arg-type]
    paths, matcher = Walker(grammar, PADDED, EOS), grammar.matcher()
    rng = np.random.default_rng(0)
    began = time.thread_time()
    for _ in range(100):
        token = int(rng.choice(paths.allowed(matcher)))
        assert matcher.accept(token)
        if token == EOS:
            break
    assert time.thread_time() - began < 0.5


MAX_LATE_STEPS = 1000
LATE = {
    "too complex": ("lark", "start: A B\nA: /([0-9] ){150}/\nB: /(a{1000}){1000}/"),
    "5 ms a token": ("lark", 'start: A s\nA: /([0-9] ){150}/\ns: s s s | s s | "a" |'),
}


@pytest.mark.parametrize("why", LATE)
def test_a_grammar_that_turns_hostile_on_the_way_ends_its_own_request_only(compiler: Compiler, why: str) -> None:
    paths = walker(compiler, *LATE[why])
    matcher, other = paths.grammar.matcher(), paths.grammar.matcher()
    slowest, began = 0.0, time.thread_time()

    def go() -> None:
        nonlocal slowest
        for _ in range(MAX_LATE_STEPS):
            step = time.thread_time()
            paths.allowed(matcher)
            slowest = max(slowest, time.thread_time() - step)
            allowed = np.flatnonzero(np.unpackbits(paths.row.view(np.uint8), bitorder="little"))
            matcher.accept(int(next(t for t in allowed if t != EOS)))

    with pytest.raises(InvalidRequest, match=why):
        go()
    assert slowest < 0.5
    assert time.thread_time() - began < 0.5 + MAX_LATE_STEPS * 0.005
    assert len(paths.allowed(other))


def test_a_reference_elsewhere_is_never_fetched(compiler: Compiler) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.3)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/schema.json"
        with pytest.raises(InvalidRequest, match=r"127\.0\.0\.1"):
            compiler.compile(Structure("json_schema", json.dumps({"$ref": url})))
        with pytest.raises(TimeoutError):
            server.accept()


def test_other_threads_run_while_a_hostile_structure_is_tried(compiler: Compiler) -> None:
    compiler.compile(Structure("regex", "warm"))
    done = threading.Event()
    ticks = 0

    def refused() -> None:
        with pytest.raises(InvalidRequest):
            compiler.compile(Structure("regex", ".?" * 20_000))
        done.set()

    thread = threading.Thread(target=refused)
    thread.start()
    while not done.wait(0.005):
        ticks += 1
    thread.join()
    assert ticks > 20


def test_a_child_that_was_killed_is_replaced(compiler: Compiler) -> None:
    compiler.compile(Structure("regex", "before"))
    for child in psutil.Process().children():
        if "pagoda.structured.trial" in " ".join(child.cmdline()):
            child.kill()
            child.wait(5)
    assert walker(compiler, "regex", "after").walk(0) == "after"
