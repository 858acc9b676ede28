"""The standard text contract: tritonclient over gRPC, /generate and /generate_stream."""

from __future__ import annotations

import json
import queue
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
import tritonclient.grpc as grpcclient
from pagoda import protocol as wire
from pagoda.server import store
from pagoda.text.tokenizer import Tokenizer
from service import MODEL, Service
from test_parameters import post
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

PROMPT = "The capital of France is"
ANSWER = " Paris.\n\nThe answer is:"
GREEDY = {"temperature": 0, "max_tokens": 8}


def tensor(name: str, value: Any, datatype: str) -> grpcclient.InferInput:
    dtype = {"BYTES": np.object_, "BOOL": np.bool_}[datatype]
    made = grpcclient.InferInput(name, [1], datatype)
    made.set_data_from_numpy(np.array([value.encode() if isinstance(value, str) else value], dtype=dtype))
    return made


def infer(service: Service, inputs: list[grpcclient.InferInput], **parameters: Any) -> list[Any]:
    """Every response of one request, errors among them, up to the final one."""
    responses: queue.Queue[Any] = queue.Queue()
    client = grpcclient.InferenceServerClient(service.instance.grpc_address)
    client.start_stream(lambda result, error: responses.put(error or result))
    client.async_stream_infer(MODEL, inputs, parameters=parameters or None, enable_empty_final_response=True)
    found = []
    while True:
        item = responses.get(timeout=60)
        found.append(item)
        final = not isinstance(item, Exception) and item.get_response().parameters["triton_final_response"].bool_param
        if final or isinstance(item, Exception):
            client.stop_stream(cancel_requests=False)
            client.close()
            return found


def texts(responses: list[Any]) -> list[str]:
    return [r.as_numpy("text_output")[0].decode() for r in responses if r.as_numpy("text_output") is not None]


def strings(response: Any, name: str) -> list[str]:
    return [value.decode() for value in response.as_numpy(name)]


def asking(parameters: dict[str, Any], *shown: str, stream: bool = False) -> list[grpcclient.InferInput]:
    """The inputs of a request whose answers come without the prompt; `shown`: the return_… inputs."""
    return [
        tensor("text_input", PROMPT, "BYTES"),
        tensor("sampling_parameters", json.dumps(parameters), "BYTES"),
        tensor("exclude_input_in_output", True, "BOOL"),
        tensor("stream", stream, "BOOL"),
        *(tensor(name, True, "BOOL") for name in shown),
    ]


def test_a_text_far_too_long_is_refused_before_it_takes_memory(calm: Service) -> None:
    def held() -> int:
        return sum(int(psutil.Process(pid).memory_info().rss) for pid in calm.pids("pagoda.text.worker"))

    before = held()
    (error,) = infer(calm, [tensor("text_input", "x " * (4 << 20), "BYTES")])
    assert "alone would pass the model's context of 8192 tokens by" in str(error)
    assert held() - before < 2**28


def test_streaming_gives_deltas_and_final_rides_the_last(calm: Service) -> None:
    inputs = [
        tensor("text_input", PROMPT, "BYTES"),
        tensor("stream", True, "BOOL"),
        tensor("sampling_parameters", json.dumps(GREEDY), "BYTES"),
        tensor("return_finish_reason", True, "BOOL"),
        tensor("return_num_output_tokens", True, "BOOL"),
    ]
    responses = infer(calm, inputs)
    assert "".join(texts(responses)) == ANSWER
    reasons = [r.as_numpy("finish_reason")[0].decode() for r in responses]
    assert reasons == ["None"] * (len(reasons) - 1) + ["length"]
    assert sum(int(r.as_numpy("num_output_tokens")[0]) for r in responses) == 8


def test_whole_answer_has_the_prompt_before_it_unless_excluded(calm: Service) -> None:
    base = [tensor("text_input", PROMPT, "BYTES"), tensor("sampling_parameters", json.dumps(GREEDY), "BYTES")]
    assert texts(infer(calm, base)) == [PROMPT + ANSWER]
    assert texts(infer(calm, [*base, tensor("exclude_input_in_output", True, "BOOL")])) == [ANSWER]


def test_parameters_may_be_the_request_s_own_and_numbers_strings(calm: Service) -> None:
    inputs = [tensor("text_input", PROMPT, "BYTES"), tensor("exclude_input_in_output", True, "BOOL")]
    assert texts(infer(calm, inputs, temperature="0", max_tokens="8")) == [ANSWER]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be in [1, 2147483647], not 0"),
        ({"temperature": -1}, "temperature must be in"),
        ({"max_tokens": "many"}, "parameter max_tokens='many'"),
        ({"repetition_penalty": 0}, "repetition_penalty must be in (0, 10], not 0.0"),
        ({"logit_bias": {"999999": 1}}, "logit_bias must be made of token ids in [0, 49152), not 999999"),
        ({"min_tokens": 17}, "min_tokens must be at most max_tokens (16), not 17"),
        ({"bad_words": [""]}, "bad_words must hold words of 1 to 256 characters"),
        ({"structured_outputs": "{"}, "structured_outputs is not valid JSON"),
        ({"timeout": 0}, "timeout must be in (0, 86400]"),
        ({"n": 129}, "n must be in [1, 128], not 129"),
        ({"best_of": 2, "n": 3}, "best_of must be from n (3) to 128, not 2"),
        ({"logprobs": 21}, "logprobs must be in [0, 20], not 21"),
        ({"prompt_logprobs": -1}, "prompt_logprobs must be in [0, 20], not -1"),
        ({"no_such": 1}, "parameter 'no_such' is not available"),
        ({"max_tokens": 9000}, "together pass the model's context of 8192 tokens by 813"),
    ],
)
def test_a_bad_parameter_is_named(calm: Service, extra: dict[str, Any], message: str) -> None:
    inputs = [tensor("text_input", PROMPT, "BYTES"), tensor("sampling_parameters", json.dumps(extra), "BYTES")]
    (error,) = infer(calm, inputs)
    assert isinstance(error, InferenceServerException)
    assert message in error.message()


def test_streaming_with_the_input_is_refused(calm: Service) -> None:
    inputs = [
        tensor("text_input", PROMPT, "BYTES"),
        tensor("stream", True, "BOOL"),
        tensor("exclude_input_in_output", False, "BOOL"),
    ]
    (error,) = infer(calm, inputs)
    assert "exclude_input_in_output = False is not allowed" in error.message()


# ── several answers, log-probabilities ────────────────────────────────────────────────────────────────────────────

DRAWN = {"temperature": 1.0, "seed": 11, "max_tokens": 8}


@pytest.fixture(scope="module")
def drawn(service: Service) -> list[str]:
    """What a request alone draws by each of three seeds."""
    return [texts(infer(service, asking({**DRAWN, "seed": 11 + i})))[0] for i in range(3)]


def test_n_answers_are_an_element_each(calm: Service, drawn: list[str]) -> None:
    shown = ("return_finish_reason", "return_num_output_tokens", "return_num_input_tokens")
    (response,) = infer(calm, asking({**DRAWN, "n": 3}, *shown))
    assert strings(response, "text_output") == drawn
    assert len(set(drawn)) > 1
    assert strings(response, "finish_reason") == ["length"] * 3
    assert response.as_numpy("num_output_tokens").tolist() == [8] * 3
    assert response.as_numpy("num_input_tokens").tolist() == [5]


def test_n_answers_stream_side_by_side(calm: Service, drawn: list[str]) -> None:
    parameters = {**DRAWN, "n": 3, "logprobs": 1}
    shown = ("return_finish_reason", "return_cumulative_logprob", "return_logprobs")
    responses = infer(calm, asking(parameters, *shown, stream=True))
    columns = zip(*(strings(r, "text_output") for r in responses), strict=True)
    assert ["".join(column) for column in columns] == drawn
    assert strings(responses[-1], "finish_reason") == ["length"] * 3
    for i in range(3):
        reports = [report for r in responses for report in json.loads(strings(r, "logprobs")[i])]
        assert "".join(next(iter(report.values()))["decoded_token"] for report in reports) == drawn[i]
        total = sum(next(iter(report.values()))["logprob"] for report in reports)
        assert responses[-1].as_numpy("cumulative_logprob")[i] == pytest.approx(total, abs=1e-4)


def test_the_likeliest_of_many_is_shown(calm: Service, drawn: list[str]) -> None:
    alone = [infer(calm, asking({**DRAWN, "seed": 11 + i}, "return_cumulative_logprob")) for i in range(3)]
    sums = [float(r.as_numpy("cumulative_logprob")[0]) for (r,) in alone]
    (response,) = infer(calm, asking({**DRAWN, "best_of": 3}))
    assert strings(response, "text_output") == [drawn[sums.index(max(sums))]]


def test_logprobs_are_json(calm: Service) -> None:
    parameters = {**GREEDY, "logprobs": 3, "prompt_logprobs": 1}
    (response,) = infer(calm, asking(parameters, "return_logprobs"))
    (text,) = strings(response, "logprobs")
    reports = json.loads(text)
    assert len(reports) == 8
    for report in reports:
        own, *others = report.values()
        assert own["rank"] == 1
        assert [other["rank"] for other in others] == [2, 3]
        assert 0 > own["logprob"] >= others[0]["logprob"] >= others[1]["logprob"]
    (text,) = strings(response, "prompt_logprobs")
    first, *rest = json.loads(text)
    assert first is None
    assert [next(iter(report.values()))["decoded_token"] for report in rest] == [" capital", " of", " France", " is"]


def test_nothing_of_it_comes_unasked(calm: Service) -> None:
    (response,) = infer(calm, asking({**GREEDY, "logprobs": 3}))
    assert [output.name for output in response.get_response().outputs] == ["text_output"]


SAME: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 1.2, "seed": 3},
    "filters": {"temperature": 1.5, "seed": 3, "top_k": 50, "top_p": 0.9, "min_p": 0.02},
    "penalties": {"presence_penalty": 1, "frequency_penalty": 1.5, "repetition_penalty": 1.3, "max_tokens": 16},
    "bias": {"logit_bias": {"260": 100}},
    "list": {"allowed_token_ids": [260, 284, 2]},
    "bad words": {"bad_words": ["Paris"]},
    "length": {"min_tokens": 12, "max_tokens": 20, "ignore_eos": True},
    "stop strings": {"stop": ["is.", "s.\n"], "max_tokens": 20},
    "shown stop string": {"stop": ["Par"], "include_stop_str_in_output": True},
    "stop token": {"stop_token_ids": [30]},
    "shown stop token": {"stop_token_ids": [30], "include_stop_str_in_output": True},
    "control tokens": {"skip_special_tokens": False, "max_tokens": 40},
    "choice": {"structured_outputs": {"choice": ["<|im_end|>", "yes"]}},
    "regex": {"structured_outputs": {"regex": "[0-9]{3}"}},
    "schema": {"structured_outputs": {"json": {"enum": ["a", {"b": 1}]}}},
    "grammar": {"structured_outputs": {"grammar": 'start: "a" "b"+'}},
}


def test_a_parameter_means_what_it_means_over_http(calm: Service) -> None:
    """Whole and streamed."""

    def three_ways(fields: dict[str, Any]) -> list[str]:
        asked = {**GREEDY, **fields}
        status, answer = post(calm, **asked)
        assert status == 200, answer
        streamed = "".join(texts(infer(calm, asking(asked, stream=True))))
        return [answer["choices"][0]["text"], streamed, texts(infer(calm, asking(asked)))[0]]

    with ThreadPoolExecutor(len(SAME)) as pool:
        answers = dict(zip(SAME, pool.map(three_ways, SAME.values()), strict=True))
    assert {name: ways for name, ways in answers.items() if len(set(ways)) > 1} == {}
    assert answers["stop token"][0] + "." == answers["shown stop token"][0] == " Paris."


def test_a_request_that_bars_every_token_ends_by_name(calm: Service) -> None:
    """A 1 may come, but not after another: digits are tokens of their own."""
    one = Tokenizer.from_folder(store.models_dir() / store.DEFAULT_MODEL).encode("1", add_special_tokens=False)
    barring = {"allowed_token_ids": one, "bad_words": ["11"], "max_tokens": 8}
    first, error = infer(calm, asking(barring, stream=True))
    assert texts([first]) == ["1"]
    assert isinstance(error, InferenceServerException)
    assert "after 1 output tokens every token is barred by allowed_token_ids and bad_words" in error.message()
    assert texts(infer(calm, asking(GREEDY))) == [ANSWER]


def test_generate_and_generate_stream(calm: Service) -> None:
    body = {"text_input": PROMPT, **GREEDY}
    assert json.loads(calm.triton_post(MODEL, "generate", body))["text_output"] == PROMPT + ANSWER
    lines = calm.triton_post(MODEL, "generate_stream", {**body, "stream": True}).splitlines()
    pieces = [json.loads(line[6:])["text_output"] for line in lines if line.startswith(b"data: {")]
    assert "".join(pieces) == ANSWER


def test_generate_with_several_answers_and_logprobs(calm: Service) -> None:
    body = {"text_input": PROMPT, **GREEDY, "n": 2, "logprobs": 1, "exclude_input_in_output": True}
    shown = {"return_logprobs": True, "return_cumulative_logprob": True}
    whole = json.loads(calm.triton_post(MODEL, "generate", {**body, **shown}))
    assert whole["text_output"] == [ANSWER] * 2
    assert [len(json.loads(text)) for text in whole["logprobs"]] == [8, 8]
    assert whole["cumulative_logprob"][0] == pytest.approx(whole["cumulative_logprob"][1], abs=1e-3)
    lines = calm.triton_post(MODEL, "generate_stream", {**body, **shown, "stream": True}).splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
    assert ["".join(parts) for parts in zip(*(event["text_output"] for event in events), strict=True)] == [ANSWER] * 2
    assert events[-1]["cumulative_logprob"] == pytest.approx(whole["cumulative_logprob"], abs=1e-3)


def test_repository_control_needs_the_secret(calm: Service) -> None:
    client = grpcclient.InferenceServerClient(calm.instance.grpc_address)
    for call in (lambda: client.unload_model(MODEL), lambda: client.get_model_config(MODEL)):
        with pytest.raises(InferenceServerException, match="expecting header"):
            call()
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(
            urllib.request.Request(f"{calm.instance.http_url}/v2/repository/models/{MODEL}/unload", b"{}"), timeout=5
        )


def _frame_error(service: Service, raw: bytes) -> str:
    made = grpcclient.InferInput("session", [len(raw)], "UINT8")
    made.set_data_from_numpy(np.frombuffer(raw, dtype=np.uint8))
    (error,) = infer(service, [made])
    assert isinstance(error, InferenceServerException)
    return str(error.message())


def test_frames_that_are_not_ours_are_refused_and_the_stub_lives(calm: Service) -> None:
    stubs = calm.pids("python_backend_stub")
    assert "no frame of the session protocol" in _frame_error(calm, b"\xc1 not msgpack")
    assert "no frame of the session protocol" in _frame_error(calm, b"\x91" * 100_000)
    stranger = wire.encode(wire.Frame("0" * 32, "data", [wire.Close()]))
    assert "no such session is open" in _frame_error(calm, stranger)
    assert calm.pids("python_backend_stub") == stubs
    assert texts(infer(calm, [tensor("text_input", PROMPT, "BYTES")], temperature=0, max_tokens=8)) == [PROMPT + ANSWER]


@pytest.mark.parametrize(
    ("datatype", "shape", "raw"),
    [
        ("BYTES", [1], b"\xff\xff\xff\x7fabc"),
        ("BYTES", [1], b""),
        ("BYTES", [1], b"\x02\x00\x00\x00\xff\xfe"),
        ("BYTES", [2], b"\x01\x00\x00\x00a\x01\x00\x00\x00b"),
        ("BYTES", [2**62], b"\x01\x00\x00\x00a"),
        ("BYTES", [-1], b"\x01\x00\x00\x00a"),
        ("INT32", [1], b"\x01\x00\x00\x00"),
    ],
    ids=["length beyond the buffer", "empty", "not UTF-8", "two texts", "shape 2^62", "negative shape", "wrong type"],
)
def test_malformed_tensors_are_refused_and_the_stub_lives(
    calm: Service, datatype: str, shape: list[int], raw: bytes
) -> None:
    stubs = calm.pids("python_backend_stub")
    made = service_pb2.ModelInferRequest.InferInputTensor(name="text_input", datatype=datatype, shape=shape)
    request = service_pb2.ModelInferRequest(model_name=MODEL, inputs=[made], raw_input_contents=[raw])
    with grpc.insecure_channel(calm.instance.grpc_address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        answers = stub.ModelStreamInfer(iter([request]), timeout=10)
        assert [bool(answer.error_message) for answer in answers] == [True]
    assert calm.pids("python_backend_stub") == stubs
    assert calm.status("/health") == 200


def test_shared_memory_cannot_be_registered_without_the_secret(calm: Service) -> None:
    with grpc.insecure_channel(calm.instance.grpc_address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        request = service_pb2.SystemSharedMemoryRegisterRequest(name="a", key="/b", byte_size=8)
        with pytest.raises(grpc.RpcError, match="expecting header"):
            stub.SystemSharedMemoryRegister(request, timeout=5)
