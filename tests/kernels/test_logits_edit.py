"""edit_logits against arithmetic on single numbers, and what it leaves alone."""

import math

import pytest
import torch
from pagoda_kernels import AllowedTokens, Bias, LogitsEdits, Penalties
from pagoda_kernels.logits_edit import EditLogits, cpu, reference
from pagoda_kernels.logits_edit.cases import CASES, Case
from pagoda_kernels.sampling import Sample
from pagoda_kernels.sampling import cpu as sampling_cpu
from pagoda_kernels.sampling import reference as sampling_reference
from pagoda_kernels.sampling.cases import Row, make_params
from pagoda_kernels.testing import compare

FORBIDDEN = float("-inf")
LARGE = Case("smol", rows=9, vocabulary=49152, seen=300, biased=9, masks=5)
implementations = pytest.mark.parametrize("op", [reference.edit_logits, cpu.edit_logits], ids=["reference", "cpu"])


def edited(logits: torch.Tensor, edits: LogitsEdits) -> torch.Tensor:
    """Return the same by Python floats, one number at a time."""
    rows = [[float(x) for x in row] for row in logits]
    if edits.penalties is not None:
        p = edits.penalties
        for row, token, count in zip(p.rows.tolist(), p.tokens.tolist(), p.counts.tolist(), strict=True):
            x, repetition = rows[row][token], float(p.repetition[row])
            x = x / repetition if x > 0 else x * repetition
            rows[row][token] = x - float(p.frequency[row]) * count - float(p.presence[row]) * (count > 0)
    if edits.bias is not None:
        b = edits.bias
        for row, token, value in zip(b.rows.tolist(), b.tokens.tolist(), b.values.tolist(), strict=True):
            rows[row][token] += value
    if edits.allowed is not None:
        for row, mask in enumerate(edits.allowed.rows.tolist()):
            for token in range(logits.shape[1]) if mask >= 0 else ():
                if not int(edits.allowed.bits[mask, token // 32]) >> token % 32 & 1:
                    rows[row][token] = FORBIDDEN
    return torch.tensor(rows, dtype=torch.float64).float().view(logits.shape)


@implementations
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_edits_are_those_of_the_contract(case: Case, op: EditLogits) -> None:
    logits, edits = case.make()
    expected = edited(logits, edits)
    op(logits, edits)
    assert torch.equal(logits == FORBIDDEN, expected == FORBIDDEN)
    compare(logits.clamp(min=-1e3), expected.clamp(min=-1e3), 1e-6)


@implementations
def test_a_known_row(op: EditLogits) -> None:
    """Tokens: positive in the prompt; negative, twice in the output; biased; seen and biased; masked; untouched."""
    logits = torch.tensor([[2.0, -2.0, 1.0, 4.0, 9.0, 5.0]])
    one = torch.ones(1)
    seen = [torch.tensor(x, dtype=torch.int32) for x in ([0, 0, 0], [0, 1, 3], [0, 2, 1])]
    biased = [torch.tensor(x, dtype=torch.int32) for x in ([0, 0], [3, 2])]
    edits = LogitsEdits(
        Penalties(2 * one, 0.25 * one, 0.5 * one, *seen),
        Bias(*biased, torch.tensor([10.0, -3.0])),
        AllowedTokens(torch.tensor([[0b101111]], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)),
    )
    op(logits, edits)
    assert logits.tolist() == [[1.0, -5.25, -2.0, 11.25, -math.inf, 5.0]]


@implementations
def test_the_sign_bit_of_a_word_is_a_token(op: EditLogits) -> None:
    logits = torch.zeros(1, 64)
    bits = torch.tensor([[-(2**31), 1]], dtype=torch.int32)
    op(logits, LogitsEdits(allowed=AllowedTokens(bits, torch.zeros(1, dtype=torch.int32))))
    assert (logits == 0).nonzero().tolist() == [[0, 31], [0, 32]]


@pytest.mark.parametrize("case", [*CASES, LARGE], ids=lambda case: case.name)
def test_the_cpus_way_agrees_with_the_reference_in_every_bit(case: Case) -> None:
    """Rows of a wider tensor: what lies between them stays, and nothing is read beyond a row."""
    logits, edits = case.make()
    wide = torch.full((case.rows, case.vocabulary + 7), 123.0)
    wide[:, : case.vocabulary] = logits
    reference.edit_logits(logits, edits)
    cpu.edit_logits(wide[:, : case.vocabulary], edits)
    assert torch.equal(wide[:, : case.vocabulary], logits)
    assert (wide[:, case.vocabulary :] == 123.0).all()


@implementations
def test_a_mask_hides_what_the_row_holds(op: EditLogits) -> None:
    logits = torch.full((2, 40), float("nan"))
    edits = LogitsEdits(allowed=AllowedTokens(torch.zeros(1, 2, dtype=torch.int32), torch.tensor([-1, 0]).int()))
    op(logits, edits)
    assert logits[0].isnan().all()
    assert (logits[1] == FORBIDDEN).all()


@implementations
@pytest.mark.parametrize("wish", [Row(temperature=0), Row(), Row(top_k=4, top_p=0.9, min_p=0.1)])
@pytest.mark.parametrize("sample", [sampling_reference.sample, sampling_cpu.sample], ids=["reference", "cpu"])
def test_a_row_without_an_allowed_token_draws_a_barred_one_and_the_others_do_not(
    op: EditLogits, sample: Sample, wish: Row
) -> None:
    """That is how a caller knows such a row: by the logit of what was drawn."""
    logits = Case("any", rows=4).make()[0]
    bits = torch.tensor([[0] * 10, [0x55555555] * 10], dtype=torch.int32)
    op(logits, LogitsEdits(allowed=AllowedTokens(bits, torch.tensor([-1, 0, 1, 0], dtype=torch.int32))))
    tokens = sample(logits, make_params([wish] * 4))
    assert (logits.gather(1, tokens.unsqueeze(1)).squeeze(1) == FORBIDDEN).tolist() == [False, True, False, True]
