"""The runner's steps without a GPU: a step ahead, graphs' padded inputs, rows, and what the memory holds."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
from pagoda import cuda_graph, hf_config, memory, trials
from pagoda.allocation import BlockAllocator
from pagoda.batch import Layout
from pagoda.block_pool import BlockPool
from pagoda.config import EngineConfig, from_parameters
from pagoda.errors import ConfigError
from pagoda.graph_shapes import Shape, Shapes
from pagoda.request import Request
from pagoda.runner import Launched, Runner, resolve_budgets
from pagoda.sampling_params import SamplingParams
from pagoda.scheduler import Scheduler
from pagoda.transfer import Download, upload

MAX_LEN = 256
BLOCK = 8
CPU = torch.device("cpu")
DRAWN = (
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.8, top_k=20),
    SamplingParams(temperature=1.0, top_p=0.9),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config.json alone: the weights are made up."""
    path = tmp_path_factory.mktemp("shape")
    config = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 500, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
        "max_position_embeddings": MAX_LEN,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    return path


def make_runner(folder: Path, kind: type[Runner] = Runner, **settings: object) -> Runner:
    given = {"device": "cpu", "load_format": "dummy", "num_kv_blocks": 400, "block_size": BLOCK, "max_num_seqs": 12}
    config = EngineConfig(model=str(folder), **{**given, **settings})  # type: ignore[arg-type]
    return kind(config, hf_config.load(folder), folder, MAX_LEN)


class Ahead(Runner):
    """A step ahead, as on a GPU."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.steps_ahead = 1


class Padded(Ahead):
    """Runs each step that has a shape in a graph's inputs, padded."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        self.ran: set[Shape] = set()
        self.known = Shapes(12, MAX_LEN, 256)

    def _compute(self, layout: Layout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        decodes, count = layout.num_decodes, len(layout.token_ids)
        chunks = len(layout.rows) - decodes
        shape = self.known.find(
            decodes=decodes,
            chunks=chunks,
            tokens=count - decodes,
            longest=layout.longest,
            shares_prefix=layout.shared_prefix > 0,
        )
        if shape is None or (shape.tokens and layout.scores_prompts):
            return super()._compute(layout)
        self.ran.add(shape)
        array = torch.from_numpy(cuda_graph.pack(layout, shape, self.rows.spare))
        inputs = cuda_graph.views(array, shape)
        batch = cuda_graph.batch_maker(inputs, shape, self.rows, self.block_size)()
        real = shape.decodes + chunks
        # The CPU reads the host's lengths, which a graph's kernels take as bounds.
        batch.attention.query_lens_host[:] = batch.attention.query_starts.diff().tolist()[:real]
        batch.attention.context_lens_host[:] = batch.attention.context_lens.tolist()[:real]
        hidden = self._forward(batch)
        assert len(hidden) == shape.requests
        samples = len(layout.sampled)
        return hidden[: samples if chunks else count], inputs.sample_rows[:samples], inputs.sampled[:samples]


def generate(
    runner: Runner, *, output: int = 30, count: int = 20, budget: int = 60
) -> tuple[Scheduler, list[list[int]]]:
    """Serve prompts of one token to several chunks, three new ones before each step."""
    scheduler = Scheduler(
        BlockAllocator(BlockPool(runner.num_blocks), block_size=BLOCK, enable_prefix_caching=True),
        max_num_seqs=12,
        max_num_batched_tokens=budget,
        max_num_queued_requests=100,
        max_num_queued_tokens=10_000,
    )
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 500, (1 + 7 * i,), generator=draw).tolist() for i in range(count)]
    requests = [Request(i, ids, DRAWN[i % 3], output + i % 5, frozenset(), 1000 + i) for i, ids in enumerate(prompts)]
    left, in_flight = deque(requests), deque[Launched]()
    while left or scheduler.requests or in_flight:
        for _ in range(min(3, len(left))):
            scheduler.add(left.popleft())
        plan = scheduler.schedule()
        if plan:
            in_flight.append(runner.launch(plan))
        if in_flight and (not plan or len(in_flight) > runner.steps_ahead):
            launched = in_flight.popleft()
            collected = runner.collect(launched)
            scheduler.update(launched.plan, collected.token_ids, collected.logprobs)
            scheduler.check()
    return scheduler, [request.token_ids[request.num_prompt_tokens :] for request in requests]


@pytest.fixture(scope="module")
def reference(folder: Path) -> list[list[int]]:
    return generate(make_runner(folder))[1]


def test_made_up_weights_are_the_same_each_time_and_say_something(folder: Path, reference: list[list[int]]) -> None:
    assert generate(make_runner(folder))[1] == reference
    assert len({tuple(answer) for answer in reference}) > 15


def test_a_step_ahead_changes_no_token(folder: Path, reference: list[list[int]]) -> None:
    assert generate(make_runner(folder, Ahead))[1] == reference


def test_preemption_a_step_ahead_changes_no_token(folder: Path) -> None:
    _, expected = generate(make_runner(folder), output=90, count=10)
    scheduler, answers = generate(make_runner(folder, Ahead, num_kv_blocks=40), output=90, count=10)
    assert scheduler.counters.preemptions > 3
    assert answers == expected


def test_padded_inputs_of_graphs_change_no_token(folder: Path, reference: list[list[int]]) -> None:
    runner = make_runner(folder, Padded)
    assert generate(runner)[1] == reference
    assert isinstance(runner, Padded)
    assert {shape.tokens > 0 for shape in runner.ran} == {False, True}
    assert {shape.decodes for shape in runner.ran} >= {1, 2, 4, 8, 12}


# ── shapes ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("max_num_seqs", "max_model_len"), [(1, 128), (12, 256), (256, 8192), (1000, 131072)])
def test_every_decode_step_has_a_graph(max_num_seqs: int, max_model_len: int) -> None:
    shapes = Shapes(max_num_seqs, max_model_len, max(256, max_num_seqs))
    known = set(shapes.all())
    assert len(known) == len(shapes.all()) <= 160
    for decodes in range(1, max_num_seqs + 1):
        for longest in (1, 2048, max_model_len):
            if longest <= max_model_len:
                for shared in {False, decodes >= 32}:
                    shape = shapes.find(decodes=decodes, chunks=0, tokens=0, longest=longest, shares_prefix=shared)
                    assert shape in known
                    assert shape.decodes >= decodes
                    assert shape.bound >= longest
                    assert shape.shares_prefix == shared


def test_a_step_with_more_of_something_than_any_graph_has_none() -> None:
    shapes = Shapes(64, 8192, 4096)
    fits = {"decodes": 64, "chunks": 16, "tokens": 1024, "longest": 8192, "shares_prefix": True}
    assert shapes.find(**fits) == Shape(64, 1024, 8192)  # type: ignore[arg-type]
    for more in ({"decodes": 65}, {"chunks": 17}, {"tokens": 1025}, {"longest": 8193}):
        assert shapes.find(**{**fits, **more}) is None  # type: ignore[arg-type]


# ── transfers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_uploaded_arrays_come_back() -> None:
    arrays = [np.arange(3), np.ones((2, 2), np.float32), np.zeros(0, np.int32)]
    arrived = Download(upload(arrays, CPU)).wait()
    assert [a.dtype for a in arrived] == [torch.int64, torch.float32, torch.int32]
    for array, tensor in zip(arrays, arrived, strict=True):
        assert tensor.tolist() == array.tolist()


# ── sizes ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_cpu_has_two_gib_of_cache_unless_told_otherwise() -> None:
    block = 1 << 20
    assert memory.asked_for(EngineConfig(model="m"), block, CPU) == 2048
    assert memory.asked_for(EngineConfig(model="m", kv_cache_gib=0.5), block, CPU) == 512
    assert memory.asked_for(EngineConfig(model="m", num_kv_blocks=7, kv_cache_gib=0.5), block, CPU) == 7
    assert memory.asked_for(EngineConfig(model="m"), block, torch.device("cuda")) is None


def test_a_cache_below_one_request_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds 31 blocks .* needs 32: lower max_model_len to 248"):
        make_runner(folder, num_kv_blocks=31)


def test_the_largest_steps_run_in_one_block(folder: Path) -> None:
    runner = make_runner(folder)
    for plan in trials.largest_steps(12, 100, 64, BLOCK):
        assert plan.num_tokens in (96, 64)
        assert len(runner.collect(runner.launch(plan)).token_ids) == len(plan.chunks)
    generate(runner, count=3, output=2)


def test_streams_beside_a_prompt_can_be_tried(folder: Path) -> None:
    runner = make_runner(folder)
    for plan in trials.mixed_steps(12, 100, 64, BLOCK):
        assert plan.num_decodes == len(plan.chunks) - 1
        assert plan.num_tokens <= 100
        assert len(runner.collect(runner.launch(plan)).token_ids) == len(plan.chunks)
    generate(runner, count=3, output=2)
    assert not list(trials.mixed_steps(1, 100, 64, BLOCK))


def test_a_budget_below_the_number_of_requests_is_refused() -> None:
    for name in ("max_num_batched_tokens", "max_num_mixed_tokens"):
        config = from_parameters({"model": "m", name: 10, "max_num_seqs": 11})
        with pytest.raises(ConfigError, match=f"{name} 10 is below max_num_seqs 11"):
            resolve_budgets(config, "cpu")


@pytest.mark.parametrize(
    ("given", "cpu", "cuda"),
    [
        ({}, (256, 256), (8192, 2048)),
        ({"max_num_batched_tokens": 1024}, (1024, 256), (1024, 1024)),
        ({"max_num_mixed_tokens": 9000}, (256, 256), (8192, 8192)),
        ({"max_num_seqs": 4000}, (4000, 4000), (8192, 4000)),
    ],
)
def test_budgets(given: dict[str, int], cpu: tuple[int, int], cuda: tuple[int, int]) -> None:
    config = from_parameters({"model": "m", **given})
    assert resolve_budgets(config, "cpu") == cpu
    assert resolve_budgets(config, "cuda") == cuda
