"""Ops of the CPU whose result for a row has the same bits whatever other rows the step holds.

A sum of floats depends on its order, and libraries choose the order by the shape of the whole operation. So here every
row is computed in shapes that depend on the row alone: its bits are the same on one machine with one number of threads.

- products, for plain weights and experts: in tiles of few row counts, each proved to give a row the same bits;
- attention: in tiles of neighbouring positions over a rounded context;
- norms, activations, rotation: in tiles that one thread computes, row after row;
- draws, log-probabilities, adapters, weights of 8 and 4 bits: row by row.

Looking up embeddings and editing logits treat every element for itself and round each operation correctly: the plain
ops keep the promise.
"""

from .attention import paged_attention
from .products import Products
from .rows import (
    add_lora,
    add_rms_norm,
    add_rms_norm_fp8,
    fp8_linear,
    gelu_mul,
    int4_linear,
    rms_norm,
    rotary_kv_write,
    sample,
    silu_mul,
    silu_mul_fp8,
    top_logprobs,
)

__all__ = [
    "Products",
    "add_lora",
    "add_rms_norm",
    "add_rms_norm_fp8",
    "fp8_linear",
    "gelu_mul",
    "int4_linear",
    "paged_attention",
    "rms_norm",
    "rotary_kv_write",
    "sample",
    "silu_mul",
    "silu_mul_fp8",
    "top_logprobs",
]
