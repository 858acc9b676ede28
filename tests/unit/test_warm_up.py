"""What is done while torch is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

WARM_UP = """
import sys, threading
from pagoda import warm_up

warm_up.begin(sys.argv[1])
for thread in set(threading.enumerate()) - {threading.current_thread()}:
    thread.join()
assert "torch" not in sys.modules
"""


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_it_needs_no_torch_and_no_gpu(device: str) -> None:
    ran = subprocess.run([sys.executable, "-c", WARM_UP, device], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_triton_hashes_itself_without_torch() -> None:
    pytest.importorskip("triton")
    program = "import sys; from triton.runtime.cache import triton_key; triton_key(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
