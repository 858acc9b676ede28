"""The kernel of embedding against the reference: the same numbers."""

import pytest
import torch
from pagoda_kernels.embedding import reference
from pagoda_kernels.embedding.cases import CASES, Case
from pagoda_kernels.testing import PoisonedEmpty

LARGE = (Case("llama", 70000, 4096, vocabulary=1000),)


@pytest.mark.parametrize(
    "case",
    [*CASES, *(pytest.param(case, marks=pytest.mark.native) for case in LARGE)],
    ids=lambda case: case.name,
)
def test_embedding_agrees_with_the_reference(case: Case, dtype: torch.dtype, device: str) -> None:
    from pagoda_kernels.embedding import kernel

    inputs = case.make(dtype, device)
    with PoisonedEmpty():
        actual = kernel.embedding(inputs.token_ids, inputs.weight)
    assert torch.equal(actual, reference.embedding(inputs.token_ids, inputs.weight))
    assert actual.is_contiguous()


@pytest.mark.native
def test_offsets_go_beyond_32_bits(device: str) -> None:
    from pagoda_kernels.embedding import kernel

    weight = torch.zeros(2**20 + 1, 4096, dtype=torch.bfloat16, device=device)
    weight[-1] = 3.0
    ids = torch.tensor([2**20, 0], device=device)
    assert kernel.embedding(ids, weight).float().mean(dim=1).tolist() == [3.0, 0.0]
