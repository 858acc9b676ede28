"""The ops of the engine: for each a contract, a reference in plain torch, and what is faster on a device.

    ops = pagoda_kernels.for_device(torch.device("cpu"))
    with torch.inference_mode():
        hidden = ops.rms_norm(x, weight, eps=1e-5)

The ops are for inference: none keeps what a gradient would need.
"""

from .compile_ahead import compiling_ahead
from .dispatch import MissingKernel, Ops, for_device
from .linear import PackedWeight
from .logits_edit import AllowedTokens, Bias, LogitsEdits, Penalties
from .logprobs import TopLogprobs
from .paged_attention import AttentionBatch
from .sampling import SamplingBatch, uniforms

__all__ = [
    "AllowedTokens",
    "AttentionBatch",
    "Bias",
    "LogitsEdits",
    "MissingKernel",
    "Ops",
    "PackedWeight",
    "Penalties",
    "SamplingBatch",
    "TopLogprobs",
    "compiling_ahead",
    "for_device",
    "uniforms",
]
