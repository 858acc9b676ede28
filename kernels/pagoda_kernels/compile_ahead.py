"""Kernels are compiled before they are needed, many at a time.

Triton compiles a kernel when it is first called, and the caller waits: with an empty cache the kernels of an engine
take half a minute one after the other, and one that is first wanted in the middle of serving holds everybody up.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# LLVM, the assembler and the C compiler of the launchers work outside Python's lock; what precedes them does not.
_MOST_THREADS = 16


class _Compilers(ThreadPoolExecutor):
    """Threads that load what they have compiled, too: a kernel's launcher is compiled as it is loaded."""

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return super().submit(_loaded, work, *args, **kwargs)


def _loaded(work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    kernel = work(*args, **kwargs)
    _ = kernel.run
    return kernel


class _Zeros(TorchFunctionMode):
    """New memory holds zeros, so that what reads a kernel's result, an index perhaps, finds something valid."""

    _SOURCES = (torch.empty, torch.empty_like, torch.empty_strided, Tensor.new_empty)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result.zero_() if func in self._SOURCES else result


@contextmanager
def compiling_ahead() -> Iterator[None]:
    """Within, kernels that are called are compiled, side by side, and not run: what they would write stays zero.

    At the end all are ready, or the first error of a compilation is raised. For one thread at a time.
    """
    from triton.runtime._async_compile import AsyncCompileMode, FutureKernel
    from triton.runtime.jit import JITFunction

    class Mode(AsyncCompileMode):  # type: ignore[misc]
        def submit(self, key: Any, compile_fn: Any, finalize_fn: Any, *others: Any) -> FutureKernel:
            future = super().submit(key, compile_fn, finalize_fn, *others)
            finalize_fn(future)  # the next call finds it where compiled kernels are; Triton 3.6 would start all over
            return future

    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **options)

    with _Compilers(min(_MOST_THREADS, os.cpu_count() or 1), "compiler") as compilers, Mode(compilers), _Zeros():
        JITFunction.run = compile_only
        try:
            yield
        finally:
            JITFunction.run = run
