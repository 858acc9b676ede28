"""Every kernel compiles for a Hopper GPU on a machine without one, down to the machine's own code.

The interpreter runs a kernel as Python and forgives what the compiler refuses; here nothing runs. The loads are the
benchmark's, with shapes cut down where only the host's time depends on them.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections import defaultdict
from dataclasses import replace
from typing import Any

import pagoda_kernels
import pytest
import torch
from pagoda_kernels import compiling_ahead
from pagoda_kernels.bench import loads_of, op_names
from pagoda_kernels.bench_loads import bench_model
from pagoda_kernels.dispatch import Ops, for_device
from pagoda_kernels.paged_attention.cases import Case
from torch.overrides import TorchFunctionMode

pytest.importorskip("triton")

SHARED_MEMORY = 227 * 1024
"""Bytes that a program may have."""
MODEL = replace(bench_model(torch.device("cuda")), hidden=2048, intermediate=4096, vocabulary=4096, rows=(256, 1024))


class Hopper:
    """What Triton's compiler asks of a driver."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Zeros(TorchFunctionMode):
    """Inputs are zeros, and so is what cuBLAS would give: the values are never looked at."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch._scaled_mm:
            return torch.zeros(args[0].shape[0], args[1].shape[1], dtype=kwargs["out_dtype"])
        if func is torch.randn:
            kwargs.pop("generator", None)
            func = torch.zeros
        return func(*args, **kwargs)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The kernels that a test has had compiled; tensors of the CPU count as a Hopper GPU's meanwhile."""
    from triton.compiler.compiler import CompiledKernel
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    kernels: list[Any] = []
    for info in pkgutil.walk_packages(pagoda_kernels.__path__, "pagoda_kernels."):
        module = importlib.import_module(info.name)
        for name, answer in (
            ("launches_early", True), ("has_copy_engine", True), ("is_hopper", True), ("multiprocessors", 132),
            ("bench_model", MODEL),
        ):  # fmt: skip
            if hasattr(module, name):
                monkeypatch.setattr(module, name, lambda device, answer=answer: answer)
        for kernel in vars(module).values():
            if isinstance(kernel, JITFunction):  # two ops may share one: each compiles it itself, in any order
                monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
    # In place of loading it into a GPU.
    monkeypatch.setattr(CompiledKernel, "_init_handles", lambda kernel: kernels.append(kernel))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # what a GPU gets today; unset, Triton 3.9 warns
    monkeypatch.setattr(driver, "_active", Hopper())
    return kernels


@pytest.fixture(scope="module")
def ops() -> Ops:
    return for_device(torch.device("cuda"))


@pytest.mark.parametrize("op", op_names())
def test_an_op_compiles_for_hopper(op: str, ops: Ops, compiled: list[Any]) -> None:
    with compiling_ahead(), Zeros():
        for load in loads_of(op, torch.device("cpu")):
            load.make(ops, 0).op()
    assert compiled
    for kernel in compiled:
        assert kernel.asm["cubin"]
        assert kernel.metadata.shared <= SHARED_MEMORY, kernel.name


_CHUNKS = {"num_heads": 8, "num_kv_heads": 2, "head_size": 128}
ATTENTION = (
    Case("window", ((1, 40), (5, 300)), 1, **_CHUNKS, window=20),
    Case("softcap", ((5, 300),), 0, **_CHUNKS, softcap=2.0),
    Case("head_64_block_8", ((5, 300),), 0, 8, 2, 64, block_size=8),
    Case("float8", ((1, 40), (300, 300)), 1, **_CHUNKS, cache_dtype=torch.float8_e4m3fn),
    Case("long_decode", ((1, 9000),), 1, **_CHUNKS),
)


@pytest.mark.parametrize("case", ATTENTION, ids=lambda case: case.name)
def test_attention_of_every_kind_compiles_for_hopper(case: Case, ops: Ops, compiled: list[Any]) -> None:
    with compiling_ahead(), Zeros():
        case.make(torch.bfloat16).run(ops.paged_attention)
    names = {kernel.name for kernel in compiled}
    chunks = {"_list_spans", "attend_all"} if len(case.requests) > case.num_decodes else {"_add_apart"}
    decodes = {"_decode"} if case.num_decodes else set()
    assert names == chunks | decodes | ({"_widen"} if case.name == "float8" else set())


def test_prefill_attention_compiles_for_other_gpus(
    ops: Ops, compiled: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pagoda_kernels.paged_attention import hopper

    monkeypatch.setattr(hopper, "is_hopper", lambda device: False)
    with compiling_ahead(), Zeros():
        for load in loads_of("paged_attention", torch.device("cpu")):
            if "decode" not in load.name:
                load.make(ops, 0).op()
    assert {kernel.name for kernel in compiled} == {"_prefill"}
