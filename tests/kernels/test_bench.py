"""The benchmark: it checks before it times, and every op that has cases offers loads."""

import json
from pathlib import Path

import pytest
import torch
from pagoda_kernels import bench, for_device
from pagoda_kernels.bench_loads import BenchLoad, Calls
from pagoda_kernels.bench_timing import sets_for

CPU = torch.device("cpu")
FLOOR = bench.Floor(CPU, read=1e9)


def load(error: float = 0.0, flops: int = 0) -> BenchLoad:
    """A load that adds one, and misses by an error."""

    def make(ops: object, seed: int) -> Calls:
        x = torch.full((100,), float(seed))
        return Calls(lambda: x + 1 + error, lambda: x + 1, lambda: x.add(1))

    return BenchLoad("100 numbers", make, 800, flops)


def test_a_load_that_agrees_gets_a_time() -> None:
    row = bench.measure("add", load(), for_device(CPU), FLOOR)
    assert row.us is not None
    assert row.us > 0
    assert row.torch_us is not None
    assert row.floor_us == pytest.approx(0.8)
    assert row.rate.endswith("GB/s")


def test_a_load_that_differs_gets_none() -> None:
    row = bench.measure("add", load(error=0.1), for_device(CPU), FLOOR)
    assert row.us is None
    assert "maximum relative error" in str(row)


def test_integers_and_infinities_must_be_equal() -> None:
    ops = for_device(CPU)

    def check(got: list[float], want: list[float], dtype: torch.dtype) -> None:
        calls = Calls(lambda: torch.tensor(got, dtype=dtype), lambda: torch.tensor(want, dtype=dtype))
        bench.check(BenchLoad("numbers", lambda ops, seed: calls, 1), ops)

    check([1, -torch.inf], [1, -torch.inf], torch.float32)
    check([1, 2], [1, 2], torch.int64)
    with pytest.raises(AssertionError, match="1 of 2 numbers differ"):
        check([1, 3], [1, 2], torch.int64)
    with pytest.raises(AssertionError, match="infinities differ"):
        check([1, 5], [1, -torch.inf], torch.float32)


def test_what_is_bound_by_operations_shows_their_rate() -> None:
    floor = bench.Floor(CPU, read=1e30)
    row = bench.measure("add", load(flops=10**9), for_device(CPU), floor)
    assert row.rate.endswith("TFLOP/s")


def test_inputs_rotate_until_no_cache_holds_them() -> None:
    assert sets_for(2**30) == 1
    assert sets_for(100 * 2**20) == 3
    assert sets_for(1000) == 40


def test_every_op_with_cases_offers_loads() -> None:
    folders = {path.parent.name for path in Path(bench.__file__).parent.glob("*/cases.py")}
    assert set(bench.op_names()) == folders


def test_the_command_writes_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.json"
    monkeypatch.setattr("sys.argv", ["bench", "embedding", "--json", str(file)])
    monkeypatch.setattr(bench, "read_rate", lambda device: 1e9)
    monkeypatch.setattr(bench, "median_us", lambda calls, device: 5.0)
    monkeypatch.setattr(bench, "sets_for", lambda bytes_each: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main() == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["op"] for row in rows] == ["embedding"] * 4
    assert all(row["us"] == 5.0 for row in rows)
