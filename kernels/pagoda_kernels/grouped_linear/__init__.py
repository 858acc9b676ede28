"""grouped_linear: the matrix products of a mixture of experts, each with its own rows."""

from typing import Protocol

from torch import Tensor


class GroupedLinear(Protocol):
    def __call__(self, x: Tensor, weight: Tensor, expert_starts: Tensor) -> Tensor:
        """Return x @ weight[e].T for the rows of each expert e, [M, N], contiguous and in x.dtype.

        x: [M, K], rows contiguous and sorted by expert. weight: [E, N, K], contiguous.
        expert_starts: [E + 1] int32 on the device: expert e has the rows expert_starts[e] to expert_starts[e + 1]
        (excluded; it may have none). The first is 0, the last at most M: rows from there on are unspecified (padding).
        """
