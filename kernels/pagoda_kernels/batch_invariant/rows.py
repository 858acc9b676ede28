"""Everything but products and attention, so that a row keeps its bits.

torch gives each thread a stretch of an operation's elements wherever it ends, computes the last few of a stretch by
other instructions than the rest, and these can round differently: a sigmoid's bits depend on its place. Tiles that a
single thread computes, row after row, leave every element of a row at the same place.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..fp8_linear import Fp8Rows, PackedFp8Weight
from ..fp8_linear import cpu as fp8_linear_cpu
from ..fp8_linear.quantise import as_rows
from ..gelu_mul import reference as gelu_mul_reference
from ..int4_linear import PackedInt4Weight
from ..int4_linear import cpu as int4_linear_cpu
from ..logprobs import TopLogprobs
from ..logprobs import cpu as logprobs_cpu
from ..lora import reference as lora_reference
from ..rms_norm import reference as rms_norm_reference
from ..rotary_kv_write import reference as rotary_kv_write_reference
from ..sampling import SamplingBatch
from ..sampling import cpu as sampling_cpu
from ..silu_mul import reference as silu_mul_reference

SERIAL_ELEMENTS = 2**14
"""Operations of fewer elements stay on one thread: torch splits a gelu from here on, others from twice as many."""


def tiles(x: Tensor) -> Iterator[slice]:
    """Cut the rows of x [T, ...] into tiles of fewer than SERIAL_ELEMENTS elements, or of one row."""
    if len(x) == 0:
        return
    rows = max(1, (SERIAL_ELEMENTS - 1) // max(1, x[0].numel()))
    for start in range(0, len(x), rows):
        yield slice(start, start + rows)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See RmsNorm. The bits of x[i] normalised depend on x[i] alone."""
    out = torch.empty(x.shape, dtype=x.dtype)
    for tile in tiles(x):
        out[tile] = rms_norm_reference.rms_norm(x[tile], weight, eps)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See AddRmsNorm. A row's bits depend on that row of x and residual alone."""
    residual += x
    return rms_norm(residual, weight, eps)


def add_rms_norm_fp8(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Fp8Rows:
    """See AddRmsNormFp8. A row's bits depend on that row of x and residual alone."""
    return as_rows(add_rms_norm(x, residual, weight, eps))


def silu_mul(gate_up: Tensor) -> Tensor:
    """See SiluMul. A row's bits depend on that row alone."""
    return _gated(silu_mul_reference.silu_mul, gate_up)


def silu_mul_fp8(gate_up: Tensor) -> Fp8Rows:
    """See SiluMulFp8. A row's bits depend on that row alone."""
    return as_rows(silu_mul(gate_up))


def gelu_mul(gate_up: Tensor) -> Tensor:
    """See GeluMul. A row's bits depend on that row alone."""
    return _gated(gelu_mul_reference.gelu_mul, gate_up)


def _gated(op: Callable[[Tensor], Tensor], gate_up: Tensor) -> Tensor:
    out = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    for tile in tiles(out):
        out[tile] = op(gate_up[tile])
    return out


def rotary_kv_write(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, k_cache: Tensor, v_cache: Tensor,
    slots: Tensor, **style: Any,
) -> None:  # fmt: skip
    """See RotaryKvWrite. A token's bits, in q, k and the caches, depend on that token alone.

    The reference, whose separate products and differences are rounded one by one, wherever they stand.
    """
    for tile in tiles(q):
        rotary_kv_write_reference.rotary_kv_write(
            q[tile], k[tile], v[tile], cos, sin, positions[tile], k_cache, v_cache, slots[tile], **style
        )


def add_lora(out: Tensor, x: Tensor, a: Tensor, b: Tensor, adapters: Tensor, scales: Tensor) -> None:
    """See AddLora. Row by row: a row's bits depend on that row and its adapter alone."""
    for row in range(len(out)):
        one = slice(row, row + 1)
        lora_reference.add_lora(out[one], x[one].clone(), a, b, adapters[one], scales)


def fp8_linear(x: Tensor | Fp8Rows, packed: PackedFp8Weight, bias: Tensor | None = None) -> Tensor:
    """See Fp8Linear. Row by row: a row's bits depend on that row, the weight and the bias alone."""
    rounded = fp8_linear_cpu.rounded(x)
    product = _one_by_one(lambda row: fp8_linear_cpu.rounded_product(row, packed, bias), rounded, packed.out_features)
    return product.to(x.dtype)


def int4_linear(x: Tensor, packed: PackedInt4Weight, bias: Tensor | None = None) -> Tensor:
    """See Int4Linear. Row by row: a row's bits depend on that row, the weight and the bias alone."""
    return _one_by_one(lambda row: int4_linear_cpu.int4_linear(row, packed, bias), x, packed.out_features)


def _one_by_one(op: Callable[[Tensor], Tensor], x: Tensor, out_features: int) -> Tensor:
    """Copies of the rows: a matrix library may choose its order by where a row begins."""
    out = x.new_empty(len(x), out_features)
    for row in range(len(x)):
        out[row] = op(x[row : row + 1].clone())[0]
    return out


def top_logprobs(logits: Tensor, tokens: Tensor, k: int) -> TopLogprobs:
    """See GetTopLogprobs. Row by row: a row's bits depend on that row and its token alone, not on k."""
    rows = [logprobs_cpu.top_logprobs(logits[i : i + 1], tokens[i : i + 1], k) for i in range(len(logits))]
    if not rows:
        return logprobs_cpu.top_logprobs(logits, tokens, k)
    return TopLogprobs(
        logprob=torch.cat([row.logprob for row in rows]),
        rank=torch.cat([row.rank for row in rows]),
        top_ids=torch.cat([row.top_ids for row in rows]),
        top_logprobs=torch.cat([row.top_logprobs for row in rows]),
    )


def sample(logits: Tensor, params: SamplingBatch) -> Tensor:
    """See Sample. Row by row: a row's token depends on that row and its parameters alone, to the last bit.

    A greedy token is a matter of comparisons, so a step without others is done at once.
    """
    if params.all_greedy or len(logits) == 0:
        return sampling_cpu.sample(logits, params)
    return torch.cat([sampling_cpu.sample(logits[i : i + 1], _row(params, i)) for i in range(len(logits))])


def _row(params: SamplingBatch, i: int) -> SamplingBatch:
    one = slice(i, i + 1)
    return SamplingBatch(
        temperature=params.temperature[one],
        top_k=params.top_k[one],
        top_p=params.top_p[one],
        min_p=params.min_p[one],
        seeds=params.seeds[one],
        positions=params.positions[one],
        all_greedy=bool(params.temperature[i] == 0),
        any_top_k=bool(params.top_k[i] > 0),
        any_top_p=bool(params.top_p[i] < 1),
        any_min_p=bool(params.min_p[i] > 0),
    )
