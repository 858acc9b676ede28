"""`pagoda serve`, all of whose Python processes load the faults of `sitecustomize.py`."""

from __future__ import annotations

import os
from pathlib import Path

from pagoda.cli import app
from pagoda.server import triton_runtime

HERE = str(Path(__file__).parent)

os.environ["PYTHONPATH"] = HERE
_environment = triton_runtime._environment
triton_runtime._environment = lambda libraries: {**_environment(libraries), "PYTHONPATH": HERE}
app()
