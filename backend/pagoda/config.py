"""What an engine is told, resolved once: `EngineConfig` from config.pbtxt parameters and 1/model.json.

Parameter names are vLLM's flags where the meaning is the same. The object is frozen; derived values are properties.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from pagoda.errors import ConfigError

Positive = Annotated[int, Meta(ge=1)]

REFUSED = {
    "trust_remote_code": "code from a model folder is never run; known architectures are built in",
}
"""Parameters other engines have and this one refuses, each with its explanation."""


class EngineConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One model's engine. Units: tokens, requests, blocks, seconds, GiB as the names say."""

    model: str
    """A Hugging Face folder: absolute, relative to the model's version folder, or a name in the model store."""
    served_model_name: str = ""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto` is float32 on a CPU and the checkpoint's own on a GPU."""
    load_format: Literal["auto", "safetensors", "dummy"] = "auto"
    """`dummy` makes up random weights, so that config.json is enough; `auto` is safetensors."""
    quantization: Literal["auto", "fp8"] = "auto"
    """`auto` is as the checkpoint is; `fp8` turns a plain checkpoint's matrices into 8-bit floats as it is loaded."""
    tensor_parallel_size: Positive = 1
    max_num_seqs: Positive = 256
    """Most requests in one step."""
    max_num_batched_tokens: Positive | None = None
    """Token budget of one step; by default 256 on a CPU (a step must stay short) and 8192 on a GPU."""
    max_num_mixed_tokens: Positive | None = None
    """The same where a step's prompts share it with streams, which go on the more evenly the less it is; by default
    2048 on a GPU, and never more than the other."""
    max_model_len: Positive | None = None
    """Most tokens of one request, prompt and output together; by default what the checkpoint was trained for."""
    max_num_queued_requests: Positive = 4096
    """Most requests waiting for their first step; beyond it a request is refused at once."""
    max_num_queued_tokens: Positive = 1 << 20
    """Most prompt tokens waiting; a single request is never too long for an empty queue."""
    block_size: Annotated[int, Meta(ge=8, le=256)] = 16
    num_kv_blocks: Positive | None = None
    """Size of the KV cache in blocks; by default what the memory below holds."""
    kv_cache_gib: Annotated[float, Meta(gt=0)] | None = None
    """Memory of the KV cache; by default 2 on a CPU, and on a GPU what the engine's share leaves."""
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    """`auto` is the model's own; `fp8` holds twice (float32: four times) as many tokens, and loses some precision."""
    gpu_memory_utilization: Annotated[float, Meta(gt=0, le=1)] = 0.9
    """The engine's share of the GPU's memory, everything counted; several engines share a GPU by their shares."""
    enforce_eager: bool = False
    """Run without CUDA graphs: a faster start and slower steps."""
    enable_prefix_caching: bool = True
    batch_invariant: bool = False
    """A request's tokens have the same bits whatever runs beside it; slower, and on a CPU in float32 only."""
    load_timeout: Annotated[float, Meta(gt=0)] = 600.0
    num_threads: Positive | None = None
    """Threads of the CPU's matrix products; by default one a core."""

    def __post_init__(self) -> None:
        if self.block_size & (self.block_size - 1):
            raise ValueError(f"block_size must be a power of two, not {self.block_size}")
        if self.tensor_parallel_size != 1:
            raise ValueError(f"tensor_parallel_size {self.tensor_parallel_size} is not available yet: set it to 1")


class EngineStart(msgspec.Struct, frozen=True):
    """What an engine process is told by its parent."""

    config: EngineConfig
    folder: str
    """The model's folder, resolved."""
    address: str
    """Where to bind the engine's socket."""
    lock: str
    """A file that only one living engine of this model may hold."""
    epoch: int
    """Number of this start of the engine."""


def from_parameters(parameters: Mapping[str, Any]) -> EngineConfig:
    """Build the configuration from loosely typed parameters (config.pbtxt holds only strings).

    Raises ConfigError that names the parameter, its value and what is allowed.
    """
    for name, why in REFUSED.items():
        if str(parameters.get(name, "false")).lower() not in ("false", "0", ""):
            raise ConfigError(f"parameter {name}={parameters[name]!r} is refused: {why}. Remove it.")
    given = {k: v for k, v in parameters.items() if k not in REFUSED}
    unknown = sorted(set(given) - set(EngineConfig.__struct_fields__))
    if unknown:
        known = ", ".join(EngineConfig.__struct_fields__)
        raise ConfigError(f"unknown parameter {unknown[0]!r}. Known ones: {known}.")
    try:
        return msgspec.convert(given, EngineConfig, strict=False)
    except msgspec.ValidationError as error:
        name = str(error).rpartition("$.")[2].strip("`")
        given_text = f" (given: {given[name]!r})" if name in given else ""
        raise ConfigError(f"bad model parameter: {error}{given_text}. Change it in config.pbtxt.") from None


def runtime_dir() -> str:
    """Folder for sockets and locks, private to this user: $PAGODA_RUNTIME_DIR or /tmp/pagoda-<uid>.

    Short on purpose: a Unix socket's path may hold 107 bytes.
    """
    path = os.environ.get("PAGODA_RUNTIME_DIR") or f"/tmp/pagoda-{os.getuid()}"
    os.makedirs(path, mode=0o700, exist_ok=True)
    if os.stat(path).st_uid != os.getuid():
        raise ConfigError(f"the run-time folder {path} belongs to another user; set PAGODA_RUNTIME_DIR to one of yours")
    return path
