"""Whether an output is greedy, by transformers' own logits of the same model folder."""

from __future__ import annotations

import torch
from pagoda.server import store
from pagoda.text.tokenizer import Tokenizer
from transformers import AutoModelForCausalLM

NEAR_TIE = 1e-4
"""Logits closer than this may swap with the batch's shape: float32 products change their last bits with it."""


class GreedyJudge:
    """A continuation is greedy when each of its tokens is the argmax of the float32 logits before it, which one
    forward pass shows for all of them: what a lone run gives, and any other differs where two logits nearly tie."""

    def __init__(self) -> None:
        folder = store.models_dir() / store.DEFAULT_MODEL
        self.tokenizer = Tokenizer.from_folder(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def check(self, prompt: str, text: str) -> int:
        """The number of tokens that are second by less than NEAR_TIE; any other difference fails."""
        return self.check_ids(self.tokenizer.encode(prompt), self.tokenizer.encode(text))

    @torch.inference_mode()
    def check_ids(self, prompt_ids: list[int], output_ids: list[int]) -> int:
        logits = self.model(torch.tensor([prompt_ids + output_ids])).logits[0, len(prompt_ids) - 1 : -1]
        gap = logits.max(dim=1).values - logits.gather(1, torch.tensor(output_ids)[:, None])[:, 0]
        worst = float(gap.max())
        assert worst < NEAR_TIE, f"token {int(gap.argmax())} of {output_ids} is {worst} below the best"
        return int((gap > 0).sum())
