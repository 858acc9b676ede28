"""Which blocks a request holds: those of all its known tokens, shared ones where their content is known already.

A block is known by the hash of its tokens and of all before them, or as part of a prompt that a fork has in common with
its leader. Pure Python, no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pagoda.block_pool import BlockPool
from pagoda.errors import InvalidRequest
from pagoda.plan import Plan
from pagoda.request import Request, Status


class BlockAllocator:
    def __init__(self, pool: BlockPool, *, block_size: int, enable_prefix_caching: bool) -> None:
        self.pool = pool
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching

    def num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def check_fits(self, request: Request) -> None:
        """Raises InvalidRequest that says by how much the whole pool is too small for the request alone."""
        most = self.pool.num_blocks * self.block_size
        if request.length_limit > most:
            raise InvalidRequest(
                f"prompt ({request.num_prompt_tokens} tokens) and max_tokens ({request.max_tokens}) together pass the "
                f"KV cache's {most} tokens by {request.length_limit - most}: shorten the prompt or lower max_tokens",
                field="max_tokens",
            )

    def admit(self, request: Request, plan: Plan, *, margin: int) -> bool:
        """Give a waiting request its blocks if `margin` more stay free; `num_computed` tells what is spared.

        A settled request gets all that it may ever need.
        """
        known, num_known = self._find_known(request, plan)
        full = num_known // self.block_size
        shared, partly_filled = known[:full], known[full:]
        most = request.length_limit if request.is_settled else request.num_tokens
        wanted = self.num_blocks(most) - full
        if wanted + self.pool.num_unreferenced(shared) + margin > self.pool.num_free:
            return False
        self.pool.share(shared)
        request.block_ids = shared + self.pool.take(wanted)
        request.num_computed = num_known
        request.num_published = full
        plan.copies += [(block, request.block_ids[full]) for block in partly_filled]
        return True

    def _find_known(self, request: Request, plan: Plan) -> tuple[list[int], int]:
        """Blocks with the request's first tokens, and how many tokens; the last block may be filled in part.

        The last token of a prompt is always computed: its logits are needed.
        """
        cached = self._find_prefix(request)
        leader = request.fork_of
        if leader is not None and leader.status is Status.RUNNING:
            shared = request.num_prompt_tokens - 1
            if leader.num_computed >= shared > len(cached) * self.block_size and self._can_copy(leader, shared, plan):
                return leader.block_ids[: self.num_blocks(shared)], shared
        return cached, len(cached) * self.block_size

    def reads_cache(self, request: Request) -> bool:
        """Whether the prefix cache is looked into for the request."""
        return self.enable_prefix_caching and not request.needs_prompt_logprobs

    def _find_prefix(self, request: Request) -> list[int]:
        if not self.reads_cache(request):
            return []
        usable = (request.num_tokens - 1) // self.block_size
        return self.pool.find(request.block_hash(i, self.block_size) for i in range(usable))

    def _can_copy(self, leader: Request, end: int, plan: Plan) -> bool:
        """Whether the block that token `end` falls into is filled up to there before the step writes anything."""
        index = end // self.block_size
        source = leader.block_ids[index : index + 1]
        return all(c.start >= end for c in plan.chunks if c.request.block_ids[index : index + 1] == source)

    def lacks_room(self, request: Request) -> bool:
        """Whether the request's next token needs another block."""
        return request.num_computed == len(request.block_ids) * self.block_size

    def grow(self, request: Request) -> None:
        """One block more. Raises ValueError when none is free."""
        request.block_ids += self.pool.take(1)

    def publish(self, request: Request, num_computed: int) -> None:
        """Let others share the full blocks of the request's first tokens."""
        full = num_computed // self.block_size
        if full > request.num_published and self.enable_prefix_caching:
            for index in range(request.num_published, full):
                self.pool.publish(request.block_ids[index], request.block_hash(index, self.block_size))
            request.num_published = full

    def release(self, request: Request) -> None:
        self.pool.release(request.block_ids)
        request.block_ids = []

    def num_wasted_slots(self, running: Iterable[Request]) -> int:
        """Slots of the cache, in tokens, that requests have reserved and have no token for."""
        return sum(max(0, len(r.block_ids) * self.block_size - r.num_tokens) for r in running)

    def check(self, running: Sequence[Request]) -> None:
        """Prove the memory's invariants. Raises AssertionError."""
        self.pool.check(request.block_ids for request in running)
        for request in running:
            self._check_blocks(request)

    def _check_blocks(self, request: Request) -> None:
        if len(request.block_ids) * self.block_size < request.num_computed:
            raise AssertionError(f"request {request.key!r} computed {request.num_computed} tokens beyond its blocks")
        for block in request.block_ids[request.num_computed // self.block_size :]:
            if not self.pool.is_private(block):
                raise AssertionError(f"block {block}, which request {request.key!r} writes to, is shared or published")
        for index in range(request.num_published):
            if self.pool.name_of(request.block_ids[index]) not in (None, request.block_hash(index, self.block_size)):
                raise AssertionError(f"block {request.block_ids[index]} of request {request.key!r} has another's hash")
