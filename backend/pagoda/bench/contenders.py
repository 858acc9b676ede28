"""Who is measured: the engine alone, the service through HTTP, and transformers. Each runs in a process of its own and
returns the seconds that a list of loads took."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from pagoda.bench.loads import Load


def engine_alone(folder: str, loads: list[Load]) -> float:
    """All requests at once to the engine's own loop, without a server."""
    from pagoda import config
    from pagoda.bench.alone import Alone

    return Alone(config.from_parameters({"model": folder}), Path(folder)).run(loads).seconds


def through_http(folder: str, loads: list[Load]) -> float:
    """All requests at once as streams of the official OpenAI client, against a service started for it."""
    with service(folder) as (url, name):
        asyncio.run(_drive(url, name, loads[:2]))  # connections and tokenizers are warm, as in a running service
        began = time.monotonic()
        asyncio.run(_drive(url, name, loads))
        return time.monotonic() - began


async def _drive(url: str, name: str, loads: list[Load]) -> None:
    import openai

    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=3600) as client:

        async def one(load: Load) -> int:
            stream = await client.completions.create(
                model=name,
                prompt=load.prompt_ids,
                max_tokens=load.num_output,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            )
            counted = 0
            async for chunk in stream:
                counted = chunk.usage.completion_tokens if chunk.usage else counted
            return counted

        counts = await asyncio.gather(*map(one, loads))
    wrong = [(load.num_output, count) for load, count in zip(loads, counts, strict=True) if load.num_output != count]
    if wrong:
        raise RuntimeError(f"{len(wrong)} answers have another length than asked for, the first: {wrong[0]}")


@contextlib.contextmanager
def service(folder: str, *arguments: str) -> Iterator[tuple[str, str]]:
    """A `pagoda serve` of its own on free ports: (URL, model name)."""
    with TemporaryDirectory(prefix="pagoda-bench-") as scratch:
        ports = [_free_port() for _ in range(3)]
        command = [
            str(Path(sys.prefix) / "bin" / "pagoda"), "serve", "--model", folder, "--run-folder", scratch,
            "--port", str(ports[0]), "--grpc-port", str(ports[1]), "--metrics-port", str(ports[2]), *arguments,
        ]  # fmt: skip
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            said = []
            for line in process.stdout:
                said.append(line)
                if "first token" in line:
                    break
            else:
                raise RuntimeError("the service did not start:\n" + "".join(said))
            yield f"http://127.0.0.1:{ports[0]}", Path(folder).name
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=20)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def transformers_alone(folder: str, loads: list[Load]) -> float:
    """`generate`, one request after the other."""
    return _transformers(folder, loads, batch_size=1)


def transformers_batches(folder: str, loads: list[Load]) -> float:
    """`generate` in static batches of 32: each runs until its longest answer is done."""
    return _transformers(folder, loads, batch_size=32)


def _transformers(folder: str, loads: list[Load], batch_size: int) -> float:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    began = time.monotonic()
    for start in range(0, len(loads), batch_size):
        batch = loads[start : start + batch_size]
        width, longest = max(len(b.prompt_ids) for b in batch), max(b.num_output for b in batch)
        ids = torch.tensor([[0] * (width - len(b.prompt_ids)) + b.prompt_ids for b in batch])
        mask = torch.tensor([[0] * (width - len(b.prompt_ids)) + [1] * len(b.prompt_ids) for b in batch])
        with torch.inference_mode():
            model.generate(  # type: ignore[misc]
                ids,
                attention_mask=mask,
                max_new_tokens=longest,
                min_new_tokens=longest,
                do_sample=False,
                pad_token_id=0,
            )
    return time.monotonic() - began
