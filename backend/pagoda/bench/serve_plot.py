"""The distributions of the latencies that a reader of a stream feels, as cumulative curves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from pagoda.bench.serve_figures import Latencies

PANELS = {"ttft": "time to first token, ms", "itl": "inter-token latency, ms"}


def plot(file: Path, title: str, taken: Mapping[str, Latencies]) -> None:
    """Write TTFT and ITL of every load, by its name, side by side; the suffix of `file` is the format."""
    figure = Figure(figsize=(12, 5.5), layout="constrained")
    figure.suptitle(title)
    for axes, (name, label) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for load, latencies in taken.items():
            axes.step(*curve(getattr(latencies, name)), where="post", label=load)
        axes.set(xscale="log", xlabel=label, ylabel="% at most", ylim=(0, 101))
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(file, dpi=120)


def curve(values: list[float]) -> tuple[list[float], list[float]]:
    """Sorted values, and how many percent are at most each; from 0 up, so that a lone value is a line, too."""
    ordered = sorted(values)
    if not ordered:
        return [], []
    return [ordered[0], *ordered], np.linspace(0, 100, len(ordered) + 1).tolist()
