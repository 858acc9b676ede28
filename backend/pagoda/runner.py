"""One device's part of a step: weights, KV cache, forward pass, sampling."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import pagoda_kernels
import torch

from pagoda import batch as batches
from pagoda import models, weights
from pagoda.config import EngineConfig
from pagoda.errors import ConfigError
from pagoda.hf_config import HFConfig
from pagoda.layers import KVCache, Rotary
from pagoda.models.llama import LlamaForCausalLM
from pagoda.sampler import Draw, Sampler
from pagoda.scheduler import Plan

log = logging.getLogger("pagoda.runner")


@dataclass(frozen=True, slots=True)
class Launched:
    """A step on its way: its plan and where its samples will be."""

    plan: Plan
    draw: Draw | None
    """None when no request of the step is sampled."""


class Runner:
    steps_ahead = 0
    """How many steps may be launched before the first one's samples are read. A CPU computes in `launch` itself."""

    def __init__(self, config: EngineConfig, hf_config: HFConfig, folder: Path, max_model_len: int) -> None:
        self.device = resolve_device(config.device)
        self.dtype = resolve_dtype(config.dtype, hf_config.dtype, self.device)
        self.block_size = config.block_size
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        self.ops = pagoda_kernels.for_device(self.device)
        self.sampler = Sampler(self.ops, self.device)
        self.model = self._load(hf_config, folder)
        self.rotary = Rotary(hf_config, max_model_len, self.device)
        self.num_blocks = num_kv_blocks(config, hf_config, self.dtype, max_model_len)
        self.cache = KVCache(hf_config, self.num_blocks, config.block_size, self.dtype, self.device)

    def _load(self, hf_config: HFConfig, folder: Path) -> LlamaForCausalLM:
        started = time.monotonic()
        default = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with self.device:
                model = models.build(hf_config, self.ops)
        finally:
            torch.set_default_dtype(default)
        weights.load(model, folder, model.tied)
        log.info("weights loaded in %.1f s", time.monotonic() - started)
        return model.eval()

    @torch.inference_mode()
    def launch(self, plan: Plan) -> Launched:
        """Start a step; its samples are read with `collect`."""
        batch = batches.build(plan, block_size=self.block_size, device=self.device)
        hidden = self.model(batch, self.rotary, self.cache)
        chunks = [c for c in plan.chunks if c.samples]
        if not chunks:
            return Launched(plan, None)
        return Launched(plan, self.sampler.launch(chunks, self.model.logits(hidden[batch.sample_rows])))

    def collect(self, launched: Launched) -> list[int]:
        """The sampled tokens of a step, one for each chunk that samples; waits for the device."""
        return self.sampler.collect(launched.draw) if launched.draw is not None else []


def resolve_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device 'cuda' was asked for and no GPU is visible: run `pagoda doctor`, or set device to 'cpu'"
        )
    return torch.device(name)


def resolve_dtype(name: str, checkpoint: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        name = "float32" if device.type == "cpu" else checkpoint
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"the checkpoint's dtype {name!r} is not known: set dtype to float32, bfloat16 or float16")
    return dtype


def num_kv_blocks(config: EngineConfig, hf_config: HFConfig, dtype: torch.dtype, max_model_len: int) -> int:
    """Blocks of the pool. Raises ConfigError when a single request of full length would not fit."""
    block_bytes = hf_config.kv_elements_per_token * config.block_size * dtype.itemsize
    num_blocks = config.num_kv_blocks or int(config.kv_cache_gib * 2**30) // block_bytes
    needed = -(-max_model_len // config.block_size)
    if num_blocks < needed:
        raise ConfigError(
            f"the KV cache holds {num_blocks} blocks and a request of max_model_len {max_model_len} needs {needed}: "
            f"lower max_model_len to {num_blocks * config.block_size} or raise kv_cache_gib (num_kv_blocks)"
        )
    return num_blocks
