"""One request as the scheduler sees it: its tokens, its blocks and how far it has come."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, Protocol

from pagoda.block_pool import chain_hash, root_hash
from pagoda.protocol import FinishReason, TokenLogprob
from pagoda.sampling_params import SamplingParams

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


MAX_PREEMPTIONS = 3
"""Of one request; then it is settled."""


class Matcher(Protocol):
    """Follows one request's output through its grammar."""

    def fill(self, row: NDArray[np.int32]) -> None:
        """Write the tokens allowed next: bit j of word i is token 32 i + j. Raises PagodaError when it cannot go on."""
        ...

    @property
    def is_finished(self) -> bool:
        """True when the output satisfies the grammar and nothing but its end may follow."""
        ...

    def accept(self, token_id: int) -> bool:
        """Take in the token that came; False when it was not allowed. Raises PagodaError when it cannot go on."""
        ...


class Status(Enum):
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(eq=False, slots=True)
class Request:
    key: Hashable
    """Names the request to whoever asked for it."""
    prompt_ids: list[int]
    params: SamplingParams
    max_tokens: int
    """Output tokens at most; resolved at admission, so prompt and output always fit the context."""
    stop_ids: frozenset[int]
    seed: int
    """64 random bits of its own, or the seed asked for."""
    cache_salt: str = ""
    priority: int = 0
    """Lower runs first."""
    timeout: float | None = None
    """Seconds from its arrival after which it ends unfinished."""
    forks: list[Request] = field(default_factory=list)
    """Requests for other answers to the same prompt: they wait until it has been computed, then share its blocks."""
    fork_of: Request | None = None
    arrival_time: float = 0.0
    rank: tuple[float, int] = (0.0, 0)
    """Its place among all requests, lowest first; kept over preemptions."""

    status: Status = Status.WAITING
    token_ids: list[int] = field(default_factory=list)
    """Prompt, then output, as far as known on the host."""
    num_computed: int = 0
    """Tokens whose keys and values are in the cache once every launched step has run."""
    num_pending: int = 0
    """Tokens sampled by launched steps and not read back yet."""
    num_cached: int = 0
    """Prompt tokens that the prefix cache spared at the first admission."""
    epoch: int = 0
    """Number of preemptions; results of steps launched before the last one are dropped."""
    block_ids: list[int] = field(default_factory=list)
    num_published: int = 0
    """Leading blocks whose content the pool knows by hash."""
    hashes: list[bytes] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    matcher: Matcher | None = None
    """Of a request with a grammar."""

    depends_on_output: bool = field(init=False)
    """`params.depends_on_output`, worked out once: it is asked for at each step."""
    length_limit: int = field(init=False)
    """Tokens of prompt and output at most."""

    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float = 0.0

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_ids)
        self.depends_on_output = self.params.depends_on_output
        self.length_limit = len(self.prompt_ids) + self.max_tokens

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.prompt_ids)

    @property
    def num_tokens(self) -> int:
        """Known and pending tokens."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_uncomputed(self) -> int:
        return self.num_tokens - self.num_computed

    @property
    def needs_prompt_logprobs(self) -> bool:
        """True while rows of the prompt must run for their logits, cached or not."""
        return self.params.prompt_logprobs is not None and len(self.prompt_logprobs) < self.num_prompt_tokens - 1

    @property
    def is_settled(self) -> bool:
        """Preempted as often as may be: from then on it gets all the blocks it may ever need, and keeps them."""
        return self.epoch >= MAX_PREEMPTIONS

    @property
    def is_decoding(self) -> bool:
        return len(self.token_ids) + self.num_pending == self.num_computed + 1 > 1

    def block_hash(self, index: int, block_size: int) -> bytes:
        """Chain hash of full block `index`, computed once and kept: tokens once known never change."""
        while len(self.hashes) <= index:
            start = len(self.hashes) * block_size
            parent = self.hashes[-1] if self.hashes else root_hash(self.cache_salt)
            self.hashes.append(chain_hash(parent, self.token_ids[start : start + block_size]))
        return self.hashes[index]
