"""A model's tokenizer is read when the model serves, not when the first client asks."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest
from frontend.fake_engine import MODEL, FakeEngine
from pagoda.text.tokenizer import Tokenizer
from pagoda_openai.model import Frontend


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders whose tokenizers have been read."""
    folders: list[Path] = []
    original = Tokenizer.from_folder

    def from_folder(path: Path) -> Tokenizer:
        folders.append(path)
        return original(path)

    monkeypatch.setattr(Tokenizer, "from_folder", from_folder)
    return folders


async def watched(engine: FakeEngine, seconds: float) -> Frontend:
    frontend: Frontend = engine.app().state.frontend
    watch = asyncio.create_task(frontend.read_ahead())
    await asyncio.sleep(seconds)
    assert not watch.done()
    watch.cancel()
    return frontend


async def test_it_is_read_once_and_before_anybody_asks(folder: Path, read: list[Path]) -> None:
    engine = FakeEngine(folder, 300, lambda asked, i: [72])
    frontend = await watched(engine, 0.5)
    assert read == [folder]
    await frontend.tokenizer(engine.facts)
    assert read == [folder]


async def test_one_that_cannot_be_read_is_said_once(
    tmp_path: Path, read: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "pagoda.frontend"):
        await watched(FakeEngine(tmp_path, 300, lambda asked, i: [72]), 0.5)
    assert read == [tmp_path]
    (record,) = caplog.records
    assert record.getMessage().startswith(f"the tokenizer of model {MODEL} cannot be read: The model folder")
