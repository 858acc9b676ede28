"""What compiling ahead takes of Triton, and that it puts back. With a GPU, tests/gpu/test_compile_ahead.py compiles."""

import pytest
import torch
from pagoda_kernels import compiling_ahead
from triton.runtime._async_compile import active_mode
from triton.runtime.jit import JITFunction


def test_new_memory_holds_zeros() -> None:
    with compiling_ahead():
        made = [torch.empty(3), torch.ones(2).new_empty(2, dtype=torch.int64), torch.empty_like(torch.ones(2))]
    assert not any(x.any() for x in made)


def fail_within() -> None:
    with compiling_ahead():
        assert active_mode.get() is not None
        raise KeyError


def test_everything_is_put_back_even_after_an_error() -> None:
    run = JITFunction.run
    with compiling_ahead():
        assert JITFunction.run is not run
    with pytest.raises(KeyError):
        fail_within()
    assert JITFunction.run is run
    assert active_mode.get() is None
