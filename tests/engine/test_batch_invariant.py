"""batch_invariant: a request's logits, to the last bit, are those of its lone run, whatever ran beside it and how.

Logits are taken where tokens are drawn from them. `together` is everything at once: random chunks, neighbours that come
and go, a prefix cache, a pool so small that requests are preempted, and forks.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from engine.families import FAMILIES
from engine.parity import SHAPE, save
from pagoda import config, hf_config
from pagoda.allocation import BlockAllocator
from pagoda.batch import Layout
from pagoda.block_pool import BlockPool
from pagoda.errors import ConfigError
from pagoda.plan import Plan
from pagoda.request import Request
from pagoda.runner import Runner, check_batch_invariant
from pagoda.sampler import Draw
from pagoda.sampling_params import SamplingParams
from pagoda.scheduler import Scheduler
from transformers import LlamaConfig, LlamaForCausalLM

BLOCK_SIZE = 8
MAX_MODEL_LEN = 192
SMOLLM2 = Path(os.environ.get("PAGODA_HOME", Path(__file__).parents[2] / ".pagoda")) / "models/smollm2-135m-instruct"

PARAMS = (
    SamplingParams(temperature=0, logprobs=2),
    SamplingParams(temperature=1.0, seed=1),
    SamplingParams(temperature=0.8, top_k=20, top_p=0.9, logprobs=5),
    SamplingParams(temperature=1.2, min_p=0.02, repetition_penalty=1.2, presence_penalty=0.5),
    SamplingParams(temperature=0, frequency_penalty=0.7, logit_bias={3: 1.5, 9: -2.0}, bad_words=((5,),)),
)


@dataclass(frozen=True)
class Wanted:
    """A request that is made anew for every run."""

    key: int
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    count: int

    def request(self) -> Request:
        return Request(self.key, list(self.prompt_ids), self.params, self.count, frozenset(), seed=1000 + self.key)


class Watched(Runner):
    """Keeps the logits [V] that every token was drawn from, by request and place."""

    logits: dict[tuple[object, int], torch.Tensor]

    def _draw(self, plan: Plan, layout: Layout, hidden: torch.Tensor) -> Draw:
        chunks = [c for c in plan.chunks if c.samples]
        rows = self.model.logits(hidden)
        for chunk, row in zip(chunks, rows, strict=True):
            self.logits[chunk.request.key, chunk.start + chunk.count] = row.clone()
        return self.sampler.launch(chunks, layout.wishes, rows)


@dataclass
class Outcome:
    logits: dict[tuple[object, int], torch.Tensor]
    requests: dict[object, Request]
    logprobs: dict[object, list[object]]
    preemptions: int
    hits: int

    def differences(self, other: Outcome) -> list[tuple[object, int]]:
        """Where both drew a token from different logits."""
        both = self.logits.keys() & other.logits.keys()
        return sorted((k for k in both if not torch.equal(self.logits[k], other.logits[k])), key=str)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Engines set the number of torch's threads for the process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make_runner(folder: Path, *, invariant: bool, threads: int, **more: object) -> Watched:
    settings = config.from_parameters(
        {
            "model": str(folder),
            "batch_invariant": invariant,
            "num_threads": threads,
            "num_kv_blocks": 96,
            "block_size": BLOCK_SIZE,
            "max_num_seqs": 16,
            **more,
        }
    )
    return Watched(settings, hf_config.load(folder), folder, MAX_MODEL_LEN)


def run(runner: Watched, groups: list[list[Wanted]], *, blocks: int, caching: bool, seed: int | None = None) -> Outcome:
    """Serve groups, each a request with its forks. With a seed, groups come late and budgets vary from step to step."""
    chance = random.Random(seed)
    runner.logits = {}
    scheduler = Scheduler(
        BlockAllocator(BlockPool(blocks), block_size=BLOCK_SIZE, enable_prefix_caching=caching),
        max_num_seqs=16,
        max_num_batched_tokens=256,
        max_num_queued_requests=64,
        max_num_queued_tokens=10_000,
    )
    waiting = list(groups)
    requests: dict[object, Request] = {}
    logprobs: dict[object, list[object]] = {}
    while waiting or scheduler.requests:
        while waiting and (seed is None or chance.random() < 0.4 or not scheduler.requests):
            leader, *forks = (wanted.request() for wanted in waiting.pop(0))
            leader.forks = forks
            for fork in forks:
                fork.fork_of = leader
            scheduler.add(leader)
            requests.update({r.key: r for r in (leader, *forks)})
        if seed is not None:
            scheduler.max_num_batched_tokens = chance.choice((16, 17, 23, 40, 100, 256))
        plan = scheduler.schedule()
        collected = runner.collect(runner.launch(plan))
        for progress in scheduler.update(plan, collected.token_ids, collected.logprobs):
            logprobs.setdefault(progress.request.key, []).append(progress.logprob)
        scheduler.check()
    counters = scheduler.counters
    return Outcome(runner.logits, requests, logprobs, counters.preemptions, counters.prefix_hit_tokens)


def load(vocab_size: int, count: int, output: int, longest: int, seed: int = 0) -> list[list[Wanted]]:
    """Groups: random prompts, some with a common beginning, and the last one with two forks."""
    chance = random.Random(seed)
    shared = [chance.randrange(vocab_size) for _ in range(longest)]
    groups = []
    for key in range(count):
        own = [chance.randrange(vocab_size) for _ in range(chance.randint(1, longest))]
        prompt = shared[: chance.randint(longest // 2, longest)] + own[:5] if key % 2 else own
        params = PARAMS[key % len(PARAMS)]
        groups.append([Wanted(key, tuple(prompt), params, chance.randint(output // 2, output))])
    leader = groups[-1][0]
    groups[-1] += [replace(leader, key=count + i, params=PARAMS[1 + i]) for i in range(2)]
    return groups


def alone(runner: Watched, groups: list[list[Wanted]]) -> Outcome:
    """Every request by itself, its prompt in one step, over an empty cache."""
    runs = [run(runner, [[wanted]], blocks=64, caching=False) for group in groups for wanted in group]
    whole = Outcome({}, {}, {}, 0, 0)
    for lone in runs:
        whole.logits |= lone.logits
        whole.requests |= lone.requests
        whole.logprobs |= lone.logprobs
    return whole


def assert_invariant(runner: Watched, groups: list[list[Wanted]], *, blocks: int, seeds: int) -> None:
    lone = alone(runner, groups)
    seen = Outcome({}, {}, {}, 0, 0)
    for seed in range(seeds):
        got = run(runner, groups, blocks=blocks, caching=True, seed=seed)
        assert got.differences(lone) == []
        assert got.logits.keys() == lone.logits.keys()
        for key, request in lone.requests.items():
            assert got.requests[key].token_ids == request.token_ids
            assert got.logprobs[key] == lone.logprobs[key]
        seen.preemptions += got.preemptions
        seen.hits += got.hits
    assert seen.preemptions > 0, "the pool was too large"
    assert seen.hits > 0, "nothing was found in the prefix cache"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With sums so long that a product of one row takes another order than one of many."""
    folder = tmp_path_factory.mktemp("llama")
    save(folder, LlamaConfig(**{**SHAPE, "intermediate_size": 1600}), LlamaForCausalLM)
    return folder


@pytest.mark.parametrize("threads", [1, 2])
def test_a_request_keeps_its_bits(llama: Path, threads: int) -> None:
    runner = make_runner(llama, invariant=True, threads=threads)
    assert_invariant(runner, load(128, 9, 48, 60), blocks=24, seeds=3)


def test_without_it_bits_differ(llama: Path) -> None:
    """So the tests here would notice; tokens rarely differ, and nothing is promised."""
    runner = make_runner(llama, invariant=False, threads=1)
    groups = load(128, 9, 48, 60)
    differences = run(runner, groups, blocks=24, caching=True, seed=0).differences(alone(runner, groups))
    assert len(differences) > 20


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "qwen3", "phi3", "qwen3 moe", "mixtral"])
def test_other_families_keep_their_bits(tmp_path: Path, name: str) -> None:
    """Windows, capped scores, norms of heads, partial rotations and experts."""
    next(family for family in FAMILIES if family.name == name).save(tmp_path)
    runner = make_runner(tmp_path, invariant=True, threads=1)
    assert_invariant(runner, load(128, 6, 40, 50), blocks=18, seeds=2)


@pytest.mark.parametrize("more", [{"quantization": "fp8"}, {"kv_cache_dtype": "fp8"}], ids=["weights", "cache"])
def test_quantised_models_keep_their_bits(tmp_path: Path, more: dict[str, object]) -> None:
    save(tmp_path, LlamaConfig(**SHAPE), LlamaForCausalLM)
    runner = make_runner(tmp_path, invariant=True, threads=1, **more)
    assert_invariant(runner, load(128, 6, 40, 50), blocks=18, seeds=2)


@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="the default model is not in the store: run `pagoda pull`")
def test_the_default_model_keeps_its_bits() -> None:
    runner = make_runner(SMOLLM2, invariant=True, threads=1)
    assert_invariant(runner, load(49152, 4, 24, 40), blocks=10, seeds=1)


@pytest.mark.parametrize(
    ("device", "dtype", "message"),
    [
        ("cuda", torch.float32, "batch_invariant true is not available on device 'cuda' yet: set device to 'cpu'"),
        ("cpu", torch.bfloat16, "batch_invariant true is not available in dtype 'bfloat16': set dtype to 'float32'"),
    ],
)
def test_what_is_not_promised_is_refused(device: str, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_batch_invariant(torch.device(device), dtype)
