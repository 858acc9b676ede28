"""The kernel of rotary_kv_write against the reference: what it rotates, what it writes, and what it leaves."""

import pytest
import torch
from pagoda_kernels.rotary_kv_write import reference
from pagoda_kernels.rotary_kv_write.cases import CASES, Case
from pagoda_kernels.testing import compare

LARGE = (
    Case("llama_decode", 256, num_heads=32, num_kv_heads=8, head_size=128, rotary_size=128),
    Case("llama_prefill", 3001, num_heads=32, num_kv_heads=8, head_size=128, rotary_size=128, unwritten=(7, 3000)),
    Case("head_256", 65, num_heads=16, num_kv_heads=16, head_size=256, rotary_size=256),
    Case("qwen3_fp8", 300, num_heads=32, num_kv_heads=8, head_size=128, rotary_size=128, norm=True, fp8_cache=True),
)


@pytest.mark.parametrize(
    "case",
    [
        # The interpreter's conversion to float8 forgets the carry of a mantissa that is rounded up.
        *(pytest.param(case, marks=pytest.mark.native) if case.fp8_cache else case for case in CASES),
        *(pytest.param(case, marks=pytest.mark.native) for case in LARGE),
    ],
    ids=lambda case: case.name,
)
def test_rotary_kv_write_agrees_with_the_reference(
    case: Case, dtype: torch.dtype, bounds: tuple[float, float], device: str
) -> None:
    from pagoda_kernels.rotary_kv_write import kernel

    inputs, expected = case.make(dtype, device), case.make(dtype, device)
    inputs.run(kernel.rotary_kv_write)
    expected.run(reference.rotary_kv_write)
    compare(inputs.q, expected.q, *bounds)
    compare(inputs.k, expected.k, *bounds)
    assert torch.equal(inputs.v, expected.v)
    written = inputs.slots >= 0
    for cache, x, scale in ((inputs.k_cache, inputs.k, inputs.k_scale), (inputs.v_cache, inputs.v, inputs.v_scale)):
        rows = cache.flatten(0, 1).float()
        stored = reference.quantise(x[written], scale) if case.fp8_cache else x[written]
        assert torch.equal(rows[inputs.slots[written]], stored.float())
        others = torch.ones(len(rows), dtype=torch.bool, device=device)
        others[inputs.slots[written]] = False
        assert rows[others].isnan().all()


@pytest.mark.native
def test_offsets_go_beyond_32_bits(device: str) -> None:
    from pagoda_kernels.rotary_kv_write import kernel

    inputs = Case("far", 2, num_heads=8, num_kv_heads=8, head_size=128, rotary_size=128).make(torch.bfloat16, device)
    num_blocks = 2**31 // (16 * 8 * 128) + 3
    k_cache, v_cache = (torch.zeros(num_blocks, 16, 8, 128, dtype=torch.bfloat16, device=device) for _ in range(2))
    slots = torch.tensor([num_blocks * 16 - 1, 5], device=device)
    kernel.rotary_kv_write(
        inputs.q, inputs.k, inputs.v, inputs.cos, inputs.sin, inputs.positions, k_cache, v_cache, slots
    )
    for cache, x in ((k_cache, inputs.k), (v_cache, inputs.v)):
        assert torch.equal(cache.flatten(0, 1)[slots], x)
        assert int(cache.count_nonzero()) == int(x.count_nonzero())
