"""The state machine over block pool and scheduler: it finds nothing wrong, and each fault that is planted."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from unit.memory_machine import MemoryMachine
from unit.planted_faults import FAULTS, Fault

MACHINE = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def test_state_machine() -> None:
    """Any order of add, launch, read back and abort leaves the memory whole and every answer as its lone run's."""
    run_state_machine_as_test(MemoryMachine, settings=MACHINE)


@pytest.mark.parametrize("fault", FAULTS, ids=repr)
def test_the_state_machine_sees(fault: Fault) -> None:
    """A check that lets a planted fault pass proves nothing. It ends at the first example that shows the fault; what is
    drawn varies with the modules imported beside this one, so the rare one gets many."""

    class Faulty(MemoryMachine):
        pool_class = fault.pool
        allocator_class = fault.allocator
        scheduler_class = fault.scheduler

    with fault.patch(), pytest.raises((AssertionError, IndexError, ValueError, KeyError)):
        run_state_machine_as_test(Faulty, settings=settings(MACHINE, phases=[Phase.generate], max_examples=4000))
