"""The kernels' tests run natively on a GPU, and on a CPU where TRITON_INTERPRET=1 was set before Triton is imported.

The interpreter takes milliseconds an instruction block, and its bfloat16 arithmetic is wrong: there, small cases in
float32 and float16. tests/kernels/test_triton_interpreter.py starts it.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run: all kernels without a GPU, large cases in the interpreter."""
    for item in items:
        if "tests/gpu/" not in item.path.as_posix():
            continue
        if INTERPRETED and (item.get_closest_marker("native") or _takes_long(item)):
            item.add_marker(pytest.mark.skip(reason="too large for the interpreter, or wrong there"))
        elif not INTERPRETED and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU or TRITON_INTERPRET=1"))


def _takes_long(item: pytest.Item) -> bool:
    """Say so for large cases of float16, which in the interpreter adds little to float32: small ones are enough."""
    parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    large = ("prefill", "decode_batch", "per_head", "one_row", "separate_tensors", "mqa_block_8")
    return parameters.get("dtype") == torch.float16 and getattr(parameters.get("case"), "name", "") in large


@pytest.fixture
def device() -> str:
    return "cpu" if INTERPRETED else "cuda"


_DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(torch.bfloat16, marks=pytest.mark.native),
]


@pytest.fixture(params=_DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    chosen: torch.dtype = request.param
    return chosen


@pytest.fixture
def bounds(dtype: torch.dtype) -> tuple[float, float]:
    """The kernels' bounds on the maximum and the RMS relative error, against float32 arithmetic on the same inputs."""
    return {
        torch.float32: (1e-5, 1e-5),
        torch.float16: (5e-3, 1e-3),
        torch.bfloat16: (2e-2, 4e-3),
    }[dtype]
