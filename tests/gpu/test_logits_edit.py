"""The kernels of edit_logits against the reference."""

from dataclasses import replace

import pytest
import torch
from pagoda_kernels import AllowedTokens, LogitsEdits
from pagoda_kernels.logits_edit import reference
from pagoda_kernels.logits_edit.cases import CASES, Case
from pagoda_kernels.sampling.cases import Row, make_params
from pagoda_kernels.testing import compare

LARGE = (
    Case("llama", rows=256, vocabulary=128256, seen=700, biased=300, masks=256),
    Case("gemma_odd", rows=9, vocabulary=262145, seen=5000, biased=3, masks=2),
)


@pytest.mark.parametrize(
    "case",
    [*CASES, *(pytest.param(case, marks=pytest.mark.native) for case in LARGE)],
    ids=lambda case: case.name,
)
def test_edit_logits_agrees_with_the_reference(case: Case, device: str) -> None:
    from pagoda_kernels.logits_edit import kernel

    logits, edits = case.make(device)
    # Rows of a wider tensor: what lies between them must stay.
    wide = torch.full((case.rows, case.vocabulary + 7), 123.0, device=device)
    wide[:, : case.vocabulary] = logits
    reference.edit_logits(logits, edits)
    kernel.edit_logits(wide[:, : case.vocabulary], edits)
    actual = wide[:, : case.vocabulary]
    assert torch.equal(actual == float("-inf"), logits == float("-inf"))
    compare(actual.clamp(min=-1e3), logits.clamp(min=-1e3), 1e-6)
    assert (wide[:, case.vocabulary :] == 123.0).all()


def test_untouched_tokens_may_hold_nan(device: str) -> None:
    from pagoda_kernels.logits_edit import kernel

    logits, edits = Case("few", seen=3, biased=2).make(device)
    logits.fill_(float("nan"))
    assert edits.penalties is not None
    logits[edits.penalties.rows.long(), edits.penalties.tokens.long()] = 1.0
    expected = logits.clone()
    reference.edit_logits(expected, edits)
    kernel.edit_logits(logits, edits)
    assert torch.equal(logits.isnan(), expected.isnan())


@pytest.mark.parametrize(
    "wish",
    [Row(temperature=0), Row(), Row(top_k=4), Row(top_p=0.9), Row(min_p=0.1, top_k=50, top_p=0.5)],
    ids=["greedy", "sampled", "top_k", "top_p", "all_filters"],
)
def test_a_row_without_an_allowed_token_draws_a_barred_one_and_the_others_do_not(wish: Row, device: str) -> None:
    """That is how a caller knows such a row: by the logit of what was drawn."""
    from pagoda_kernels.logits_edit import kernel
    from pagoda_kernels.sampling import kernel as sampling

    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(0)).to(device) * 3
    bits = torch.tensor([[0] * 10, [0x55555555] * 10], dtype=torch.int32, device=device)
    rows = torch.tensor([-1, 0, 1, 0, -1, 1], dtype=torch.int32, device=device)
    kernel.edit_logits(logits, LogitsEdits(allowed=AllowedTokens(bits, rows)))
    params = [replace(wish, seed=seed) for seed in range(6)]
    tokens = sampling.sample(logits, make_params(params, device))
    drawn = logits.gather(1, tokens.unsqueeze(1)).squeeze(1)
    assert (drawn == float("-inf")).tolist() == [False, True, False, True, False, False]
    others = [0, 2, 4, 5]
    alone = sampling.sample(logits[others], make_params([params[i] for i in others], device))
    assert torch.equal(tokens[others], alone)


def test_rows_that_are_not_contiguous_are_refused(device: str) -> None:
    from pagoda_kernels.logits_edit import kernel

    logits, edits = Case("any", seen=3).make(device)
    with pytest.raises(ValueError, match="rows must be contiguous"):
        kernel.edit_logits(logits.repeat(1, 2)[:, ::2], edits)
