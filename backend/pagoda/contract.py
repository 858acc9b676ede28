"""What Triton is told of every model: the tensors of a session and of the standard text contract, answers decoupled."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

Tensors = dict[str, tuple[str, list[int]]]
"""Name to type and dimensions, in Triton's words."""

INPUTS: Tensors = {
    "session": ("TYPE_UINT8", [-1]),
    "text_input": ("TYPE_STRING", [1]),
    "stream": ("TYPE_BOOL", [1]),
    "sampling_parameters": ("TYPE_STRING", [1]),
    "exclude_input_in_output": ("TYPE_BOOL", [1]),
    "return_finish_reason": ("TYPE_BOOL", [1]),
    "return_num_input_tokens": ("TYPE_BOOL", [1]),
    "return_num_output_tokens": ("TYPE_BOOL", [1]),
    "return_cumulative_logprob": ("TYPE_BOOL", [1]),
    "return_logprobs": ("TYPE_BOOL", [1]),
}
"""All optional."""
TEXT_OUTPUTS: Tensors = {
    "text_output": ("TYPE_STRING", [-1]),
    "finish_reason": ("TYPE_STRING", [-1]),
    "cumulative_logprob": ("TYPE_FP32", [-1]),
    "logprobs": ("TYPE_STRING", [-1]),
    "prompt_logprobs": ("TYPE_STRING", [1]),
    "num_input_tokens": ("TYPE_UINT32", [1]),
    "num_output_tokens": ("TYPE_UINT32", [-1]),
}
OUTPUTS: Tensors = {"session": ("TYPE_UINT8", [-1]), **TEXT_OUTPUTS}


def config_text(parameters: Mapping[str, str]) -> str:
    """A complete config.pbtxt. Without the tensors it says the same: the backend then adds them, which takes longer."""
    return "\n".join(_lines(parameters)) + "\n"


def _lines(parameters: Mapping[str, str]) -> Iterator[str]:
    yield 'backend: "pagoda"'
    yield "model_transaction_policy { decoupled: true }"
    for kind, tensors, rest in (("input", INPUTS, " optional: true"), ("output", OUTPUTS, "")):
        for name, (data_type, dims) in tensors.items():
            yield f'{kind} {{ name: "{name}" data_type: {data_type} dims: {dims}{rest} }}'
    for key, value in parameters.items():
        # JSON's strings are protobuf's.
        yield f"parameters {{ key: {json.dumps(key)} value: {{ string_value: {json.dumps(value)} }} }}"
