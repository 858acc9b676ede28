"""Faults that single requests bring about, by the first token of their prompt. Python imports this as it starts."""

from __future__ import annotations

import sys
from typing import Any

FORWARD, MEMORY, SAMPLER, DETOKENIZER = range(1001, 1005)


def plant_in_engine() -> None:
    import torch
    from pagoda import logits_edits
    from pagoda.runner import Runner

    launch, biases = Runner.launch, logits_edits._biases

    def faulty_launch(self: Runner, plan: Any) -> Any:
        for request in (chunk.request for chunk in plan.chunks):
            if request.prompt_ids[0] == FORWARD and request.num_output_tokens == 10:
                raise RuntimeError("planted in the forward pass")
            if request.prompt_ids[0] == MEMORY:
                raise torch.OutOfMemoryError("planted in a prefill")
        return launch(self, plan)

    def faulty_biases(request: Any) -> dict[int, float]:
        if request.prompt_ids[0] == SAMPLER and request.num_output_tokens == 3:
            raise RuntimeError("planted in the sampler")
        return biases(request)

    Runner.launch, logits_edits._biases = faulty_launch, faulty_biases


def plant_in_detokenizer() -> None:
    from pagoda.text.detokenizer import IncrementalDetokenizer

    begin, push = IncrementalDetokenizer.__init__, IncrementalDetokenizer.push

    def begin_faulty(self: Any, *arguments: Any, prompt_ids: Any = (), **rest: Any) -> None:
        begin(self, *arguments, prompt_ids=prompt_ids, **rest)
        self.tokens_left = 3 if prompt_ids[0] == DETOKENIZER else None

    def faulty_push(self: Any, ids: Any) -> str:
        if self.tokens_left is not None:
            self.tokens_left -= len(ids)
            if self.tokens_left <= 0:
                raise RuntimeError("planted in the detokenizer")
        return push(self, ids)

    IncrementalDetokenizer.__init__, IncrementalDetokenizer.push = begin_faulty, faulty_push


if "pagoda.process" in sys.orig_argv:
    plant_in_engine()
elif {"pagoda_openai.worker", "pagoda.text.worker"} & set(sys.orig_argv):
    plant_in_detokenizer()
