"""What attention must know of a step: which tokens belong to which request, and where their keys and values lie."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

Prepared = TypeVar("Prepared")


@dataclass(frozen=True, eq=False)
class AttentionBatch:
    """The R requests of a step, decodes first. Made once a step, read by every layer, never changed.

    An op may read these tensors, and the cache's entries of earlier steps, while the kernel just ahead of it is still
    running (early_launch.py): they must have been written before some kernel ahead that was launched the ordinary way,
    as the model's embedding is.

    To capture a step in a CUDA graph, make the batch with as many requests as the graph is to serve, the largest
    context length in context_lens_host, and any query lengths for the chunks. What is on the device then says what
    there is: a decode of context 0 is none, so that its row may be a chunk's, and a chunk may have no tokens.

    Raises ValueError if the host lists contradict each other.
    """

    block_tables: Tensor
    """[R, max_blocks] int32 block ids in the order of positions; rows padded with -1."""
    query_starts: Tensor
    """[R + 1] int32 on the device: request r owns the query tokens query_starts[r] to query_starts[r + 1]."""
    context_lens: Tensor
    """[R] int32 on the device: tokens in the cache, those of this step included."""
    query_lens_host: list[int]
    """Query tokens of each request in this step, at least 1."""
    context_lens_host: list[int]
    """context_lens on the host."""
    num_decodes: int
    """The first num_decodes requests have query length 1; the others are prefill chunks of any length."""
    shared_prefix: Tensor | None = None
    """[1] int32 on the device: so many leading positions of all decodes lie in the same blocks, fewer than any of them
    has. Results are the same without it; with it, an op may read the prefix once for all."""
    shared_prefix_host: int = 0
    """shared_prefix on the host, or an upper bound; 0 if there is none."""

    _prepared: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.query_lens_host) != len(self.context_lens_host):
            raise ValueError(f"{len(self.query_lens_host)} query lengths, but {len(self.context_lens_host)} contexts")
        if any(not 1 <= n <= c for n, c in zip(self.query_lens_host, self.context_lens_host, strict=True)):
            raise ValueError(
                f"each query length must be at least 1 and at most its context length, "
                f"got {self.query_lens_host} and {self.context_lens_host}"
            )
        if (self.shared_prefix is None) != (self.shared_prefix_host == 0):
            raise ValueError(
                f"shared_prefix and shared_prefix_host go together: give both or neither, got {self.shared_prefix} and "
                f"{self.shared_prefix_host}"
            )
        if self.shared_prefix_host >= min(self.context_lens_host[: self.num_decodes], default=1):
            raise ValueError(
                f"shared_prefix_host {self.shared_prefix_host} must be below the context length of every decode, got "
                f"{self.context_lens_host[: self.num_decodes]}"
            )
        if any(n != 1 for n in self.query_lens_host[: self.num_decodes]):
            raise ValueError(f"the first {self.num_decodes} requests must be decodes, got {self.query_lens_host}")

    @property
    def num_requests(self) -> int:
        return len(self.query_lens_host)

    @property
    def num_tokens(self) -> int:
        return sum(self.query_lens_host)

    def prepare(self, make: "Callable[..., Prepared]", *arguments: Hashable) -> Prepared:
        """Return make(self, *arguments), made once per step: what depends on the batch but not on the layer."""
        key = (make, *arguments)
        if key not in self._prepared:
            self._prepared[key] = make(self, *arguments)
        prepared: Prepared = self._prepared[key]
        return prepared
