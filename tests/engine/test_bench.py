"""`pagoda bench offline` and `profile` on a tiny shape: they run the engine's own loop, and their figures add up."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from pagoda import hf_config
from pagoda.bench import determinism, host, loads, machine, offline
from pagoda.bench.alone import Alone
from pagoda.bench.cli import app
from pagoda.bench.floor import Floor
from pagoda.bench.machine import Machine
from pagoda.bench.profile import WARM_UP, ClockedRunner, decode, mixed, prefill
from pagoda.config import EngineConfig
from pagoda.errors import ConfigError
from pagoda.plan import Chunk, Plan
from pagoda.request import Request
from pagoda.sampling_params import SamplingParams
from pagoda.storage import choice
from pagoda.text.tokenizer import Tokenizer
from typer.testing import CliRunner

HIDDEN, INNER, LAYERS, VOCAB, KV = 64, 96, 2, 300, 32
LIMITS = Machine(bandwidth=1e9, matrix_rate=1e10, products={})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": INNER,
        "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256, "eos_token_id": 5,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.fixture
def settings(folder: Path) -> EngineConfig:
    return EngineConfig(model=str(folder), device="cpu", load_format="dummy", num_kv_blocks=200)


def test_a_load_runs_to_its_last_token_and_is_set_beside_the_peer(folder: Path, settings: EngineConfig) -> None:
    load = loads.OfflineLoad(
        "5 × 9 → 7",
        lambda size: loads.mixed(5, inputs=(9, 9), outputs=(7, 7), vocab_size=size),
        3.0,
    )
    peers = machine.PEERS_GPU
    half = Machine(peers.bandwidth / 2, peers.matrix_rate / 2, {rows: 2 * ms for rows, ms in peers.products.items()})
    heard: list[offline.Result] = []
    (result,) = offline.measure(Alone(settings, folder), half, [load], peers=True, done=heard.append)
    assert heard == [result]
    assert (result.input_tokens, result.output_tokens, result.steps, result.preemptions) == (45, 35, 7, 0)
    assert result.peer_seconds == pytest.approx(6.0)
    assert result.output_rate == pytest.approx(35 / result.seconds)
    assert result.total_rate == pytest.approx(80 / result.seconds)


def test_the_floor_is_a_steps_bytes_or_its_operations(folder: Path, settings: EngineConfig) -> None:
    body = LAYERS * (HIDDEN * (HIDDEN + 2 * KV) + HIDDEN * HIDDEN + 3 * HIDDEN * INNER)
    head, kv = VOCAB * HIDDEN, 2 * LAYERS * KV
    request = Request("r", [1] * 100, SamplingParams(), 1, frozenset(), 0)
    floor = Floor(Alone(settings, folder).model, 4, 4, LIMITS)
    one = Plan(0, [Chunk(request, 99, 1, True, False, 0)])
    assert floor.seconds([one]) == pytest.approx(4 * (body + head + 100 * kv) / 1e9)
    many = Plan(1, [Chunk(request, 20, 80, False, False, 0)])
    seen = sum(range(21, 101))
    needed = (LAYERS - 1) * body // LAYERS + 2 * KV * HIDDEN  # keys and values are all that the last layer is asked for
    assert floor.seconds([many]) == pytest.approx((2 * needed * 80 + 4 * LAYERS * HIDDEN * seen) / 1e10)
    assert floor.seconds([one, many]) == pytest.approx(floor.seconds([one]) + floor.seconds([many]))


def test_quantised_weights_and_caches_have_a_lower_floor(folder: Path, settings: EngineConfig) -> None:
    plain = Alone(settings, folder).model
    fp8 = choice.resolve("fp8", plain)
    request = Request("r", [1] * 100, SamplingParams(), 1, frozenset(), 0)
    one = Plan(0, [Chunk(request, 99, 1, True, False, 0)])
    body = LAYERS * (HIDDEN * (HIDDEN + 2 * KV) + HIDDEN * HIDDEN + 3 * HIDDEN * INNER)
    spared = Floor(plain, 2, 2, LIMITS).seconds([one]) - Floor(fp8, 2, 1, LIMITS).seconds([one])
    assert spared == pytest.approx((body + 100 * 2 * LAYERS * KV) / LIMITS.bandwidth)
    many = Plan(1, [Chunk(request, i, 1, True, False, 0) for i in range(100)])
    fast = msgspec.structs.replace(LIMITS, fp8_rate=2 * LIMITS.matrix_rate)
    spared = Floor(fp8, 2, 1, LIMITS).seconds([many]) - Floor(fp8, 2, 1, fast).seconds([many])
    assert spared == pytest.approx(body * 100 / LIMITS.matrix_rate)


def test_the_phases_of_a_step_add_up(folder: Path, settings: EngineConfig) -> None:
    engine = Alone(settings, folder, ClockedRunner)
    for profile in (decode(engine, 3, 20, 4), mixed(engine, 3, 20, 4), prefill(engine, 16, 50)):
        named = sum(phase.milliseconds for phase in profile.host)
        assert 0.8 * profile.milliseconds < named <= profile.milliseconds
        assert {"schedule", "launch: forward", "update"} <= {phase.name for phase in profile.host}
        assert "matrix products" in {phase.name for phase in profile.device}


def test_mixed_steps_are_full(folder: Path, settings: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Alone(msgspec.structs.replace(settings, max_num_seqs=24), folder, ClockedRunner)
    launch, steps = engine.runner.launch, list[tuple[int, int]]()
    monkeypatch.setattr(
        engine.runner, "launch", lambda plan: steps.append((plan.num_tokens, plan.num_decodes)) or launch(plan)
    )
    mixed(engine, 16, 100, 4)
    assert steps.count((engine.runner.max_num_mixed_tokens, 16)) >= WARM_UP + 2 * 4


def test_a_profile_names_the_setting_that_stands_in_its_way(folder: Path, settings: EngineConfig) -> None:
    engine = Alone(msgspec.structs.replace(settings, max_num_seqs=11), folder, ClockedRunner)
    with pytest.raises(ConfigError, match="max_num_seqs 11 is below the 12 requests of 4 decodes and two steps'"):
        mixed(engine, 4, 100, 4)
    with pytest.raises(ConfigError, match="max_num_seqs 11 is below the 12 requests that are to decode"):
        decode(engine, 12, 20, 4)
    with pytest.raises(ConfigError, match="max_num_batched_tokens 256 makes 2 prompts of 50 tokens fewer than three"):
        prefill(engine, 2, 50)


def test_shared_prompts_begin_alike() -> None:
    made = loads.shared(4, prefix=10, own=3, output=2, vocab_size=VOCAB)
    assert len({tuple(load.prompt_ids[:10]) for load in made}) == 1
    assert len({tuple(load.prompt_ids) for load in made}) == 4
    assert {(len(load.prompt_ids), load.num_output) for load in made} == {(13, 2)}


def test_the_commands_print_tables_and_write_json(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "measure", lambda *_: LIMITS)
    common = ["--model", str(folder), "--set", "load_format=dummy", "--set", "device=cpu", "--set", "num_kv_blocks=300"]
    file = tmp_path / "out.json"
    ran = CliRunner().invoke(app, ["offline", *common, "--only", "8 ×", "--json", str(file)])
    assert ran.exit_code == 0, ran.output
    assert "8 × 64" in ran.output
    (result,) = msgspec.json.decode(file.read_bytes())["results"]
    assert result["output_tokens"] == 8 * 64
    assert result["peer_seconds"] is None, "another model than the peer's"
    ran = CliRunner().invoke(app, ["profile", *common, "--json", str(file)])
    assert ran.exit_code == 0, ran.output
    assert msgspec.json.decode(file.read_bytes())[0]["name"] == "decode, 1 × 64"


def test_the_hosts_phases_are_within_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "STEPS", 20)
    monkeypatch.setattr(host, "COUNTS", (1, 40))
    file = tmp_path / "host.json"
    ran = CliRunner().invoke(app, ["host", "--json", str(file)])
    assert ran.exit_code == 0, ran.output
    results = msgspec.json.decode(file.read_bytes(), type=list[host.Result])
    assert [(r.load, r.requests) for r in results] == [(load.name, n) for load in host.LOADS for n in (1, 40)]
    for result in results:
        assert set(result.phases) == set(host.PHASES)
        assert min(result.phases.values()) > 0
        assert 0 < result.step <= result.worst


def test_tokens_together_are_held_against_each_alone(settings: EngineConfig, folder: Path) -> None:
    case = determinism.Case(count=12, prompt=24, shared=16, output=20)
    result = determinism.measure(Alone(settings, folder), case, "temperature 0.8")
    assert result.tokens > 0.9 * case.count * case.output
    assert result.differences <= 1
    assert min(result.preemptions, result.hit_tokens) > 0


def test_a_request_counts_up_to_its_first_difference(
    settings: EngineConfig, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {12: [[1, 2, 3, 4]] * 12, 1: [[1, 9, 3, 9]]}
    monkeypatch.setattr(determinism, "_run", lambda engine, scheduler, requests: answers[len(requests)])
    result = determinism.measure(Alone(settings, folder), determinism.Case(count=12, output=4), "greedy")
    assert (result.tokens, result.differences) == (24, 12)


def test_products_are_timed_by_both(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    ran = CliRunner().invoke(app, ["products", "--model", str(folder), "--set", "device=cpu", "--json", str(file)])
    assert ran.exit_code == 0, ran.output
    results = msgspec.json.decode(file.read_bytes())
    assert [r["rows"] for r in results] == [1, 4, 16, 64, 128, 256]
    assert all(r["torch"] > 0 and r["ours"] > 0 for r in results)


def test_what_the_machine_can_do_is_measured_on_a_cpu(folder: Path, settings: EngineConfig) -> None:
    engine = Alone(settings, folder)
    found = machine.measure(engine.model, engine.runner.dtype, engine.runner.device)
    assert found.bandwidth > 1e8
    assert found.matrix_rate > 1e8
    assert found.products == {}


def test_a_shape_can_be_written_to_be_served(tmp_path: Path) -> None:
    written = CliRunner().invoke(app, ["shape", "llama-3.1-8b", str(tmp_path / "made")])
    assert written.exit_code == 0, written.output
    tokenizer = Tokenizer.from_folder(tmp_path / "made")
    assert hf_config.load(tmp_path / "made").vocab_size == 128256 > max(tokenizer.encode("zebra"))
    assert tokenizer.decode([128255])
    ids = tokenizer.encode("Pagoda serves 塔.")
    assert tokenizer.decode(ids) == "Pagoda serves 塔."
    assert CliRunner().invoke(app, ["shape", "llama-9", str(tmp_path)]).exit_code == 2


def test_products_of_other_rows_lie_between_the_measured_ones_or_in_proportion_beyond() -> None:
    limits = Machine(bandwidth=1, matrix_rate=1, products={1: 4.0, 3: 8.0})
    assert [limits.product_seconds(rows) for rows in (1, 2, 3, 9)] == pytest.approx([4e-3, 6e-3, 8e-3, 24e-3])
