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
        return self.check_ids([(self.tokenizer.encode(prompt), self.tokenizer.encode(text))])

    def check_ids(self, pairs: list[tuple[list[int], list[int]]]) -> int:
        """The same over pairs of prompt and output, sixteen of similar length at a time."""
        ordered = sorted(pairs, key=lambda pair: len(pair[0]) + len(pair[1]))
        return sum(self._check(ordered[i : i + 16]) for i in range(0, len(ordered), 16))

    @torch.inference_mode()
    def _check(self, pairs: list[tuple[list[int], list[int]]]) -> int:
        width = max(len(prompt) + len(output) for prompt, output in pairs)
        ids = torch.tensor([prompt + output + [0] * (width - len(prompt + output)) for prompt, output in pairs])
        hidden = self.model.model(ids).last_hidden_state  # what follows a token does not change it
        rows = [hidden[i, len(p) - 1 : len(p) + len(output) - 1] for i, (p, output) in enumerate(pairs)]
        logits = self.model.lm_head(torch.cat(rows))
        chosen = torch.tensor([token for _, output in pairs for token in output])
        gap = logits.max(dim=1).values - logits.gather(1, chosen[:, None])[:, 0]
        worst = float(gap.max())
        assert worst < NEAR_TIE, f"token {int(gap.argmax())} of {chosen.tolist()} is {worst} below the best"
        return int((gap > 0).sum())
