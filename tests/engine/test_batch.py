"""Laying out a step: the arrays are what a look into each request gives, whatever the scheduler did before."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from pagoda import wishes
from pagoda.batch import SHARED_DECODES, Layout, lay_out, send
from pagoda.plan import Chunk, Plan
from pagoda.request import Request, Status
from pagoda.rows import COMPARED, Rows
from pagoda.sampling_params import SamplingParams
from unit.fake_runner import FakeLaunched, FakeRunner
from unit.lone import make_group, make_request
from unit.loop import make_loop

BLOCK = 8
CPU = torch.device("cpu")


# ── layouts ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def check_layout(plan: Plan, rows: Rows, layout: Layout, block_size: int) -> None:
    """Token by token, from the requests themselves."""
    tokens, positions, slots, ends, samples = [], [], [], [], []
    for i, chunk in enumerate(plan.chunks):
        request = chunk.request
        for position in range(chunk.start, chunk.start + chunk.count):
            tokens.append(-1 if chunk.reads_pending else request.token_ids[position])
            positions.append(position)
            slots.append(request.block_ids[position // block_size] * block_size + position % block_size)
        ends.append(len(tokens))
        if chunk.samples:
            samples.append(i)
    assert layout.token_ids.tolist() == tokens
    assert layout.positions.tolist() == positions
    assert layout.slots.tolist() == slots
    assert layout.query_lens.tolist() == [c.count for c in plan.chunks]
    assert layout.context_lens.tolist() == [c.start + c.count for c in plan.chunks]
    assert layout.longest == max(layout.context_lens)
    assert layout.num_decodes == plan.num_decodes
    assert layout.sample_rows.tolist() == [ends[i] - 1 for i in samples]
    assert layout.sampled.tolist() == [int(layout.rows[i]) for i in samples]
    assert layout.wishes.tolist() == wishes.of(plan.chunks[i].request for i in samples).tolist()
    wanted = any(c.request.params.prompt_logprobs is not None for c in plan.chunks)
    assert layout.scores_prompts == wanted
    check_tables(plan.chunks, rows, layout, block_size)


def check_tables(chunks: Sequence[Chunk], rows: Rows, layout: Layout, block_size: int) -> None:
    """Each request has a row of its own, in which all blocks of its context are, here and on the device."""
    assert len(set(layout.rows.tolist())) == len(chunks)
    for chunk, row in zip(chunks, layout.rows.tolist(), strict=True):
        assert 0 <= row < rows.spare
        blocks = chunk.request.block_ids[: -(-(chunk.start + chunk.count) // block_size)]
        assert rows.block_tables[row, : len(blocks)].tolist() == blocks
        assert rows.host_tables[row, : len(blocks)].tolist() == blocks


class LayingOut(FakeRunner):
    """The fake device, which has every plan laid out."""

    rows: Rows
    num_checked = 0

    def launch(self, plan: Plan) -> FakeLaunched:
        layout = lay_out(plan, self.rows, self.block_size)
        check_layout(plan, self.rows, layout, self.block_size)
        self.num_checked += 1
        return super().launch(plan)


@pytest.mark.parametrize("steps_ahead", [0, 1])
@pytest.mark.parametrize("seed", range(4))
def test_a_layout_is_what_its_requests_hold(seed: int, steps_ahead: int) -> None:
    """Under preemption, chunked prefill, prefix hits, forks, aborts and rows that change hands."""
    chance = random.Random(seed)
    loop = make_loop(num_blocks=24, block_size=4, max_num_seqs=5, max_num_batched_tokens=9, steps_ahead=steps_ahead)
    loop.runner.__class__ = LayingOut
    runner = loop.runner
    assert isinstance(runner, LayingOut)
    runner.rows = Rows(5, 24, CPU)
    for key in range(40):
        prompt = [chance.choice((7, 8))] * chance.randint(1, 14)
        keys = [(key, member) for member in range(chance.choice((1, 1, 1, 3)))]
        loop.add(make_group(keys, prompt, max_tokens=chance.randint(1, 30)))
        for _ in range(chance.randint(0, 8)):
            loop.step()
        if chance.random() < 0.2 and loop.scheduler.requests:
            loop.abort(chance.choice(list(loop.scheduler.requests)))
    loop.drain()
    loop.ledger.check_complete()
    counters = loop.scheduler.counters
    assert runner.num_checked > 100
    assert counters.preemptions > 0
    assert counters.prefix_hit_tokens > 0


def test_a_batch_finds_pending_tokens_and_tables_on_the_device() -> None:
    rows = Rows(3, 4, CPU)
    known, pending = make_chunk([5, 6], start=9), make_chunk([7, 8], start=10)
    pending.reads_pending = True
    chunks = [known, pending, make_prefill([1, 2, 3, 4], list(range(20, 30)))]
    layout = lay_out(Plan(0, chunks), rows, BLOCK)
    rows.remember(torch.from_numpy(layout.rows), torch.tensor([41, 42, 43]))
    batch, sample_rows, sampled = send(layout, rows, BLOCK, CPU)
    assert batch.token_ids.tolist() == [0, 42, *range(20, 30)]
    assert batch.positions.tolist() == [9, 10, *range(10)]
    assert batch.slots.tolist() == [49, 66, *range(8, 18)]
    assert batch.attention.block_tables.tolist()[0] == [5, 6]
    assert batch.attention.query_starts.tolist() == [0, 1, 2, 12]
    assert batch.attention.context_lens.tolist() == [10, 11, 10]
    assert (batch.attention.query_lens_host, batch.attention.context_lens_host) == ([1, 1, 10], [10, 11, 10])
    assert batch.attention.num_decodes == 2
    assert sample_rows.tolist() == [0, 1, 11]
    assert sampled.tolist() == layout.rows.tolist()
    assert batch.outputs is sample_rows


def test_a_batch_wants_every_token_where_prompts_are_scored_or_all_are_decodes() -> None:
    rows = Rows(3, 4, CPU)
    chunks = [make_chunk([5, 6], start=9), make_prefill([1, 2, 3, 4], list(range(20, 30)))]
    layout = lay_out(Plan(0, chunks), rows, BLOCK)
    assert send(layout._replace(scores_prompts=True), rows, BLOCK, CPU)[0].outputs is None
    assert send(lay_out(Plan(1, chunks[:1]), rows, BLOCK), rows, BLOCK, CPU)[0].outputs is None


# ── rows ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def make_chunk(blocks: list[int], start: int = 0) -> Chunk:
    request = make_request("r", [0] * (start + 1))
    request.status = Status.RUNNING
    request.block_ids = blocks
    return Chunk(request, start, 1, True, False, 0)


def make_prefill(blocks: list[int], prompt: list[int]) -> Chunk:
    request = make_request("p", prompt)
    request.status = Status.RUNNING
    request.block_ids = blocks
    return Chunk(request, 0, len(prompt), True, False, 0)


def place(rows: Rows, *chunks: Chunk) -> list[int]:
    """The rows of chunks that need all of their requests' blocks."""
    needed = np.array([len(chunk.request.block_ids) for chunk in chunks])
    found: list[int] = rows.place(chunks, needed).tolist()
    return found


def table(rows: Rows, row: int, count: int) -> list[int]:
    found: list[int] = rows.block_tables[row, :count].tolist()
    assert rows.host_tables[row, :count].tolist() == found
    return found


def test_a_request_keeps_its_row_while_its_blocks_grow() -> None:
    rows = Rows(2, 4, CPU)
    first, second = make_chunk([5]), make_chunk([6, 7])
    places = place(rows, first, second)
    assert sorted(places) == [0, 1]
    first.request.block_ids.append(9)
    assert place(rows, second, first) == places[::-1]
    assert table(rows, places[0], 2) == [5, 9]
    assert table(rows, places[1], 2) == [6, 7]


def test_a_preempted_request_brings_new_blocks() -> None:
    rows = Rows(1, 4, CPU)
    chunk = make_chunk([5, 6])
    (row,) = place(rows, chunk)
    chunk.request.epoch = 1
    chunk.request.block_ids = [7, 8, 9]
    assert place(rows, Chunk(chunk.request, 0, 1, True, False, 1)) == [row]
    assert table(rows, row, 3) == [7, 8, 9]


def test_the_row_of_a_request_that_ended_is_taken_again() -> None:
    rows = Rows(1, 4, CPU)
    gone, other = make_chunk([1]), make_chunk([2])
    place(rows, gone)
    with pytest.raises(RuntimeError, match="more than 1 requests"):
        place(rows, other)
    gone.request.status = Status.FINISHED
    assert place(rows, other) == [0]
    assert table(rows, 0, 1) == [2]


def test_a_row_knows_what_its_present_request_asks_for() -> None:
    rows = Rows(1, 4, CPU)
    for params in (
        SamplingParams(temperature=0, logprobs=3),
        SamplingParams(top_k=-1, top_p=0.5, seed=3, min_tokens=1),
    ):
        request = Request("r", [1, 2], params, 5, frozenset(), -9, status=Status.RUNNING, block_ids=[3])
        assert place(rows, Chunk(request, 0, 2, True, False, 0)) == [0]
        asked = rows.wishes[0]
        assert (asked["seed"], asked["num_prompt_tokens"], asked["top_k"]) == (-9, 2, 0)
        assert (asked["temperature"], asked["top_p"]) == (params.temperature, params.top_p)
        assert (asked["logprobs"], asked["edits"]) == (params.logprobs is not None, params.min_tokens > 0)
        request.status = Status.FINISHED


# ── what decodes have in common ───────────────────────────────────────────────────────────────────────────────────────


def shared(rows: Rows, chunks: list[Chunk]) -> int:
    """Full blocks that a layout of decodes reads once for all."""
    return lay_out(Plan(0, chunks), rows, BLOCK).shared_prefix // BLOCK


@pytest.mark.parametrize(
    ("own", "start", "expected"),
    [([90], 33 * BLOCK, 33), ([90], 33 * BLOCK - 1, 32), ([90], 32 * BLOCK, 32), ([], 31 * BLOCK, 0)],
    ids=["all of it", "only full blocks", "one token of its own", "too short"],
)
def test_a_common_prefix_ends_before_the_first_own_token(own: list[int], start: int, expected: int) -> None:
    common = list(range(100, 133))
    chunks = [make_chunk([*common, 200 + i], 33 * BLOCK + i % 3) for i in range(40)]
    chunks[17] = make_chunk([*common, *own], start)
    assert shared(Rows(40, 50, CPU), chunks) == expected


@pytest.mark.parametrize("length", [40, COMPARED - 1, COMPARED, COMPARED + 1, 3 * COMPARED, 3 * COMPARED + 7])
def test_a_common_prefix_of_any_length_is_found(length: int) -> None:
    chunks = [make_chunk([*range(length), 1000 + i, 2000], (length + 1) * BLOCK + 1) for i in range(40)]
    assert shared(Rows(40, length + 2, CPU), chunks) == length


def test_what_few_or_different_requests_share_is_not_looked_for() -> None:
    alike = [make_chunk([*range(45), 100 + i], 45 * BLOCK) for i in range(40)]
    assert shared(Rows(40, 50, CPU), alike) == 45
    assert shared(Rows(40, 50, CPU), alike[: SHARED_DECODES - 1]) == 0
    alike[20] = make_chunk([0, 7, *range(2, 50)], 45 * BLOCK)
    assert shared(Rows(40, 50, CPU), alike) == 0


def test_a_common_prefix_follows_who_comes_goes_and_comes_back() -> None:
    """It is remembered while nobody does."""
    rows = Rows(41, 50, CPU)
    alike = [make_chunk([*range(45), 100 + i], 45 * BLOCK) for i in range(40)]
    other = make_chunk([*range(38), *range(400, 408)], 45 * BLOCK)
    assert [shared(rows, alike), shared(rows, alike), shared(rows, [*alike, other])] == [45, 45, 38]
    assert shared(rows, alike) == 45
    back = alike[3].request
    back.epoch, back.block_ids = 1, [*range(34), *range(300, 312)]
    again = [*alike[:3], Chunk(back, 45 * BLOCK, 1, True, False, 1), *alike[4:]]
    assert shared(rows, again) == 34
