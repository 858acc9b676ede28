"""rotary_kv_write against complex multiplication in float64, and the slots it writes and leaves."""

import pytest
import torch
from pagoda_kernels.rotary_kv_write import RotaryKvWrite, cpu, reference
from pagoda_kernels.rotary_kv_write.cases import CASES, EPS, Case, Inputs
from pagoda_kernels.testing import compare

cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
implementations = pytest.mark.parametrize(
    "op", [reference.rotary_kv_write, cpu.rotary_kv_write], ids=["reference", "cpu"]
)


def rotated(x: torch.Tensor, i: Inputs, norm: torch.Tensor | None) -> torch.Tensor:
    """Normalise, then rotate the pairs (j, j + Drot/2), or (2j, 2j + 1), as complex numbers."""
    half = i.cos.shape[1]
    wide = x.double()
    if norm is not None:
        wide = wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * norm.double()
    parts = wide[..., : 2 * half].unflatten(-1, (half, 2) if i.interleaved else (2, half))
    first, second = parts.unbind(-1 if i.interleaved else -2)
    turned = torch.complex(first, second) * torch.complex(i.cos.double(), i.sin.double())[i.positions].unsqueeze(1)
    parts = torch.stack((turned.real, turned.imag), dim=-1 if i.interleaved else -2)
    return torch.cat((parts.flatten(-2), wide[..., 2 * half :]), dim=-1).to(x.dtype)


@implementations
@cases
def test_q_and_k_are_rotated_and_v_is_not(case: Case, op: RotaryKvWrite) -> None:
    inputs = case.make()
    q, k = rotated(inputs.q, inputs, inputs.q_norm), rotated(inputs.k, inputs, inputs.k_norm)
    v = inputs.v.clone()
    inputs.run(op)
    compare(inputs.q, q, 1e-6)
    compare(inputs.k, k, 1e-6)
    assert torch.equal(inputs.v, v)


@implementations
@cases
def test_the_caches_hold_k_and_v_at_the_slots_and_nothing_else(case: Case, op: RotaryKvWrite) -> None:
    inputs = case.make()
    inputs.run(op)
    written = inputs.slots >= 0
    for cache, x, scale in ((inputs.k_cache, inputs.k, inputs.k_scale), (inputs.v_cache, inputs.v, inputs.v_scale)):
        rows = cache.flatten(0, 1).float()
        assert torch.equal(
            rows[inputs.slots[written]], nearest_fp8(x[written] / scale) if case.fp8_cache else x[written]
        )
        others = torch.ones(len(rows), dtype=torch.bool)
        others[inputs.slots[written]] = False
        assert rows[others].isnan().all()


def nearest_fp8(x: torch.Tensor) -> torch.Tensor:
    """Return the nearest of the finite numbers of float8_e4m3fn, all of which are listed here."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = numbers[numbers.isfinite()].unique()
    return numbers[(x.unsqueeze(-1) - numbers).abs().argmin(-1)]


def test_some_values_of_the_fp8_cases_saturate() -> None:
    inputs = Case("fp8", 17, fp8_cache=True).make()
    assert 0 < (inputs.v / inputs.v_scale).abs().amax() < 448 < (inputs.k / inputs.k_scale).abs().amax()


@implementations
def test_position_zero_leaves_q_as_it_is(op: RotaryKvWrite) -> None:
    inputs = Case("zero", 4).make()
    inputs.positions.zero_()
    q = inputs.q.clone()
    inputs.run(op)
    assert torch.equal(inputs.q, q)


@implementations
def test_bfloat16_is_rounded_once(op: RotaryKvWrite) -> None:
    inputs = Case("low", 20).make(torch.bfloat16)
    q = rotated(inputs.q, inputs, None)
    inputs.run(op)
    compare(inputs.q, q, torch.finfo(torch.bfloat16).eps)
