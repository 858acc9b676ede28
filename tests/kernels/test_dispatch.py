"""for_device: the choice, its log, and what is missing."""

import logging
import sys
from dataclasses import fields

import pytest
import torch
from pagoda_kernels import MissingKernel, Ops, for_device


def test_every_op_of_the_cpu_is_chosen_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        ops = for_device(torch.device("cpu"))
    names = [field.name for field in fields(Ops)]
    assert all(callable(getattr(ops, name)) for name in names)
    assert [record.getMessage().split()[0] for record in caplog.records] == names
    assert "paged_attention on cpu: pagoda_kernels.paged_attention.cpu" in caplog.text
    assert "silu_mul on cpu: pagoda_kernels.silu_mul.reference" in caplog.text


def test_every_op_of_cuda_has_a_kernel(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        ops = for_device(torch.device("cuda"))
    assert [record.levelname for record in caplog.records] == ["INFO"] * len(fields(Ops))
    assert "sample on cuda: pagoda_kernels.sampling.kernel" in caplog.text
    assert ops.linear.__module__ == "pagoda_kernels.linear.kernel"


def test_a_missing_kernel_says_which_and_why(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "pagoda_kernels.rms_norm.kernel", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with caplog.at_level(logging.INFO):
        ops = for_device(torch.device("cuda"))
    assert "add_rms_norm on cuda: missing" in caplog.text
    with pytest.raises(MissingKernel, match=r"add_rms_norm has no CUDA kernel \(pagoda_kernels/rms_norm/.*triton"):
        ops.add_rms_norm(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(2), 1e-5)


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ValueError, match="'meta': use 'cpu' or 'cuda'"):
        for_device(torch.device("meta"))
