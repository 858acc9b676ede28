"""Triton's side of Pagoda: the only file that knows `triton_python_backend_utils`. It forwards, and imports no torch.

Two contracts arrive at `execute`: a `session` tensor (frames of pagoda.protocol) and standard text inputs.
`execute` runs on Triton's thread; every later call of a response sender or a metric is the host thread's.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from pagoda import config, logs
from pagoda.contract import INPUTS, OUTPUTS, TEXT_OUTPUTS
from pagoda.errors import ConfigError, InvalidRequest, PagodaError
from pagoda.host import Host
from pagoda.metrics_export import MetricsExport
from pagoda.server import store
from pagoda.text.wire import TextReply, TextRequest

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
GRPC_CODES = {
    "invalid_request": "INVALID_ARG",
    "bad_config": "INVALID_ARG",
    "model_not_found": "NOT_FOUND",
    "overloaded": "UNAVAILABLE",
    "engine_unavailable": "UNAVAILABLE",
    "deadline_exceeded": "UNAVAILABLE",
    "cancelled": "CANCELLED",
}

log = logging.getLogger("pagoda.model")


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(auto_complete_model_config):
        """Both contracts are in every model's configuration; a config.pbtxt needs only parameters."""
        if batch := auto_complete_model_config.as_dict()["max_batch_size"]:
            raise pb_utils.TritonModelException(
                f"max_batch_size {batch}: the engine batches by itself, by max_num_seqs; leave max_batch_size out"
            )
        for name, (data_type, dims) in INPUTS.items():
            auto_complete_model_config.add_input({"name": name, "data_type": data_type, "dims": dims, "optional": True})
        for name, (data_type, dims) in OUTPUTS.items():
            auto_complete_model_config.add_output({"name": name, "data_type": data_type, "dims": dims})
        auto_complete_model_config.set_max_batch_size(0)
        auto_complete_model_config.set_model_transaction_policy({"decoupled": True})
        return auto_complete_model_config

    def initialize(self, args):
        logs.configure()
        try:
            self._host = make_host(args)
            self._host.launch()
        except PagodaError as error:
            raise pb_utils.TritonModelException(error.message) from None
        self._host.start()
        self._text_ids = itertools.count(1)

    def execute(self, requests):
        for request in requests:
            try:
                self._accept(request)
            except PagodaError as error:
                request.get_response_sender().send(error_response(error.code, error.message), flags=FINAL)
            except Exception:
                log.exception("a request could not be taken in")
                text = "the request could not be taken in; the server's log has the details"
                request.get_response_sender().send(error_response("engine_failure", text), flags=FINAL)

    def _accept(self, request):
        frame = tensor_of(request, "session")
        if frame is None:
            self._host.submit_text(text_request(request, next(self._text_ids)), TritonTextSender(request))
            return
        opened = []

        def open_session():
            opened.append(TritonSessionSender(request))
            return opened[0]

        self._host.forward(frame.tobytes(), open_session)
        if not opened:
            request.get_response_sender().send(flags=FINAL)

    def finalize(self):
        self._host.stop()


class TritonSessionSender:
    """Sends a session's payloads as UINT8 tensors."""

    def __init__(self, request):
        self._sender = request.get_response_sender()

    def send(self, payload, *, final):
        tensor = pb_utils.Tensor("session", np.frombuffer(payload, dtype=np.uint8))
        self._sender.send(pb_utils.InferenceResponse([tensor]), flags=FINAL if final else 0)

    def is_cancelled(self):
        return self._sender.is_cancelled()


class TritonTextSender:
    """Sends the standard text outputs, those that were asked for; FINAL rides the last data response."""

    def __init__(self, request):
        self._sender = request.get_response_sender()

    def send(self, reply: TextReply):
        flags = FINAL if reply.final else 0
        if reply.error_code is not None:
            self._sender.send(error_response(reply.error_code, reply.error_message), flags=flags)
            return
        asked = [(name, getattr(reply, name)) for name in TEXT_OUTPUTS]
        tensors = [text_output(name, values) for name, values in asked if values is not None]
        self._sender.send(pb_utils.InferenceResponse(tensors), flags=flags)

    def is_cancelled(self):
        return self._sender.is_cancelled()


def make_host(args) -> Host:
    """Raises ConfigError for anything in the model's configuration that cannot work."""
    model_config = json.loads(args["model_config"])
    check_instances(model_config.get("instance_group", []))
    version_folder = Path(args["model_repository"]) / args["model_version"]
    parameters = {name: entry["string_value"] for name, entry in model_config.get("parameters", {}).items()}
    model_json = version_folder / "model.json"
    if model_json.exists():
        parameters = {**json.loads(model_json.read_text("utf-8")), **parameters}
    parameters.setdefault("served_model_name", args["model_name"])
    engine_config = config.from_parameters(parameters)
    folder = store.prepared(store.resolve(engine_config.model, relative_to=version_folder))
    directory = Path(config.runtime_dir()) / f"server-{os.getppid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    metrics = MetricsExport(pb_utils, args["model_name"], args["model_version"])
    gpu = int(args["model_instance_device_id"]) if args["model_instance_kind"] == "GPU" else None
    return Host(engine_config, folder, directory, metrics, gpu)


def check_instances(groups) -> None:
    """Raises ConfigError for more than one. Triton makes one for each GPU that it sees, unless it is told otherwise."""
    count = sum(int(group.get("count", 1)) * max(1, len(group.get("gpus", []))) for group in groups)
    if count > 1:
        raise ConfigError(
            f"instance_group asks for {count} instances, and one engine serves all requests of a model: "
            "write instance_group [{ count: 1 kind: KIND_MODEL }], or name one GPU"
        )


def tensor_of(request, name):
    """An input as a numpy array, or None. Raises InvalidRequest for a tensor that cannot be read."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return None
    try:
        return tensor.as_numpy()
    except Exception:
        raise InvalidRequest(f"input {name} is malformed: its bytes do not fit its shape", field=name) from None


def scalar_of(request, name, default=None):
    """The one element of an input, or `default` when it is absent. Raises InvalidRequest for another shape."""
    array = tensor_of(request, name)
    if array is None:
        return default
    if array.size != 1:
        raise InvalidRequest(f"input {name} must hold one element, not {array.size}", field=name)
    value = array.reshape(-1)[0]
    if not isinstance(value, bytes):
        return bool(value)
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidRequest(f"input {name} must be UTF-8 text", field=name) from None


def text_request(request, request_id: int) -> TextRequest:
    """Read the standard text inputs. Raises InvalidRequest naming the input."""
    text = scalar_of(request, "text_input")
    if text is None:
        raise InvalidRequest("input text_input is required", field="text_input")
    return TextRequest(
        id=request_id,
        text=text,
        stream=scalar_of(request, "stream", False),
        parameters=json.loads(request.parameters() or "{}"),
        parameters_json=scalar_of(request, "sampling_parameters", ""),
        exclude_input=scalar_of(request, "exclude_input_in_output"),
        return_finish_reason=scalar_of(request, "return_finish_reason", False),
        return_num_input_tokens=scalar_of(request, "return_num_input_tokens", False),
        return_num_output_tokens=scalar_of(request, "return_num_output_tokens", False),
        return_cumulative_logprob=scalar_of(request, "return_cumulative_logprob", False),
        return_logprobs=scalar_of(request, "return_logprobs", False),
    )


def text_output(name, values):
    """A text output's tensor: one element for each answer."""
    data_type, _ = TEXT_OUTPUTS[name]
    if data_type == "TYPE_STRING":
        return pb_utils.Tensor(name, np.array([value.encode("utf-8") for value in values], dtype=np.object_))
    return pb_utils.Tensor(name, np.array(values, dtype=np.float32 if data_type == "TYPE_FP32" else np.uint32))


def error_response(code, message):
    kinds = pb_utils.TritonError  # the stub adds it to the module after this file is imported
    return pb_utils.InferenceResponse(error=kinds(message, getattr(kinds, GRPC_CODES.get(code, "INTERNAL"))))
