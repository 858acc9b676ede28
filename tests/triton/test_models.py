"""Folders of models through the real server: one with a GGUF file, and those that are refused, with the reason."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import tritonclient.grpc as grpcclient
from pagoda.server import store
from pagoda.triton_client import SECRET_HEADER
from service import MODEL, PAGODA, Service, free_port, running, wait_for, write_model
from test_parameters import post
from unit.test_gguf_checkpoint import write_tiny_gguf


def load(service: Service, name: str, verb: str = "load") -> str:
    """What `pagoda load` says, in a line; empty when it has worked."""
    command = [str(Path(sys.prefix) / "bin" / "pagoda"), verb, name, "--run-folder", str(service.run_folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return "" if done.returncode == 0 else " ".join(done.stdout.split())


def test_a_folder_with_a_gguf_file_is_served(calm: Service, tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    write_model(calm.repository, "tiny", model=tmp_path, kv_cache_gib="0.01")
    try:
        assert load(calm, "tiny") == ""
        status, answer = post(calm, model="tiny", prompt="low low", logprobs=0, ignore_eos=True)
        assert status == 200, answer
        assert answer["usage"]["completion_tokens"] == 8
        assert load(calm, "tiny", "unload") == ""
    finally:
        shutil.rmtree(calm.repository / "tiny")
        shutil.rmtree(store.prepared(tmp_path))


def test_a_model_by_itself_has_the_configuration_that_the_backend_completes(calm: Service, tmp_path: Path) -> None:
    with running(tmp_path, tmp_path, "--served-model-name", "alone", model=store.DEFAULT_MODEL) as service:
        config, completed = configuration(service, "alone"), configuration(calm, MODEL)
        assert set(config) == set(completed)
        for key in ("backend", "input", "output", "model_transaction_policy", "version_policy", "optimization"):
            assert config[key] == completed[key], key
        body = {"text_input": "The capital of France is", "sampling_parameters": '{"temperature": 0}'}
        assert "Paris" in json.loads(service.triton_post("alone", "generate", body))["text_output"]


def test_the_engines_see_what_the_service_does_and_tritonserver_no_gpu(calm: Service) -> None:
    def environment(pattern: str) -> list[dict[str, str]]:
        return [psutil.Process(pid).environ() for pid in calm.pids(pattern)]

    (triton,) = environment("bin/tritonserver")
    assert triton["CUDA_VISIBLE_DEVICES"] == ""
    for engine in environment("pagoda.process"):
        assert engine.get("CUDA_VISIBLE_DEVICES") == os.environ.get("CUDA_VISIBLE_DEVICES")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("instance_group [{ kind: KIND_MODEL }]", ""),
        (
            "max_batch_size: 8",
            "max_batch_size 8: the engine batches by itself",
        ),
        (
            "instance_group [{ count: 2 }]",
            "instance_group asks for 2 instances, and one engine serves",
        ),
    ],
)
def test_a_model_has_one_instance_that_batches_by_itself(calm: Service, line: str, reason: str) -> None:
    write_model(calm.repository, "grouped", kv_cache_gib="0.01", max_model_len="64")
    with open(calm.repository / "grouped" / "config.pbtxt", "a") as file:
        file.write(f"{line}\n")
    try:
        said = load(calm, "grouped")
        assert (reason in said) if reason else said == "", said
        load(calm, "grouped", "unload")
    finally:
        shutil.rmtree(calm.repository / "grouped")


def test_a_repository_of_which_nothing_can_be_read_is_refused_with_the_reasons(tmp_path: Path) -> None:
    for name, config in (("broken", "backend = pagoda"), ("renamed", 'name: "other" backend: "pagoda"')):
        (tmp_path / "models" / name / "1").mkdir(parents=True)
        (tmp_path / "models" / name / "config.pbtxt").write_text(config)
    (tmp_path / "models" / "bare").mkdir()
    (tmp_path / "models" / "bare" / "config.pbtxt").write_text('backend: "pagoda"')
    command = [PAGODA, "serve", "--model-repository", str(tmp_path / "models"), "--run-folder", str(tmp_path / "run")]
    ports = [text for name in ("port", "grpc-port", "metrics-port") for text in (f"--{name}", str(free_port()))]
    done = subprocess.run([*command, *ports], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    said = " ".join(done.stdout.split())
    for reason in (
        "no model could be loaded: bare: at least one version must be available",
        "broken: failed to read text proto from",
        "renamed: unexpected directory name 'renamed' for model 'other', directory name must equal model name",
    ):
        assert reason in said


def configuration(service: Service, name: str) -> dict[str, Any]:
    client = grpcclient.InferenceServerClient(service.instance.grpc_address)
    found = client.get_model_config(name, headers={SECRET_HEADER: service.instance.secret}, as_json=True)
    config: dict[str, Any] = found["config"]
    return config


@pytest.mark.parametrize("verb", ["load", "unload"])
def test_a_model_that_is_not_there_is_refused_with_those_that_are(calm: Service, verb: str) -> None:
    assert f"the repository has no model 'nope'; its models: short, {MODEL}" in load(calm, "nope", verb)


def say(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/opened'\ntR.")


REFUSED: dict[str, tuple[Callable[[Path], object], dict[str, str], str]] = {
    "pickles": (only_pickles, {}, "pickled weights (*.bin, *.pt) are never opened: convert them"),
    "unknown": (lambda folder: say(folder, architectures=["Own"]), {}, "'Own' is not known; known ones: Gemma2ForC"),
    "code": (lambda folder: None, {"trust_remote_code": "true"}, "code from a model folder is never run"),
    "mute": (lambda folder: (folder / "tokenizer.json").unlink(), {}, "The model folder has no tokenizer.json. Make"),
    "shape": (lambda folder: say(folder, intermediate_size=1535), {}, "mlp.down_proj.weight (shape [576, 1536], not"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_folder_that_cannot_be_served_says_why(calm: Service, tmp_path: Path, name: str) -> None:
    spoil, parameters, reason = REFUSED[name]
    for file in (store.models_dir() / store.DEFAULT_MODEL).iterdir():
        if file.suffix == ".safetensors":
            (tmp_path / file.name).symlink_to(file)
        else:
            shutil.copy(file, tmp_path)
    spoil(tmp_path)
    write_model(calm.repository, name, model=tmp_path, **parameters)
    try:
        said = load(calm, name)
        assert reason in said
        assert "TritonModelException" not in said
        wait_for(lambda: f"model {name} could not be loaded" in calm.output.read_text(), 5, "a word on the console")
        assert not Path("/tmp/opened").exists()
    finally:
        shutil.rmtree(calm.repository / name)
    assert calm.status("/health") == 200
