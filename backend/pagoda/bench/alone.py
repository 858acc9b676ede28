"""The engine without a server: its own loop, in this thread, over a list of requests."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from pagoda import hf_config
from pagoda.allocation import BlockAllocator
from pagoda.bench.loads import Load
from pagoda.block_pool import BlockPool
from pagoda.config import EngineConfig
from pagoda.engine import Engine, Event, Refusal, StepResult, Stop, Submit
from pagoda.plan import Collected, Plan
from pagoda.process import resolve_max_model_len
from pagoda.request import Request
from pagoda.runner import Launched, Runner
from pagoda.sampling_params import SamplingParams
from pagoda.scheduler import Scheduler


@dataclass
class Run:
    """What a list of requests took."""

    seconds: float = 0.0
    plans: list[Plan] = field(default_factory=list)
    preemptions: int = 0


class Alone:
    def __init__(self, config: EngineConfig, folder: Path, runner: type[Runner] = Runner) -> None:
        self.config = config
        self.model = hf_config.load(folder)
        self.max_model_len = resolve_max_model_len(config, self.model.max_position_embeddings)
        began = time.monotonic()
        self.runner = runner(config, self.model, folder, self.max_model_len)
        self.start_seconds = time.monotonic() - began
        """Until the first request could be served."""
        while self.runner.use_idle_moment():
            pass

    def scheduler(self, loads: list[Load]) -> Scheduler:
        """Over an empty cache, with room for all the requests in its queue."""
        return Scheduler(
            BlockAllocator(
                BlockPool(self.runner.num_blocks),
                block_size=self.config.block_size,
                enable_prefix_caching=self.config.enable_prefix_caching,
            ),
            max_num_seqs=self.config.max_num_seqs,
            max_num_batched_tokens=self.runner.max_num_batched_tokens,
            max_num_mixed_tokens=self.runner.max_num_mixed_tokens,
            max_num_queued_requests=len(loads),
            max_num_queued_tokens=sum(len(load.prompt_ids) for load in loads),
        )

    def run(self, loads: list[Load]) -> Run:
        """All requests at once, greedy, end-of-text ignored. Raises RuntimeError when one is refused."""
        run, scheduler, left = Run(), self.scheduler(loads), len(loads)

        def emit(event: Event) -> None:
            nonlocal left
            if isinstance(event, Refusal):
                raise RuntimeError(f"request {event.key} was refused: {event.error.message}")
            if isinstance(event, StepResult):
                left -= sum(output.finish_reason is not None for _, output in event.outputs)
                if left == 0:
                    engine.inbox.put(Stop())

        engine = Engine(scheduler, _Recorder(self.runner, run.plans), emit)
        for request in requests(loads):
            engine.inbox.put(Submit(request))
        began = time.monotonic()
        engine.run()
        run.seconds = time.monotonic() - began
        run.preemptions = scheduler.counters.preemptions
        return run


class _Recorder:
    """A runner that keeps the plans."""

    def __init__(self, runner: Runner, plans: list[Plan]) -> None:
        self._runner = runner
        self._plans = plans
        self.steps_ahead = runner.steps_ahead

    def launch(self, plan: Plan) -> Launched:
        self._plans.append(plan)
        return self._runner.launch(plan)

    def collect(self, launched: Launched) -> Collected:
        return self._runner.collect(launched)

    def use_idle_moment(self) -> bool:
        return self._runner.use_idle_moment()


def requests(loads: list[Load], session: str = "bench") -> list[Request]:
    params = SamplingParams(temperature=0, ignore_eos=True)
    return [
        Request((session, i), load.prompt_ids, params, load.num_output, frozenset(), 0) for i, load in enumerate(loads)
    ]
