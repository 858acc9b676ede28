"""rotary_kv_write against complex multiplication in float64, and the slots it writes and leaves."""

import pytest
import torch
from pagoda_kernels.rotary_kv_write import RotaryKvWrite, cpu, reference
from pagoda_kernels.rotary_kv_write.cases import CASES, Case, Inputs
from pagoda_kernels.testing import compare

cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
implementations = pytest.mark.parametrize(
    "op", [reference.rotary_kv_write, cpu.rotary_kv_write], ids=["reference", "cpu"]
)


def run(op: RotaryKvWrite, i: Inputs) -> None:
    op(i.q, i.k, i.v, i.cos, i.sin, i.positions, i.k_cache, i.v_cache, i.slots)


def rotated(x: torch.Tensor, i: Inputs) -> torch.Tensor:
    """Rotate the pairs (j, j + Drot/2) as complex numbers."""
    half = i.cos.shape[1]
    pairs = torch.complex(x[..., :half].double(), x[..., half : 2 * half].double())
    pairs = pairs * torch.complex(i.cos.double(), i.sin.double())[i.positions].unsqueeze(1)
    return torch.cat((pairs.real, pairs.imag, x[..., 2 * half :].double()), dim=-1).to(x.dtype)


@implementations
@cases
def test_q_and_k_are_rotated_and_v_is_not(case: Case, op: RotaryKvWrite) -> None:
    inputs = case.make()
    q, k, v = rotated(inputs.q, inputs), rotated(inputs.k, inputs), inputs.v.clone()
    run(op, inputs)
    compare(inputs.q, q, 1e-6)
    compare(inputs.k, k, 1e-6)
    assert torch.equal(inputs.v, v)


@implementations
@cases
def test_the_caches_hold_k_and_v_at_the_slots_and_nothing_else(case: Case, op: RotaryKvWrite) -> None:
    inputs = case.make()
    run(op, inputs)
    written = inputs.slots >= 0
    for cache, x in ((inputs.k_cache, inputs.k), (inputs.v_cache, inputs.v)):
        rows = cache.flatten(0, 1)
        assert torch.equal(rows[inputs.slots[written]], x[written])
        others = torch.ones(len(rows), dtype=torch.bool)
        others[inputs.slots[written]] = False
        assert rows[others].isnan().all()


@implementations
def test_position_zero_leaves_q_as_it_is(op: RotaryKvWrite) -> None:
    inputs = Case("zero", 4).make()
    inputs.positions.zero_()
    q = inputs.q.clone()
    run(op, inputs)
    assert torch.equal(inputs.q, q)


@implementations
def test_bfloat16_is_rounded_once(op: RotaryKvWrite) -> None:
    inputs = Case("low", 20).make(torch.bfloat16)
    q = rotated(inputs.q, inputs)
    run(op, inputs)
    compare(inputs.q, q, torch.finfo(torch.bfloat16).eps)
