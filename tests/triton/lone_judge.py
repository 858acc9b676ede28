"""Whether an output is its lone run's, by transformers' own logits of the same model folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from pagoda.server import store
from pagoda.text.tokenizer import Tokenizer
from pagoda_kernels.sampling import GROUP, TILE, uniforms
from pagoda_kernels.sampling.reference import cut
from torch import Tensor
from transformers import AutoModelForCausalLM

NEAR_TIE = 1e-4
"""Logits closer than this may swap with the batch's shape: float32 products change their last bits with it."""


TOP_K = 50
"""Of what is drawn by a seed."""


class Given(NamedTuple):
    """What somebody was answered; temperature 0 is greedy, another one goes with TOP_K."""

    prompt_ids: Sequence[int]
    token_ids: Sequence[int]
    temperature: float = 0.0
    seed: int = 0


class LoneJudge:
    """One forward pass shows the float32 logits before each token of an answer, and so the token that a lone run draws
    there: the argmax, or the one whose shares hold the random numbers of (seed, position), level by level."""

    def __init__(self) -> None:
        folder = store.models_dir() / store.DEFAULT_MODEL
        self.tokenizer = Tokenizer.from_folder(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def check_text(self, prompt: str, text: str) -> int:
        """As `check`, of a greedy answer."""
        return self.check([Given(self.tokenizer.encode(prompt), self.tokenizer.encode(text))])

    @torch.inference_mode()
    def check(self, answers: list[Given]) -> int:
        """The number of tokens that another one was within NEAR_TIE of being; any other difference fails."""
        near_ties = 0
        for given, logits in self._logits(answers):
            missed = (_drawn if given.temperature else _greedy)(given, logits)
            worst = float(missed.max())
            assert worst < NEAR_TIE, f"token {int(missed.argmax())} of {given} is {worst} beside the lone run's"
            near_ties += int((missed > 0).sum())
        return near_ties

    def _logits(self, answers: list[Given]) -> Iterator[tuple[Given, Tensor]]:
        """Each answer with the logits [tokens, V] before its tokens; four of similar length share a pass."""
        ordered = sorted(answers, key=lambda given: len(given.prompt_ids) + len(given.token_ids))
        for first in range(0, len(ordered), 4):
            part = ordered[first : first + 4]
            rows = [[*given.prompt_ids, *given.token_ids] for given in part]
            width = max(map(len, rows))
            hidden = self.model.model(torch.tensor([row + [0] * (width - len(row)) for row in rows])).last_hidden_state
            wanted = [  # what follows a token does not change it
                states[len(given.prompt_ids) - 1 : len(given.prompt_ids) - 1 + len(given.token_ids)]
                for given, states in zip(part, hidden, strict=True)
            ]
            logits = self.model.lm_head(torch.cat(wanted)).split([len(states) for states in wanted])
            yield from zip(part, logits, strict=True)


def _greedy(given: Given, logits: Tensor) -> Tensor:
    """How far each token's logit is below the best."""
    return logits.amax(dim=1) - _at(logits, torch.tensor(given.token_ids))


def _drawn(given: Given, logits: Tensor) -> Tensor:
    """How far the number of any level is from the share, an interval of [0, 1], that it had to fall into."""
    dropped = logits < logits.topk(TOP_K).values[:, -1:]
    weights = (logits.double() / given.temperature).masked_fill(dropped, float("-inf")).softmax(dim=1)
    positions, tokens = torch.arange(len(logits)), torch.tensor(given.token_ids)
    missed = torch.zeros(len(logits), dtype=torch.float64)
    for drawn, size in zip(uniforms(torch.full_like(positions, given.seed), positions), (TILE, GROUP, 1), strict=True):
        pieces, place = cut(weights, size), tokens // size
        shares = pieces.sum(dim=2) / pieces.sum(dim=(1, 2)).unsqueeze(1)
        ends = _at(shares.cumsum(dim=1), place)
        missed = torch.stack([missed, ends - _at(shares, place) - drawn, drawn - ends]).amax(dim=0)
        weights, tokens = pieces[positions, place], tokens % size
    return missed


def _at(values: Tensor, places: Tensor) -> Tensor:
    return values.gather(1, places.unsqueeze(1))[:, 0]
