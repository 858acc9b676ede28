"""A child process and what its parent learns of its end."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from pagoda.child import Child

MAIN = """
import subprocess, sys
from pagoda.child import die_with_parent, leave
start = sys.stdin.buffer.readline()
die_with_parent()
"""
ENDINGS = {
    "speaks": ("leave('no luck with ' + start.decode().strip(), 2)", 'no luck with {"word":"x"}', "with status 2"),
    "speaks at length": ("leave('ä' * 9000, 2)", "ä" * 2048, "with status 2"),
    "says nothing": ("import os; os._exit(3)", None, "with status 3"),
    "leaves another behind": (
        "subprocess.Popen(['sleep', '1'], close_fds=False); leave('gone', 1)",
        "gone",
        "with status 1",
    ),
    "leaves another behind, silently": (
        "import os; subprocess.Popen(['sleep', '1'], close_fds=False); os._exit(0)",
        None,
        "with status 0",
    ),
}


class Start(msgspec.Struct):
    word: str


@pytest.mark.parametrize("name", ENDINGS)
def test_the_parent_learns_how_and_why_a_child_ended(tmp_path: Path, name: str) -> None:
    ending, words, how = ENDINGS[name]
    (tmp_path / "ending.py").write_text(MAIN + ending)
    child = Child("ending", Start("x"), tmp_path)
    assert child.ending == how
    assert child.last_words() == words
    child.end(grace=0)


def test_a_killed_child_has_no_last_words(tmp_path: Path) -> None:
    (tmp_path / "ending.py").write_text(MAIN + "import time; time.sleep(60)")
    child = Child("ending", Start("x"), tmp_path)
    child.kill()
    assert child.ending == "by signal 9"
    assert child.last_words() is None
    child.end(grace=0)
