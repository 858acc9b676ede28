"""Philox4x32-10, the counter-based generator of Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"."""

import torch
from torch import Tensor

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def uniforms(seeds: Tensor, positions: Tensor) -> Tensor:
    """Return three independent float64 numbers in [0, 1) for each (seed, position): [3, R] for int64 [R] and [R].

    The key is the seed and the counter is the position, low word first. The 42 bits of number i are word i, then the
    ten bits of word 3 from bit 10 i up.
    """
    none = torch.zeros_like(positions)
    words = philox(torch.stack((*_words(positions), none, none)), torch.stack(_words(seeds)))
    shifts = torch.arange(0, 30, 10, device=positions.device).unsqueeze(1)
    return (words[:3] * 2**10 + (words[3] >> shifts) % 2**10).double() * 2.0**-42


def philox(counter: Tensor, key: Tensor) -> Tensor:
    """Return four 32-bit words, [4, ...], for counter [4, ...] and key [2, ...]; int64 tensors holding 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # An int64 product wraps, which leaves its 64 bits those of the unsigned product.
        high0, low0 = reversed(_words(c0 * _MULTIPLIERS[0]))
        high1, low1 = reversed(_words(c2 * _MULTIPLIERS[1]))
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return torch.stack((c0, c1, c2, c3))


def _words(x: Tensor) -> tuple[Tensor, Tensor]:
    """Split 64-bit patterns into their low and high words."""
    return x & _WORD, (x >> 32) & _WORD
