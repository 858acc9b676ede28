"""edit_logits against arithmetic on single numbers, and what it leaves alone."""

import math

import pytest
import torch
from pagoda_kernels import AllowedTokens, Bias, LogitsEdits, Penalties
from pagoda_kernels.logits_edit.cases import CASES, Case
from pagoda_kernels.logits_edit.reference import edit_logits
from pagoda_kernels.testing import compare

FORBIDDEN = float("-inf")


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


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_edits_are_those_of_the_contract(case: Case) -> None:
    logits, edits = case.make()
    expected = edited(logits, edits)
    edit_logits(logits, edits)
    assert torch.equal(logits == FORBIDDEN, expected == FORBIDDEN)
    compare(logits.clamp(min=-1e3), expected.clamp(min=-1e3), 1e-6)


def test_a_known_row() -> None:
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
    edit_logits(logits, edits)
    assert logits.tolist() == [[1.0, -5.25, -2.0, 11.25, -math.inf, 5.0]]


def test_the_sign_bit_of_a_word_is_a_token() -> None:
    logits = torch.zeros(1, 64)
    bits = torch.tensor([[-(2**31), 1]], dtype=torch.int32)
    edit_logits(logits, LogitsEdits(allowed=AllowedTokens(bits, torch.zeros(1, dtype=torch.int32))))
    assert (logits == 0).nonzero().tolist() == [[0, 31], [0, 32]]
