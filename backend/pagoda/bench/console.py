"""Where `pagoda bench` prints: as wide as the terminal, and wide enough for every table in a file or a pipe."""

from __future__ import annotations

import os
import sys

from rich.console import Console

WIDTH = 120

console = Console(highlight=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDTH)
