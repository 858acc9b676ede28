"""The specification of add_lora, in plain torch: also what a CPU runs, adapter by adapter."""

from torch import Tensor


def add_lora(out: Tensor, x: Tensor, a: Tensor, b: Tensor, adapters: Tensor, scales: Tensor) -> None:
    """See AddLora. Reads the adapters on the host."""
    for adapter in sorted(set(adapters.tolist())):
        if adapter >= 0:
            rows = (adapters == adapter).nonzero().squeeze(1)
            delta = (x[rows].float() @ a[adapter].float().T) @ b[adapter].float().T
            out[rows] = (out[rows].float() + scales[adapter] * delta).to(out.dtype)
