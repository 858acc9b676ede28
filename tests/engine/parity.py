"""A tiny random checkpoint saved by transformers, and both engines' logits for the same tokens."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pagoda_kernels
import torch
from pagoda import hf_config, models, weights
from pagoda.batch import Batch
from pagoda.hf_config import HFConfig
from pagoda.layers import KVCache, Rotary
from pagoda_kernels import AttentionBatch, Ops
from transformers import PretrainedConfig, PreTrainedModel

TOLERANCE = 3e-5
"""Largest difference of two logits, as a share of the largest logit; float32."""
BLOCK_SIZE = 8
MAX_MODEL_LEN = 96
CPU = torch.device("cpu")
PROMPT = [(7 * i * i + 3) % 128 for i in range(53)]
SHAPE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.4,
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
    "pad_token_id": None,
}


def save(folder: Path, shape: PretrainedConfig, model_class: type[PreTrainedModel], **options: Any) -> PreTrainedModel:
    """Save a model with random weights, norms and biases too, and return transformers' own copy of it.

    Tied embeddings are small: scaled ones would outweigh all layers, and every token would be followed by itself.
    """
    torch.manual_seed(0)
    model = model_class(shape).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
        if shape.tie_word_embeddings:
            model.get_input_embeddings().weight.mul_(0.1)
    model.save_pretrained(folder, **options)
    return model


def expected_logits(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """[T, vocab], all positions in one pass and without a cache."""
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([token_ids]), use_cache=False).logits[0]
    return logits


class Paged:
    """Pagoda's model over a paged cache that is full of NaN where nothing was written, for one request."""

    def __init__(
        self,
        folder: Path,
        max_model_len: int = MAX_MODEL_LEN,
        config: HFConfig | None = None,
        dtype: torch.dtype = torch.float32,
        ops: Ops | None = None,
    ) -> None:
        config = config or hf_config.load(folder)
        torch.set_default_dtype(dtype)
        try:
            self.model = models.build(config, ops or pagoda_kernels.for_device(CPU))
        finally:
            torch.set_default_dtype(torch.float32)
        weights.load(self.model, folder, self.model.tied, CPU)
        self.rotary = Rotary(config, max_model_len, CPU)
        num_blocks = 2 * (-(-max_model_len // BLOCK_SIZE))
        self.cache = KVCache(config, num_blocks, BLOCK_SIZE, dtype, CPU)
        self.cache.keys.fill_(float("nan"))
        self.cache.values.fill_(float("nan"))
        self.blocks = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1))
        self.length = 0

    @torch.inference_mode()
    def step(self, token_ids: list[int], outputs: list[int] | None = None) -> torch.Tensor:
        """The logits [T, vocab] of the request's next tokens; [S, vocab] of those at `outputs` alone."""
        start, count = self.length, len(token_ids)
        self.length = end = start + count
        positions = torch.arange(start, end)
        attention = AttentionBatch(
            block_tables=self.blocks[None, : -(-end // BLOCK_SIZE)].to(torch.int32),
            query_starts=torch.tensor([0, count], dtype=torch.int32),
            context_lens=torch.tensor([end], dtype=torch.int32),
            query_lens_host=[count],
            context_lens_host=[end],
            num_decodes=int(count == 1 and start > 0),
        )
        slots = self.blocks[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
        wanted = None if outputs is None else torch.tensor(outputs, dtype=torch.int64)
        batch = Batch(torch.tensor(token_ids), positions, slots, attention, wanted)
        return self.model.logits(self.model(batch, self.rotary, self.cache))

    def prefill(self, token_ids: list[int], chunk: int) -> torch.Tensor:
        """The logits of all tokens, taken in chunks."""
        return torch.cat([self.step(token_ids[i : i + chunk]) for i in range(0, len(token_ids), chunk)])

    def generate(self, prompt: list[int], count: int, chunk: int) -> tuple[list[int], torch.Tensor]:
        """The likeliest continuation, and the logits of every position but the last token's."""
        rows = [self.prefill(prompt, chunk)]
        tokens = [int(rows[0][-1].argmax())]
        for _ in range(count - 1):
            rows.append(self.step(tokens[-1:]))
            tokens.append(int(rows[-1].argmax()))
        return tokens, torch.cat(rows)


def difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, as a share of the largest expected value. NaN is infinitely far."""
    share = (got - expected).abs().max() / expected.abs().max()
    return float("inf") if share.isnan() else float(share)


def assert_parity(
    model: PreTrainedModel, folder: Path, *, chunks: Iterable[int] = (64, 9), max_model_len: int = MAX_MODEL_LEN
) -> None:
    """Prefill at once or in chunks, then paged decode: transformers' logits everywhere, and its likeliest tokens.

    Each decoded token is transformers' own choice after the tokens before it, so the greedy continuations are equal.
    """
    for chunk in chunks:
        tokens, got = Paged(folder, max_model_len).generate(PROMPT, 12, chunk)
        expected = expected_logits(model, PROMPT + tokens[:-1])
        assert difference(got, expected) < TOLERANCE, f"chunks of {chunk}"
        assert tokens == expected[len(PROMPT) - 1 :].argmax(dim=1).tolist(), f"chunks of {chunk}"


def steady(values: list[float], count: int) -> list[float]:
    """`count` numbers that repeat `values`."""
    return list(itertools.islice(itertools.cycle(values), count))


def rms(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt())
