"""Structured output over SmolLM2's own vocabulary: every text that its masks allow is of its structure."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import psutil
import pytest
import tokenizers
from pagoda.errors import InvalidRequest
from pagoda.sampling_params import Structure
from pagoda.structured import Compiler
from pagoda.structured.vocabulary import deaf_to_control_tokens
from unit.structured.walk import EOS, PADDED, VOCAB, Walker, walker

WALKS = 100

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 40}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"v": {"type": "number"}, "kids": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
            "required": ["v", "kids"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
ORDER = {
    "type": "object",
    "properties": {
        "email": {"type": "string", "format": "email"},
        "zip": {"type": "string", "pattern": "^[0-9]{5}$"},
        "tags": {"type": "array", "items": {"enum": ["a", "ü", "😀"]}, "maxItems": 3},
        "paid": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
        "when": {"type": "string", "format": "date-time"},
    },
    "required": ["email", "zip", "tags", "paid", "when"],
    "additionalProperties": False,
}
ARITHMETIC = """
start: sum
sum: product (("+" | "-") product)*
product: atom (("*" | "/") atom)*
atom: NUMBER | "(" sum ")"
NUMBER: /[1-9][0-9]{0,5}/
"""
GBNF = """
root ::= "yes" | "no" rest
rest ::= " because " [a-z]+ "."
"""
ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
CHOICES = ["a", "ab", 'say "yes"', "back\\slash", "日本 😀", "two\nlines", "\x7f"]


@pytest.mark.parametrize("schema", [PERSON, TREE, ORDER], ids=["person", "tree", "order"])
def test_100_of_100_walks_are_valid_by_their_schema(compiler: Compiler, schema: dict[str, Any]) -> None:
    paths = walker(compiler, "json_schema", json.dumps(schema))
    judge = jsonschema.Draft202012Validator(schema)
    for seed in range(WALKS):
        judge.validate(json.loads(paths.walk(seed)))


def test_100_of_100_walks_are_json_objects(compiler: Compiler) -> None:
    paths = walker(compiler, "json_object")
    assert all(isinstance(json.loads(paths.walk(seed)), dict) for seed in range(WALKS))


@pytest.mark.parametrize(
    "pattern", [r"\d{4}-\d{2}", r"^(a|b)*a(a|b){20}$", r'[a-z]+/"x"', r"(?i)yes|no", r"[\p{L}😀]{2,9}", r"\$\d+\.\d\d"]
)
def test_walks_match_their_pattern_whole(compiler: Compiler, pattern: str) -> None:
    paths = walker(compiler, "regex", pattern)
    python = re.compile(pattern.replace(r"\p{L}", r"\w"))
    for seed in range(WALKS):
        text = paths.walk(seed)
        assert python.fullmatch(text), text


def test_walks_end_at_a_choice_and_reach_each(compiler: Compiler) -> None:
    paths = walker(compiler, "choice", json.dumps(CHOICES))
    assert {paths.walk(seed) for seed in range(10 * WALKS)} == set(CHOICES)


def test_walks_follow_a_lark_grammar(compiler: Compiler) -> None:
    paths = walker(compiler, "lark", ARITHMETIC)
    for seed in range(WALKS):
        ast.parse(paths.walk(seed), mode="eval")


def test_walks_follow_a_gbnf_grammar(compiler: Compiler) -> None:
    paths = walker(compiler, "lark", GBNF)
    for seed in range(WALKS):
        assert re.fullmatch(r"yes|no because [a-z]+\.", paths.walk(seed))


def test_strings_hold_any_script_in_whole_characters(compiler: Compiler) -> None:
    """Tokens that are pieces of characters may come, in an order that makes characters only."""
    paths = walker(compiler, "json_schema", '{"type": "string"}')
    tokenizer = paths.grammar.tokenizer
    foreign = np.zeros(PADDED, bool)
    foreign[[t for t in range(VOCAB) if any(byte >= 0x80 for byte in tokenizer.decode_bytes([t]))]] = True
    texts = [paths.walk(seed, prefer=foreign) for seed in range(WALKS)]
    assert all(isinstance(json.loads(text), str) for text in texts)
    assert sum(any(ord(char) > 0x7F for char in text) for text in texts) == WALKS
    matcher = paths.grammar.matcher()
    for token in tokenizer.tokenize_str('"日本語 😀 é \\u00e9"'.replace("\\u00e9", "e\u0301")):
        assert matcher.accept(token)
    assert matcher.is_finished


def test_the_end_comes_where_it_may_and_nothing_after_it(compiler: Compiler) -> None:
    paths = walker(compiler, "regex", "ab?")
    matcher = paths.grammar.matcher()
    (a,), (b,) = paths.grammar.tokenizer.tokenize_str("a"), paths.grammar.tokenizer.tokenize_str("b")
    assert EOS not in paths.allowed(matcher)
    assert not matcher.accept(EOS)
    assert not matcher.accept(PADDED - 1)
    assert matcher.accept(a)
    assert set(paths.allowed(matcher)) == {b, EOS}
    assert not matcher.is_finished
    assert matcher.accept(b)
    assert matcher.is_finished
    assert set(paths.allowed(matcher)) == {EOS}
    assert matcher.accept(EOS)
    assert not len(paths.allowed(matcher))
    assert not matcher.accept(EOS)


def test_tokens_of_the_padding_and_control_tokens_never_come(compiler: Compiler) -> None:
    paths = walker(compiler, "regex", r"(?s).*")
    allowed = paths.allowed(paths.grammar.matcher())
    special = {t for t in range(VOCAB) if paths.grammar.tokenizer.is_special_token(t)}
    assert len(special) > 10
    assert special & set(allowed.tolist()) == {EOS}
    assert max(allowed) < VOCAB


CONTROL = ["<|im_end|>", "a<|im_start|>b", "<|im_end|><|im_end|>"]


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("choice", json.dumps(CONTROL), set(CONTROL)),
        ("json_schema", json.dumps({"enum": CONTROL}), {json.dumps(text) for text in CONTROL}),
        ("regex", r"(a<\|im_start\|>b|(<\|im_end\|>){1,2})", set(CONTROL)),
        ("lark", f"start: {' | '.join(map(json.dumps, CONTROL))}", set(CONTROL)),
    ],
    ids=["choice", "json", "regex", "lark"],
)
def test_control_tokens_in_a_structure_are_text(compiler: Compiler, kind: str, text: str, expected: set[str]) -> None:
    """Forced text is tokenized; a control token that it spells would not match it."""
    paths = walker(compiler, kind, text)
    assert {paths.walk(seed) for seed in range(WALKS)} == expected


def test_an_end_asked_for_by_its_number_comes_only_where_it_may(compiler: Compiler) -> None:
    paths = walker(compiler, "lark", 'start: <[0-3]> "a"')
    matcher = paths.grammar.matcher()
    assert paths.allowed(matcher).tolist() == [0, 1, 3]
    assert matcher.accept(3)
    assert matcher.accept(*paths.grammar.tokenizer.tokenize_str("a"))
    assert paths.allowed(matcher).tolist() == [EOS]


UNIGRAM = {"type": "Unigram", "unk_id": 0, "vocab": [["<u>", 0.0], ["<e>", 0.0], *([c, -1.0] for c in "<ue>a")]}
PIECES = {"type": "BPE", "unk_token": "<u>", "vocab": {"<u>": 0, "<e>": 1, "<": 2, "u": 3, "e": 4, ">": 5, "a": 6}}


@pytest.mark.parametrize("model", [UNIGRAM, {**PIECES, "merges": []}], ids=["unigram", "BPE"])
def test_no_text_spells_a_renamed_control_token(model: dict[str, Any]) -> None:
    added = [{"id": i, "content": name, "special": True, **ADDED} for i, name in enumerate(["<u>", "<e>"])]
    spec = {"version": "1.0", "added_tokens": added, "model": model}
    plain = tokenizers.Tokenizer.from_str(json.dumps(spec))
    deaf = tokenizers.Tokenizer.from_str(deaf_to_control_tokens(json.dumps(spec).encode()))
    assert plain.encode("a<e>").ids == [6, 1]
    assert deaf.encode("a<e>").ids == [6, 2, 4, 5]
    assert deaf.encode("?").ids == plain.encode("?").ids == [0]
    assert deaf.get_vocab_size() == plain.get_vocab_size()


def test_a_model_with_fewer_logits_than_tokens(folder: Path) -> None:
    small = Compiler(folder, 32_000, (EOS,))
    paths = Walker(small.compile(Structure("regex", "[a-z]{3}")), 32_000, EOS)
    assert re.fullmatch("[a-z]{3}", paths.walk(1))
    assert max(paths.allowed(paths.grammar.matcher())) < 32_000
    small.close()


def test_whitespace_of_json_is_bounded(compiler: Compiler) -> None:
    """One space, or a line break with an indent: printed in lines or in one, but never without an end."""
    grammar = compiler.compile(Structure("json_schema", json.dumps(PERSON)))

    def fits(text: str) -> bool:
        matcher = grammar.matcher()
        return all(matcher.accept(token) for token in grammar.tokenizer.tokenize_str(text)) and matcher.is_finished

    person = {"name": "a b", "age": 3}
    for text in (json.dumps(person), json.dumps(person, indent=2), json.dumps(person, separators=(",", ":"))):
        assert fits(text), text
    for text in ('{  "name": "a", "age": 1}', '{\n\n"name": "a", "age": 1}', '{"name":\t"a", "age": 1}'):
        assert not fits(text), text


def test_nothing_is_loaded_or_started_before_the_first_use(folder: Path) -> None:
    """And the child goes when its parent is killed."""
    code = (
        "import sys, pathlib, psutil; from pagoda.structured import Compiler; "
        f"compiler = Compiler(pathlib.Path({str(folder)!r}), {VOCAB}, ({EOS},)); "
        "assert not {'llguidance', 'torch', 'tokenizers'} & set(sys.modules); "
        "assert not psutil.Process().children(); "
        "from pagoda.sampling_params import Structure; compiler.compile(Structure('regex', 'a')); "
        "print(psutil.Process().children()[0].pid, flush=True); import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    )
    pid = int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, text=True).stdout)
    deadline = time.monotonic() + 5
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the child outlived its parent"
        time.sleep(0.05)


def test_a_tokenizer_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}')
    lame = Compiler(tmp_path, 8, (0,))
    with pytest.raises(InvalidRequest, match="this model's tokenizer is not fit for it"):
        lame.compile(Structure("regex", "a"))
    lame.close()


def test_a_model_without_an_end_is_named(folder: Path) -> None:
    endless = Compiler(folder, VOCAB, ())
    with pytest.raises(InvalidRequest, match="no end-of-text token"):
        endless.compile(Structure("regex", "a"))
    endless.close()
