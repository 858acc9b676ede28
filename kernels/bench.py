"""Time an op on this machine's CPU: `python kernels/bench.py OP` (`--help` names the ops).

Correctness comes first: every shared case must agree with the reference, or no time is printed. Times are the median
of repeated calls, in microseconds, for SmolLM2-135M's shapes. paged_attention goes through 30 layers with a cache
each, as a step does, and prints the time of the whole step: a single cache would stay in the processor's caches.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from pagoda_kernels import Ops, for_device
from pagoda_kernels.linear import cases as linear_cases
from pagoda_kernels.linear import reference as linear_reference
from pagoda_kernels.paged_attention import AttentionBatch
from pagoda_kernels.paged_attention import cases as attention_cases
from pagoda_kernels.paged_attention import reference as attention_reference
from pagoda_kernels.rms_norm import cases as rms_norm_cases
from pagoda_kernels.rms_norm import reference as rms_norm_reference
from pagoda_kernels.rotary_kv_write import cases as rotary_cases
from pagoda_kernels.rotary_kv_write import reference as rotary_reference
from pagoda_kernels.sampling import cases as sampling_cases
from pagoda_kernels.sampling import reference as sampling_reference
from pagoda_kernels.silu_mul import cases as silu_mul_cases
from pagoda_kernels.silu_mul import reference as silu_mul_reference
from pagoda_kernels.testing import compare

Run = Callable[[], object]
Row = tuple[str, Run, Run]
"""A label, the reference, and the op under test."""

LAYERS, HEADS, KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 30, 9, 3, 64, 16
HIDDEN, INTERMEDIATE, VOCABULARY = 576, 1536, 49152
TOKENS = (1, 8, 64, 256)


def rms_norm(ops: Ops) -> Iterator[Row]:
    for case in rms_norm_cases.CASES:
        i = case.make()
        compare(ops.rms_norm(i.x, i.weight, i.eps), rms_norm_reference.rms_norm(i.x, i.weight, i.eps), 1e-5)
    for tokens in TOKENS:
        x, weight = torch.randn(tokens, HIDDEN), torch.randn(HIDDEN)
        yield (
            f"{tokens} tokens",
            partial(rms_norm_reference.rms_norm, x, weight, 1e-5),
            partial(ops.rms_norm, x, weight, 1e-5),
        )


def silu_mul(ops: Ops) -> Iterator[Row]:
    for case in silu_mul_cases.CASES:
        compare(ops.silu_mul(case.make()), silu_mul_reference.silu_mul(case.make()), 1e-5)
    for tokens in TOKENS:
        x = torch.randn(tokens, 2 * INTERMEDIATE)
        yield f"{tokens} tokens", partial(silu_mul_reference.silu_mul, x), partial(ops.silu_mul, x)


def rotary_kv_write(ops: Ops) -> Iterator[Row]:
    def run(op: Callable[..., None], i: rotary_cases.Inputs) -> rotary_cases.Inputs:
        op(i.q, i.k, i.v, i.cos, i.sin, i.positions, i.k_cache, i.v_cache, i.slots)
        return i

    reference = rotary_reference.rotary_kv_write
    for case in rotary_cases.CASES:
        actual, expected = run(ops.rotary_kv_write, case.make()), run(reference, case.make())
        compare(actual.q, expected.q, 1e-5)
        compare(actual.k_cache.nan_to_num(), expected.k_cache.nan_to_num(), 1e-5)
    for tokens in TOKENS:
        inputs = rotary_cases.Case("bench", tokens).make()
        yield f"{tokens} tokens", partial(run, reference, inputs), partial(run, ops.rotary_kv_write, inputs)


def linear(ops: Ops) -> Iterator[Row]:
    for case in linear_cases.CASES:
        i = case.make()
        actual = ops.linear(i.x, ops.pack_linear(i.weight), i.bias)
        compare(actual, linear_reference.linear(i.x, linear_reference.pack_linear(i.weight), i.bias), 1e-5)
    for rows in TOKENS:
        for outputs, inputs in (
            (960, HIDDEN),
            (2 * INTERMEDIATE, HIDDEN),
            (HIDDEN, INTERMEDIATE),
            (VOCABULARY, HIDDEN),
        ):
            x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
            plain, packed = linear_reference.pack_linear(weight), ops.pack_linear(weight)
            yield (
                f"{rows} x {inputs} -> {outputs}",
                partial(linear_reference.linear, x, plain),
                partial(ops.linear, x, packed),
            )


def sample(ops: Ops) -> Iterator[Row]:
    for case in sampling_cases.CASES:
        logits, params = case.make()
        assert torch.equal(ops.sample(logits, params), sampling_reference.sample(logits, params)), case.name
    kinds = {
        "greedy": sampling_cases.Row(0.0),
        "temperature 0.8": sampling_cases.Row(0.8),
        "top_k 50": sampling_cases.Row(top_k=50),
        "0.6, top_p 0.9": sampling_cases.Row(0.6, top_p=0.9),
        "1.5, top_p 0.95": sampling_cases.Row(1.5, top_p=0.95),
    }
    for requests in (1, 64):
        # Logits with about the spread of a language model's.
        logits = torch.randn(requests, VOCABULARY) * 3
        for name, row in kinds.items():
            params = sampling_cases.make_params([row] * requests)
            yield (
                f"{requests} rows, {name}",
                partial(sampling_reference.sample, logits, params),
                partial(ops.sample, logits, params),
            )


def paged_attention(ops: Ops) -> Iterator[Row]:
    for case in attention_cases.CASES:
        i = case.make()
        arguments = (i.q, i.k_cache, i.v_cache, i.batch, i.scale, case.sliding_window, case.softcap)
        compare(ops.paged_attention(*arguments), attention_reference.paged_attention(*arguments), 1e-5)
    lengths = random.Random(0)
    loads = {f"{n} decodes": tuple((1, lengths.randint(16, 400)) for _ in range(n)) for n in (1, 8, 32, 64)}
    loads |= {"chunk of 256": ((256, 256),), "chunk of 256 after 256": ((256, 512),)}
    loads["16 decodes, chunk of 240"] = (*loads["32 decodes"][:16], (240, 240))
    for name, requests in loads.items():
        yield _attention_step(ops, name, requests)


def _attention_step(ops: Ops, name: str, requests: tuple[tuple[int, int], ...]) -> Row:
    num_decodes = sum(n == 1 for n, _ in requests)
    batch = attention_cases.make_batch(requests, num_decodes, BLOCK_SIZE, torch.Generator().manual_seed(0))
    shape = (2, int(batch.block_tables.max()) + 1, BLOCK_SIZE, KV_HEADS, HEAD_SIZE)
    caches = [torch.randn(shape) for _ in range(LAYERS)]
    q = torch.randn(batch.num_tokens, HEADS, HEAD_SIZE)

    def step(op: Callable[..., torch.Tensor]) -> None:
        fresh = AttentionBatch(
            batch.block_tables,
            batch.query_starts,
            batch.context_lens,
            batch.query_lens_host,
            batch.context_lens_host,
            batch.num_decodes,
        )
        for k_cache, v_cache in caches:
            op(q, k_cache, v_cache, fresh, HEAD_SIZE**-0.5)

    label = f"{name} ({sum(c for _, c in requests)} positions)"
    return label, partial(step, attention_reference.paged_attention), partial(step, ops.paged_attention)


BENCHMARKS = (rms_norm, silu_mul, rotary_kv_write, linear, sample, paged_attention)


def median_us(run: Run, budget_s: float = 0.5) -> float:
    """Return the median time of a call, over as many calls as fit the budget, at least 3."""
    run()
    times: list[float] = []
    end = time.perf_counter() + budget_s
    while len(times) < 3 or (time.perf_counter() < end and len(times) < 1000):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description="Check an op against its reference, then time both.")
    parser.add_argument("op", choices=[benchmark.__name__ for benchmark in BENCHMARKS])
    name = parser.parse_args().op
    benchmark = next(benchmark for benchmark in BENCHMARKS if benchmark.__name__ == name)
    with torch.inference_mode():
        print(f"{name} on {torch.get_num_threads()} threads, median µs")
        print(f"{'':36s} {'reference':>12s} {'op':>12s} {'ratio':>7s}")
        for label, reference, op in benchmark(for_device(torch.device("cpu"))):
            slow, fast = median_us(reference), median_us(op)
            print(f"{label:36s} {slow:12.1f} {fast:12.1f} {slow / fast:7.2f}", flush=True)


if __name__ == "__main__":
    main()
