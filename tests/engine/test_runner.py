"""The runner's steps without a GPU: a step ahead, graphs' padded inputs, rows, and what the memory holds."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pagoda import cuda_graph, hf_config, memory, trials, wishes
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
from pagoda_kernels import AttentionBatch

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
        shape = self.known.find(layout)
        if shape is None:
            return super()._compute(layout)
        self.ran.add(shape)
        array = torch.from_numpy(cuda_graph.pack(layout, shape, self.rows.spare))
        inputs = cuda_graph.views(array, shape)
        batch = cuda_graph.batch_maker(inputs, shape, self.rows, self.block_size)()
        assert len(batch.token_ids) == shape.rows
        hidden = self._forward(replace(batch, attention=real_requests(batch.attention, layout, shape)))
        assert len(hidden) == shape.requests
        count, samples = len(layout.token_ids), len(layout.sampled)
        return hidden[: samples if shape.chunks else count], inputs.sample_rows[:samples], inputs.sampled[:samples]


def real_requests(padded: AttentionBatch, layout: Layout, shape: Shape) -> AttentionBatch:
    """For the CPU, which reads the host's lengths, where a graph's kernels take them as bounds."""
    decodes, chunks = layout.num_decodes, len(layout.rows) - layout.num_decodes
    if shape.chunks:
        assert not padded.context_lens[decodes : shape.decodes].any()
        assert not padded.query_starts[shape.decodes + chunks :].diff().any()
    real = [*range(decodes), *range(shape.decodes, shape.decodes + chunks)]
    starts = padded.query_starts[[*real, (real[-1] if chunks else decodes - 1) + 1]]
    contexts = padded.context_lens[real]
    return AttentionBatch(
        padded.block_tables[real], starts, contexts, starts.diff().tolist(), contexts.tolist(), decodes
    )  # fmt: skip


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
    assert {shape.chunks > 0 for shape in runner.ran} == {False, True}
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
                    shape = shapes.find(layout_of(decodes, longest, shared=shared))
                    assert shape in known
                    assert shape.rows == shape.decodes >= decodes
                    assert shape.bound >= longest
                    assert shape.shares_prefix == shared


def test_mixed_steps_of_ordinary_prompts_have_graphs() -> None:
    shapes = Shapes(256, 8192, 8192)
    known = set(shapes.all())
    for decodes in (0, 1, 16, 17, 256):
        for prompts in ([1], [500], [1, 600, 600, 500], [50] * 32):
            shape = shapes.find(layout_of(decodes, 8192, prompts))
            assert shape in known
            assert shape.decodes >= decodes
            assert 0 <= shape.rows - decodes - sum(prompts) < 128


def test_a_step_with_more_of_something_than_any_graph_has_none() -> None:
    shapes = Shapes(64, 8192, 4096)
    assert shapes.find(layout_of(64, 8192, [62] * 32)) == Shape(64, 2048, 8192, chunks=32)
    assert shapes.find(layout_of(65, 100, [10])) is None
    assert shapes.find(layout_of(64, 8193, [10])) is None
    assert shapes.find(layout_of(64, 100, [10] * 33)) is None
    assert shapes.find(layout_of(64, 100, [1000, 985])) is None
    assert shapes.find(layout_of(64, 100, [10])._replace(scores_prompts=True)) is None
    assert shapes.find(layout_of(64, 100, [1025])) is not None
    assert shapes.find(layout_of(64, 500, [1024], shared=True)) is not None
    assert shapes.find(layout_of(64, 500, [600, 600], shared=True)) is None
    widening = Shapes(64, 8192, 4096, widens_cache=True)
    assert widening.find(layout_of(64, 100, [1024])) is not None
    assert widening.find(layout_of(64, 100, [1025])) is None


def layout_of(decodes: int, longest: int, prompts: Sequence[int] = (), *, shared: bool = False) -> Layout:
    """Decodes of contexts up to `longest` and whole prompts, of which shapes see numbers alone."""
    query_lens = np.array([1] * decodes + [*prompts])
    contexts = np.array([longest] * decodes + [*prompts])
    nothing = np.zeros(0, np.int64)
    return Layout(
        token_ids=np.zeros(query_lens.sum(), np.int64), positions=nothing, slots=nothing, rows=np.arange(len(contexts)),
        query_lens=query_lens, context_lens=contexts, num_decodes=decodes, shared_prefix=256 * shared,
        sample_rows=nothing, sampled=nothing, wishes=wishes.of([]), scores_prompts=False,
    )  # fmt: skip


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
