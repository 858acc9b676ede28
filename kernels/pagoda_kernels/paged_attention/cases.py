"""Shared cases of paged_attention: batches over a cache whose unused slots hold NaN and whose blocks are shuffled."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..bench_loads import BenchLoad, BenchModel, Calls, bench_model, randn
from ..dispatch import Ops
from . import AttentionBatch, PagedAttention, reference


@dataclass(frozen=True)
class Inputs:
    """The arguments of a call; `run(op)` makes it."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    batch: AttentionBatch
    scale: float
    window: int = 0
    softcap: float = 0.0
    k_scale: float = 1.0
    v_scale: float = 1.0

    def run(self, op: PagedAttention) -> Tensor:
        options = {name: getattr(self, name) for name in ("window", "softcap", "k_scale", "v_scale")}
        return op(self.q, self.k_cache, self.v_cache, self.batch, self.scale, **options)


@dataclass(frozen=True)
class Case:
    """Requests are (query length, context length); decodes come first."""

    name: str
    requests: tuple[tuple[int, int], ...]
    num_decodes: int
    num_heads: int = 9
    num_kv_heads: int = 3
    head_size: int = 64
    block_size: int = 16
    window: int = 0
    softcap: float = 0.0
    cache_dtype: torch.dtype | None = None
    k_scale: float = 1.0
    v_scale: float = 1.0
    shared_prefix: int = 0

    def make(self, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        batch = make_batch(self.requests, self.num_decodes, self.block_size, generator, device, self.shared_prefix)
        cache_dtype = self.cache_dtype or dtype
        num_blocks = int(batch.block_tables.max()) + 2
        shape = (num_blocks, self.block_size, self.num_kv_heads, self.head_size)
        written = _written_slots(batch, self.block_size)
        k_cache, v_cache = (_poisoned_cache(shape, written, generator).to(device, cache_dtype) for _ in range(2))
        q = torch.randn(batch.num_tokens, self.num_heads, self.head_size, generator=generator).to(device, dtype)
        scale = self.head_size**-0.5
        return Inputs(q, k_cache, v_cache, batch, scale, self.window, self.softcap, self.k_scale, self.v_scale)


def make_batch(
    requests: tuple[tuple[int, int], ...],
    num_decodes: int,
    block_size: int,
    generator: torch.Generator,
    device: str = "cpu",
    shared_prefix: int = 0,
) -> AttentionBatch:
    """Return a batch with random block ids, in which block 0 belongs to nobody.

    The decodes share the blocks of the first shared_prefix positions, a multiple of block_size.
    """
    query_lens, context_lens = [n for n, _ in requests], [c for _, c in requests]
    needed = [-(-c // block_size) for c in context_lens]
    ids = torch.randperm(sum(needed) + len(needed), generator=generator).int() + 1
    tables = torch.full((len(requests), max(needed) + 1), -1, dtype=torch.int32)
    for row, own in zip(tables, torch.split(ids[: sum(needed)], needed), strict=True):
        row[: len(own)] = own
    tables[1:num_decodes, : shared_prefix // block_size] = tables[0, : shared_prefix // block_size]
    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    contexts = torch.tensor(context_lens, dtype=torch.int32)
    return AttentionBatch(
        tables.to(device),
        starts.to(device),
        contexts.to(device),
        query_lens,
        context_lens,
        num_decodes,
        torch.tensor([shared_prefix], dtype=torch.int32).to(device) if shared_prefix else None,
        shared_prefix,
    )


def _written_slots(batch: AttentionBatch, block_size: int) -> Tensor:
    rows = []
    for table, context_len in zip(batch.block_tables.cpu().long(), batch.context_lens_host, strict=True):
        positions = torch.arange(context_len)
        rows.append(table[positions // block_size] * block_size + positions % block_size)
    return torch.cat(rows)


def _poisoned_cache(shape: tuple[int, int, int, int], written: Tensor, generator: torch.Generator) -> Tensor:
    cache = torch.full(shape, float("nan"))
    cache.flatten(0, 1)[written] = torch.randn(len(written), *shape[2:], generator=generator)
    return cache


_MIXED = ((1, 33), (1, 16), (1, 1), (1, 200), (1, 47), (5, 5), (17, 40), (1, 9), (64, 64), (3, 130))

CASES = (
    Case("one_decode_one_token", ((1, 1),), 1),
    Case("one_decode_full_block", ((1, 16),), 1),
    Case("one_decode_one_over", ((1, 17),), 1),
    Case("equal_decodes", ((1, 64),) * 5, 5),
    Case("ragged_decodes", tuple((1, c) for c in (5, 300, 16, 31, 32, 33, 1, 128, 77)), 9),
    Case("more_decodes_than_a_group", tuple((1, 1 + 7 * i) for i in range(40)), 40),
    Case("fresh_chunk", ((50, 50),), 0),
    Case("one_token_chunk", ((1, 1), (1, 20)), 0),
    Case("later_chunk", ((32, 80),), 0),
    Case("last_chunk_unaligned", ((13, 77),), 0),
    Case("mixed", _MIXED, 5),
    Case("mixed_mha", _MIXED, 5, num_heads=4, num_kv_heads=4),
    Case("mixed_mqa", _MIXED, 5, num_heads=4, num_kv_heads=1),
    Case("mixed_many_kv_heads", _MIXED, 5, num_heads=32, num_kv_heads=16),
    Case("mixed_head_80", _MIXED, 5, num_heads=4, num_kv_heads=2, head_size=80),
    Case("mixed_head_96", _MIXED, 5, num_heads=6, num_kv_heads=2, head_size=96),
    Case("mixed_head_128", _MIXED, 5, num_heads=8, num_kv_heads=2, head_size=128),
    Case("mixed_head_256", _MIXED, 5, num_heads=4, num_kv_heads=2, head_size=256),
    Case("mixed_block_8", _MIXED, 5, block_size=8),
    Case("mixed_block_128", _MIXED, 5, block_size=128),
    Case("mixed_window_1", _MIXED, 5, window=1),
    Case("mixed_window_20", _MIXED, 5, window=20),
    Case("mixed_window_beyond", _MIXED, 5, window=4096),
    Case("mixed_softcap", _MIXED, 5, softcap=2.0),
    Case("mixed_softcap_window", _MIXED, 5, window=20, softcap=2.0),
    Case("mixed_scales", _MIXED, 5, k_scale=0.7, v_scale=1.3),
    Case("mixed_float8", _MIXED, 5, cache_dtype=torch.float8_e4m3fn, k_scale=0.7, v_scale=1.3),
    Case("shared_prefix", ((1, 33), (1, 200), (1, 47), (1, 39), (5, 5)), 4, shared_prefix=32),
    Case("softcap_many_kv_heads", _MIXED, 5, num_heads=32, num_kv_heads=16, softcap=2.0),
)


def bench_loads(device: torch.device) -> Iterator[BenchLoad]:
    """Decodes against the reference; fresh prompts against PyTorch's attention on contiguous tensors.

    On a GPU short decodes are launched as the engine's CUDA graphs launch them: for contexts of up to `bound`.
    """
    model, lengths = bench_model(device), random.Random(0)
    many, varied, short, bound, long, prompts = (
        (256, (256, 1024), ((1, 512), (8, 512), (64, 512)), 2048, 8192, ((8, 2048), (1, 16384)))
        if device.type == "cuda"
        else (32, (16, 400), ((1, 128),), 0, 2048, ((1, 256),))
    )
    ragged = [lengths.randint(*varied) for _ in range(many)]
    yield _decode_load(model, device, f"{many} decodes of {varied[0]} to {varied[1]}", ragged)
    yield _decode_load(model, device, f"{many} decodes of {varied[0]} to {varied[1]}, fp8 cache", ragged, fp8=True)
    for count, length in short:
        yield _decode_load(model, device, f"{count} x {length} decode", [length] * count, bound=bound)
    for count in (1, 4):
        yield _decode_load(model, device, f"{count} x {long} decode", [long] * count)
    shared = long // 8
    yield _decode_load(model, device, f"{many} decodes, {shared} shared + 64", [shared + 64] * many, shared)
    yield _decode_load(model, device, f"{many} decodes, {shared} + 64, nothing shared", [shared + 64] * many)
    for count, length in prompts:
        yield _prompt_load(model, device, count, length)
    yield _chunk_load(model, device, "2048 of 8000", [], (2048, 8000) if device.type == "cuda" else (64, 200))
    for name, count, length, chunk in (
        ("200 x 800 decodes + 512 of 1024", 200, 800, (512, 1024)),
        ("30 x 8000 decodes + 2018 of 8000", 30, 8000, (2018, 8000)),
    ):
        if device.type == "cuda":
            yield _chunk_load(model, device, name, [length] * count, chunk)


def _decode_load(
    model: BenchModel,
    device: torch.device,
    name: str,
    contexts: list[int],
    shared: int = 0,
    bound: int = 0,
    *,
    fp8: bool = False,
) -> BenchLoad:
    def make(ops: Ops, seed: int) -> Calls:
        inputs = _bench_inputs(model, device, [(1, c) for c in contexts], len(contexts), seed, shared)
        if fp8:
            k_cache, v_cache = (cache.to(torch.float8_e4m3fn) for cache in (inputs.k_cache, inputs.v_cache))
            inputs = replace(inputs, k_cache=k_cache, v_cache=v_cache)
        launched = inputs
        if bound:
            launched = replace(inputs, batch=replace(inputs.batch, context_lens_host=[bound] * len(contexts)))
        return Calls(lambda: launched.run(ops.paged_attention), lambda: inputs.run(reference.paged_attention))

    positions = sum(contexts) - shared * (len(contexts) - 1 if shared else 0)
    cached = positions * model.kv_heads * (1 if fp8 else model.dtype.itemsize)
    moved = 2 * (cached + len(contexts) * model.heads * model.dtype.itemsize) * model.head_size
    return BenchLoad(name, make, moved, bounds=model.bounds)


def _prompt_load(model: BenchModel, device: torch.device, count: int, length: int) -> BenchLoad:
    def make(ops: Ops, seed: int) -> Calls:
        inputs = _bench_inputs(model, device, [(length, length)] * count, 0, seed)
        q, keys, values = _contiguous(inputs, count, length)

        def attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            return scaled_dot_product_attention(q, keys, values, is_causal=True, scale=inputs.scale, enable_gqa=True)

        def expected() -> Tensor:
            # In float32, a request and a head at a time: all scores at once would not fit.
            group = model.heads // model.kv_heads
            rows = [
                attend(*(x[r, h].float()[None, None] for x, h in ((q, h), (keys, h // group), (values, h // group))))
                for r in range(count)
                for h in range(model.heads)
            ]
            return torch.cat(rows).view(q.shape).transpose(1, 2).reshape(inputs.q.shape).to(model.dtype)

        return Calls(lambda: inputs.run(ops.paged_attention), expected, lambda: attend(q, keys, values))

    tokens = count * length
    moved = 2 * tokens * (model.heads + model.kv_heads) * model.head_size * model.dtype.itemsize
    flops = 2 * tokens * (length + 1) * model.heads * model.head_size
    return BenchLoad(f"{count} x {length} prefill", make, moved, flops, model.dtype, model.bounds)


def _chunk_load(
    model: BenchModel, device: torch.device, name: str, decodes: list[int], chunk: tuple[int, int]
) -> BenchLoad:
    requests = [*((1, c) for c in decodes), chunk]

    def make(ops: Ops, seed: int) -> Calls:
        inputs = _bench_inputs(model, device, requests, len(decodes), seed)
        return Calls(lambda: inputs.run(ops.paged_attention), lambda: inputs.run(reference.paged_attention))

    length, context = chunk
    cached, tokens = (sum(decodes) + context) * model.kv_heads, (len(decodes) + length) * model.heads
    moved = 2 * (cached + tokens) * model.head_size * model.dtype.itemsize
    seen = sum(decodes) + length * context - length * (length - 1) // 2
    return BenchLoad(name, make, moved, 4 * seen * model.heads * model.head_size, model.dtype, model.bounds)


def _bench_inputs(
    model: BenchModel,
    device: torch.device,
    requests: list[tuple[int, int]],
    num_decodes: int,
    seed: int,
    shared_prefix: int = 0,
) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    batch = make_batch(tuple(requests), num_decodes, 16, generator, str(device), shared_prefix)
    blocks, size, dtype = int(batch.block_tables.max()) + 1, model.head_size, model.dtype
    k_cache, v_cache = (
        randn(blocks, 16, model.kv_heads, size, device=device, seed=2 * seed + i, dtype=dtype) for i in range(2)
    )
    q = randn(batch.num_tokens, model.heads, size, device=device, seed=seed, dtype=dtype)
    return Inputs(q, k_cache, v_cache, batch, size**-0.5)


def _contiguous(inputs: Inputs, count: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return q [count, Hq, length, D] and the keys and values [count, Hkv, length, D]."""
    blocks = inputs.batch.block_tables[:, : -(-length // 16)].long()
    keys, values = (
        cache[blocks].flatten(1, 2)[:, :length].transpose(1, 2).contiguous()
        for cache in (inputs.k_cache, inputs.v_cache)
    )
    return inputs.q.view(count, length, *inputs.q.shape[1:]).transpose(1, 2).contiguous(), keys, values
