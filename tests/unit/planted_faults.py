"""Faults of the memory, one class or patch each: what the checks must catch, or they check nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from unittest import mock

from pagoda import request as requests
from pagoda.allocation import BlockAllocator
from pagoda.block_pool import BlockPool
from pagoda.plan import Chunk, Plan
from pagoda.protocol import FinishReason
from pagoda.request import Request, Status
from pagoda.scheduler import Scheduler


class LeakOnFinish(Scheduler):
    """The last block of a request that ends is not freed."""

    def _finish(self, request: Request, reason: FinishReason) -> None:
        if request.status is Status.RUNNING:
            request.block_ids.pop()
        super()._finish(request, reason)


class OneReferenceTooMany(BlockPool):
    """Sharing a cached block counts it twice."""

    def share(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            was_free = self.num_unreferenced([block])
            super().share([block] * (1 + was_free))


class FreesWhatIsShared(BlockPool):
    """A shared block is free as soon as the first of its owners lets go."""

    def release(self, blocks: Sequence[int]) -> None:
        super().release(blocks)
        for block in blocks:
            if self._references[block] > 0:
                self._free[block] = None


class ReusesAWritableBlock(Scheduler):
    """A decode that needs a block gets the last one of its neighbour; the references are right."""

    def _make_room(self, request: Request) -> bool:
        other = next((r for r in self.running if r is not request), None)
        if other is not None and request.num_computed == len(request.block_ids) * self.block_size:
            self.pool.share(other.block_ids[-1:])
            request.block_ids.append(other.block_ids[-1])
        return super()._make_room(request)


class SharesAPartBlock(BlockAllocator):
    """A prompt's hit is taken to reach one block further, into one that its owner still writes."""

    def admit(self, request: Request, plan: Plan, *, margin: int) -> bool:
        if not super().admit(request, plan, margin=margin):
            return False
        index = request.num_computed // self.block_size
        for other in (chunk.request for chunk in plan.chunks):
            if 0 < index < len(other.block_ids) and other.block_ids[:index] == request.block_ids[:index]:
                self.pool.share(other.block_ids[index : index + 1])
                self.pool.release(request.block_ids[index : index + 1])
                request.block_ids[index] = other.block_ids[index]
                break
        return True


class PublishesTooEarly(BlockAllocator):
    """A block is published one token before it is full."""

    def publish(self, request: Request, num_computed: int) -> None:
        if num_computed < len(request.token_ids):
            super().publish(request, num_computed + 1)


class PublishesTheNextBlock(BlockAllocator):
    """A hash is given to the block after the one that it is the hash of."""

    def publish(self, request: Request, num_computed: int) -> None:
        if not self.enable_prefix_caching:
            return
        full = num_computed // self.block_size
        for index in range(request.num_published, min(full, len(request.block_ids) - 1)):
            self.pool.publish(request.block_ids[index + 1], request.block_hash(index, self.block_size))
        request.num_published = max(request.num_published, full)


class IgnoresTheSalt(BlockAllocator):
    """A prefix is looked up under the empty salt."""

    def _find_prefix(self, request: Request) -> list[int]:
        salt, request.cache_salt = request.cache_salt, ""
        request.hashes.clear()
        found = super()._find_prefix(request)
        request.cache_salt = salt
        request.hashes.clear()
        return found


def _stale_results_count() -> AbstractContextManager[object]:
    """What a step computed before a preemption is taken for what it computes now."""
    return mock.patch.object(Chunk, "is_stale", property(lambda chunk: chunk.request.status is not Status.RUNNING))


class PreemptsAfterTheGrant(Scheduler):
    """Room for a late decode is made by preempting one that is in the plan already."""

    def _preempt(self, request: Request) -> None:
        super()._preempt(self.running[0] if len(self.running) > 1 else request)


class DropsATokenOnPreemption(Scheduler):
    """A preempted request loses a token that it had given out."""

    def _preempt(self, request: Request) -> None:
        super()._preempt(request)
        if request.num_output_tokens:
            request.token_ids.pop()


class ForgetsTheBudget(Scheduler):
    """Waiting requests get a budget of their own."""

    def _admit(self, plan: object, budget: int) -> None:
        super()._admit(plan, budget + 1)  # type: ignore[arg-type]


class NewestFirst(Scheduler):
    """The queue serves the newest first, so that the oldest starves."""

    def _enter(self, request: Request, now: float) -> None:
        super()._enter(request, now)
        request.rank = (-request.rank[0], -request.rank[1])


class IgnoresPriority(Scheduler):
    """Every request ranks by its arrival alone."""

    def _enter(self, request: Request, now: float) -> None:
        priority, request.priority = request.priority, 0
        super()._enter(request, now)
        request.priority = priority


class ForksWithoutACopy(BlockAllocator):
    """A fork writes its own tokens into the block that its leader's prompt ends in."""

    def admit(self, request: Request, plan: Plan, *, margin: int) -> bool:
        if not super().admit(request, plan, margin=margin):
            return False
        for source, target in plan.copies:
            if target in request.block_ids:
                self.pool.share([source])
                self.pool.release([target])
                request.block_ids[request.block_ids.index(target)] = source
        plan.copies.clear()
        return True


class CopiesTheWrongBlock(BlockAllocator):
    """A fork gets the block before the one that its prompt ends in."""

    def admit(self, request: Request, plan: Plan, *, margin: int) -> bool:
        taken = super().admit(request, plan, margin=margin)
        plan.copies = [(max(0, source - 1), target) for source, target in plan.copies]
        return taken


class ReleasesForksTooEarly(Scheduler):
    """Forks are let go when they come, not when their leader's prompt has been computed."""

    def add(self, request: Request) -> None:
        super().add(request)
        self._release_forks(request)


class SharesAnUncomputedPrompt(BlockAllocator):
    """A fork takes its leader's prompt for computed as soon as the leader runs."""

    def _find_known(self, request: Request, plan: Plan) -> tuple[list[int], int]:
        leader = request.fork_of
        if leader is not None and leader.status is Status.RUNNING:
            shared = request.num_prompt_tokens - 1
            return leader.block_ids[: self.num_blocks(shared)], shared
        return super()._find_known(request, plan)


class LosesAnOrphan(Scheduler):
    """Forks whose leader ends before its prompt is computed are never let go."""

    def _bequeath(self, leader: Request) -> None:
        pass


def _nobody_settles() -> AbstractContextManager[object]:
    """A request may be preempted as often as it happens."""
    return mock.patch.object(requests, "MAX_PREEMPTIONS", 99)


class RunsAheadOfItsTokens(Scheduler):
    """A request whose next token depends on the last one runs before that one is known."""

    def _can_decode(self, request: Request) -> bool:
        return request.num_output_tokens + request.num_pending < request.max_tokens


class ForgetsWhatWaits(Scheduler):
    """An aborted request still counts among those that wait."""

    def _finish(self, request: Request, reason: FinishReason) -> None:
        waited = request.status is Status.WAITING
        super()._finish(request, reason)
        if waited:
            self.waiting.num_tokens += 1


@dataclass(frozen=True)
class Fault:
    name: str
    pool: type[BlockPool] = BlockPool
    allocator: type[BlockAllocator] = BlockAllocator
    scheduler: type[Scheduler] = Scheduler
    patch: Callable[[], AbstractContextManager[object]] = nullcontext
    seen_by_check: bool = False
    """True when the engine's own idle check must see it as well."""

    def __repr__(self) -> str:
        return self.name


def _faults() -> Iterator[Fault]:
    yield Fault("one block not freed on finish", scheduler=LeakOnFinish, seen_by_check=True)
    yield Fault("one reference too many", pool=OneReferenceTooMany, seen_by_check=True)
    yield Fault("shared block freed with its first owner", pool=FreesWhatIsShared, seen_by_check=True)
    yield Fault("writable block reused", scheduler=ReusesAWritableBlock, seen_by_check=True)
    yield Fault("partly filled block shared", allocator=SharesAPartBlock, seen_by_check=True)
    yield Fault("published a token early", allocator=PublishesTooEarly, seen_by_check=True)
    yield Fault("published under the next hash", allocator=PublishesTheNextBlock, seen_by_check=True)
    yield Fault("salt ignored", allocator=IgnoresTheSalt, seen_by_check=True)
    yield Fault("stale result applied after preemption", patch=_stale_results_count)
    yield Fault("preempted after its grant", scheduler=PreemptsAfterTheGrant)
    yield Fault("token lost on preemption", scheduler=DropsATokenOnPreemption)
    yield Fault("budget exceeded", scheduler=ForgetsTheBudget)
    yield Fault("newest first", scheduler=NewestFirst)
    yield Fault("priority ignored", scheduler=IgnoresPriority)
    yield Fault("fork without a copy", allocator=ForksWithoutACopy, seen_by_check=True)
    yield Fault("fork copies the wrong block", allocator=CopiesTheWrongBlock)
    yield Fault(
        "fork before the prompt is computed", allocator=SharesAnUncomputedPrompt, scheduler=ReleasesForksTooEarly
    )
    yield Fault("fork without its leader lost", scheduler=LosesAnOrphan)
    yield Fault("preempted without end", patch=_nobody_settles)
    yield Fault("ahead of a token that must be known", scheduler=RunsAheadOfItsTokens)
    yield Fault("queue counts who has left", scheduler=ForgetsWhatWaits)


FAULTS = list(_faults())
