"""One compiler over SmolLM2's own vocabulary, padded as many models' are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pagoda.server import store
from pagoda.structured import Compiler
from unit.structured.walk import EOS, PADDED


@pytest.fixture(scope="session")
def folder() -> Path:
    store.pull_default()
    return store.models_dir() / store.DEFAULT_MODEL


@pytest.fixture(scope="session")
def compiler(folder: Path) -> Iterator[Compiler]:
    made = Compiler(folder, PADDED, (EOS,))
    yield made
    made.close()
