"""Check the ops, then time them: `python -m pagoda_kernels.bench [OP ...] [--json FILE]`.

Every load of an op (`bench_loads` in its cases.py) is first compared with the reference; one that differs gets no time
and makes the exit status 1. Then a row of the table: the median time of a call over rotating inputs; the rate; the
share of the floor, which is the larger of the bytes over the machine's read bandwidth and the operations over its
matrix rate, both measured in the same run; and how many times as long PyTorch's own operations take.

On a GPU it times the kernels with the shapes of Llama-3.1-8B, without one the CPU's ops with those of SmolLM2-135M.
"""

import argparse
import gc
import json
import pkgutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from . import __path__ as _folders
from .bench_loads import BenchLoad, Result
from .bench_timing import matrix_rate, median_us, read_rate, sets_for
from .dispatch import Ops, for_device
from .fp8_linear import Fp8Rows
from .testing import compare


@dataclass(frozen=True)
class Floor:
    """What this machine can do, in bytes and in operations a second."""

    device: torch.device
    read: float

    @cache  # noqa: B019 one object a run
    def matrix(self, dtype: torch.dtype) -> float:
        return matrix_rate(self.device, dtype)

    def us(self, load: BenchLoad) -> float:
        """Return the microseconds under which the load cannot be done."""
        return 1e6 * max(load.bytes / self.read, load.flops / self.matrix(load.rate) if load.flops else 0.0)


@dataclass(frozen=True)
class Row:
    """A line of the table. Times are in microseconds."""

    op: str
    load: str
    us: float | None
    """None: the check failed."""
    floor_us: float
    torch_us: float | None
    rate: str
    error: str = ""

    def __str__(self) -> str:
        head = f"{self.op:16s} {self.load:44s}"
        if self.us is None:
            return f"{head} FAILED: {self.error}"
        ratio = "" if self.torch_us is None else f"{self.torch_us / self.us:8.2f}"
        return f"{head} {self.us:10.1f} {self.rate:>14s} {self.floor_us / self.us:7.1%} {ratio:>8s}"


HEADER = f"{'op':16s} {'load':44s} {'µs':>10s} {'rate':>14s} {'floor':>7s} {'x torch':>8s}"


def op_names() -> list[str]:
    """Return the folders of the ops that offer loads."""
    folders = [module.name for module in pkgutil.iter_modules(_folders) if module.ispkg]
    with_cases = [name for name in folders if find_spec(f"{__package__}.{name}.cases")]
    return [name for name in with_cases if hasattr(_cases(name), "bench_loads")]


def loads_of(op: str, device: torch.device) -> Iterator[BenchLoad]:
    """Yield what the op's cases.py offers to time on the device."""
    loads: Iterator[BenchLoad] = _cases(op).bench_loads(device)  # type: ignore[attr-defined]
    return loads


def _cases(op: str) -> object:
    return import_module(f"{__package__}.{op}.cases")


def measure(op: str, load: BenchLoad, ops: Ops, floor: Floor) -> Row:
    """Check a load, then time it."""
    floor_us = floor.us(load)
    try:
        check(load, ops)
    except AssertionError as error:
        return Row(op, load.name, None, floor_us, None, "", str(error))
    calls = [load.make(ops, seed) for seed in range(sets_for(load.bytes))]
    us = median_us([call.op for call in calls], floor.device)
    by_torch = [call.torch for call in calls if call.torch is not None]
    torch_us = median_us(by_torch, floor.device) if by_torch else None
    bound_by_bytes = load.bytes / floor.read * 1e6 >= floor_us
    rate = f"{load.bytes / us / 1e3:.0f} GB/s" if bound_by_bytes else f"{load.flops / us / 1e6:.1f} TFLOP/s"
    return Row(op, load.name, us, floor_us, torch_us, rate)


def check(load: BenchLoad, ops: Ops) -> None:
    """Raise AssertionError unless the op gives what the reference does: integers and infinities exactly."""
    actual, expected = load.make(ops, 0).op(), load.make(ops, 0).expected()
    pairs = zip(_tensors(actual), _tensors(expected), strict=True)
    for got, want in pairs:
        if not want.dtype.is_floating_point:
            different = int((got != want).sum())
            assert different == 0, f"{different} of {want.numel()} numbers differ"
            continue
        infinite = want.isinf()
        assert torch.equal(got[infinite], want[infinite]), "infinities differ"
        compare(got.masked_fill(infinite, 0), want.masked_fill(infinite, 0), *load.bounds)


def _tensors(result: Result) -> tuple[Tensor, ...]:
    """What can be compared. Of quantised rows the scales: a value may round either way where its number may, too."""
    parts = result if isinstance(result, tuple) else (result,)
    return tuple(part.scales if isinstance(part, Fp8Rows) else part for part in parts)


def run(names: list[str], device: torch.device, floor: Floor) -> Iterator[Row]:
    ops = for_device(device)
    for name in names:
        for load in loads_of(name, device):
            yield measure(name, load, ops, floor)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()


def main() -> int:
    arguments = _parser().parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.inference_mode():
        floor = Floor(device, read_rate(device))
        machine = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        print(f"{machine}, torch {torch.__version__}: reads {floor.read / 1e9:.0f} GB/s\n{HEADER}", flush=True)
        rows = []
        for row in run(arguments.op or op_names(), device, floor):
            rows.append(row)
            print(row, flush=True)
    if arguments.json:
        _write(arguments.json, machine, floor, rows)
    return int(any(row.us is None for row in rows))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pagoda_kernels.bench", description="Check the ops, then time them."
    )
    parser.add_argument("op", nargs="*", choices=[*op_names(), []], metavar="OP", help=f"of {', '.join(op_names())}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    return parser


def _write(path: Path, machine: str, floor: Floor, rows: list[Row]) -> None:
    content = {
        "machine": machine,
        "torch": torch.__version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "read_bytes_per_s": floor.read,
        "rows": [asdict(row) for row in rows],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
