"""Thousands of drawn days of the engine: nothing leaks, nothing starves, every answer is its lone run's.

`PAGODA_SIM_SEEDS=20000` runs more of them; `PAGODA_SIM_SEED=n` replays the one that failed.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator

import pytest
from pagoda.request import MAX_PREEMPTIONS
from unit.loop import Loop
from unit.planted_faults import FAULTS, Fault
from unit.simulation import simulate

SEEDS = int(os.environ.get("PAGODA_SIM_SEEDS", "2000"))
SEEDS_PER_TEST = 250
LONG_SEEDS = range(1_000_000, 1_000_020)
MUTATION_SEEDS = 1500
CASES = ("stop", "length", "abort", "expired", "preemptions", "settled", "hits", "forks", "copies")
"""What a few hundred seeds must have met, each at least once."""

only = os.environ.get("PAGODA_SIM_SEED")
every_seed = pytest.mark.skipif(only is not None, reason="PAGODA_SIM_SEED replays one seed")


def run_seed(seed: int, *, num_requests: int = 0, fault: Fault | None = None) -> Loop:
    try:
        return simulate(seed, num_requests=num_requests, fault=fault, audit_every=1 if only else 3)
    except Exception as error:
        error.args = (f"seed {seed} (PAGODA_SIM_SEED={seed} replays it): {error!r}",)
        raise


@pytest.mark.skipif(only is None, reason="replays PAGODA_SIM_SEED")
def test_one_seed() -> None:
    seed = int(only or 0)
    run_seed(seed, num_requests=2_000 if seed in LONG_SEEDS else 0)


@every_seed
@pytest.mark.parametrize("first", range(0, SEEDS, SEEDS_PER_TEST))
def test_seeds(first: int) -> None:
    """Each request ends once, with its lone run's tokens; budget and order hold; the oldest moves; all is freed."""
    seen: Counter[str] = Counter()
    for seed in range(first, min(first + SEEDS_PER_TEST, SEEDS)):
        loop = run_seed(seed)
        seen.update(loop.ledger.reasons.values())
        seen["preemptions"] += loop.scheduler.counters.preemptions
        seen["hits"] += loop.scheduler.counters.prefix_hit_tokens
        seen["expired"] += loop.num_expired
        seen["forks"] += sum(r.fork_of is not None for r in loop.ledger.requests.values())
        seen["copies"] += loop.runner.num_copies
        seen["settled"] += sum(r.epoch == MAX_PREEMPTIONS for r in loop.ledger.requests.values())
    print(dict(seen))
    assert min(seen[what] for what in CASES) > 0, "the draw misses a case"


@every_seed
@pytest.mark.parametrize("seed", LONG_SEEDS)
def test_long_seeds(seed: int) -> None:
    """Two thousand requests: what is lost one in a thousand times shows, and nothing piles up."""
    run_seed(seed, num_requests=2_000)


@every_seed
def test_a_seed_is_the_same_every_time() -> None:
    """Without that no failure replays."""
    for seed in (3, 4):
        first, second = simulate(seed), simulate(seed)
        assert first.ledger.given == second.ledger.given
        assert first.runner.num_launches == second.runner.num_launches
        assert first.runner.slots == second.runner.slots


@every_seed
def test_a_failing_seed_names_itself_and_fails_again() -> None:
    found = []
    for _ in range(2):
        with pytest.raises(AssertionError, match="PAGODA_SIM_SEED=2 replays it") as caught:
            run_seed(2, fault=FAULTS[0])
        found.append(str(caught.value))
    assert found[0] == found[1]


def messages(fault: Fault, *, check_only: bool = False) -> Iterator[str]:
    """What the seeds that see the fault say of it."""
    for seed in range(MUTATION_SEEDS):
        try:
            with fault.patch():
                simulate(seed, fault=fault, check_only=check_only)
        except (AssertionError, KeyError, IndexError, ValueError) as error:
            yield f"{error!r} in seed {seed}"


@every_seed
@pytest.mark.parametrize("fault", FAULTS, ids=repr)
def test_the_simulation_sees(fault: Fault) -> None:
    """A check that lets a planted fault pass proves nothing."""
    assert any(messages(fault))


@every_seed
@pytest.mark.parametrize("fault", [f for f in FAULTS if f.seen_by_check], ids=repr)
def test_the_engines_own_check_sees(fault: Fault) -> None:
    """What the idle engine asks of itself must see the faults of the books, without the tests' auditor."""
    own = re.compile(r"references and \d+ owners|in the free queue|is shared or published|has another's hash")
    assert any(own.search(message) for message in messages(fault, check_only=True))
