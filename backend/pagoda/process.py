"""The engine process: `python -m pagoda.process`, a child of the Triton stub.

Its first line on standard input is an `EngineStart` in JSON; then standard input stays open, and its end means that
the parent is gone: the process ends at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from pagoda import logs, torch_settings, warm_up
from pagoda.allocation import BlockAllocator
from pagoda.block_pool import BlockPool
from pagoda.child import die_with_parent, leave
from pagoda.config import EngineConfig, EngineStart
from pagoda.errors import ConfigError, PagodaError
from pagoda.protocol import ModelFacts
from pagoda.sessions import Sessions

log = logging.getLogger("pagoda.process")


def main() -> None:
    logs.configure()
    start = msgspec.json.decode(sys.stdin.buffer.readline(), type=EngineStart)
    die_with_parent()
    torch_settings.apply()
    warm_up.begin(start.config.device)
    sessions = Sessions(start.address)
    sessions.start()
    reason, status = "the engine was stopped", 0
    try:
        with exclusive(start.lock, start.config):
            _serve(start, sessions)
    except PagodaError as error:
        log.error("engine ends: %s", error.message)
        reason, status = error.message, 2
    except Exception:
        log.exception("engine ends by an unexpected error")
        reason, status = "the engine failed unexpectedly; its log has the details", 1
    sessions.stop(reason)
    leave(reason, status)


def _serve(start: EngineStart, sessions: Sessions) -> None:
    from pagoda import hf_config
    from pagoda.engine import Engine
    from pagoda.runner import Runner
    from pagoda.scheduler import Scheduler

    began = time.monotonic()
    config, folder = start.config, Path(start.folder)
    model = hf_config.load(folder)
    max_model_len = resolve_max_model_len(config, model.max_position_embeddings)
    runner = Runner(config, model, folder, max_model_len)
    scheduler = Scheduler(
        BlockAllocator(
            BlockPool(runner.num_blocks),
            block_size=config.block_size,
            enable_prefix_caching=config.enable_prefix_caching,
        ),
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=runner.max_num_batched_tokens,
        max_num_mixed_tokens=runner.max_num_mixed_tokens,
        max_num_queued_requests=config.max_num_queued_requests,
        max_num_queued_tokens=config.max_num_queued_tokens,
    )
    engine = Engine(scheduler, runner, sessions.emit)
    facts = ModelFacts(
        name=config.served_model_name,
        folder=start.folder,
        max_model_len=max_model_len,
        vocab_size=model.vocab_size,
        eos_token_ids=model.eos_token_ids,
        default_params=model.default_params,
    )
    sessions.serve(engine.inbox, engine.pulse, facts, start.epoch)
    log.info(
        "ready in %.1f s: %s, %s, %d blocks of %d tokens",
        time.monotonic() - began,
        runner.device,
        runner.dtype,
        runner.num_blocks,
        config.block_size,
    )
    gc.freeze()  # or the collector looks through all of this now and then, 0.1 s, while streams wait
    engine.run()


def resolve_max_model_len(config: EngineConfig, trained: int) -> int:
    """Raises ConfigError when more is asked for than the checkpoint was trained for."""
    if config.max_model_len is not None and config.max_model_len > trained:
        raise ConfigError(
            f"max_model_len {config.max_model_len} is beyond the {trained} tokens of the checkpoint: lower it"
        )
    return config.max_model_len or trained


@contextlib.contextmanager
def exclusive(lock: str, config: EngineConfig) -> Iterator[None]:
    """Hold this model's lock for life: a load that begins while the last engine still leaves waits for it here.

    Raises ConfigError when the other engine does not leave within the load time-out.
    """
    with open(lock, "w") as file:
        deadline = time.monotonic() + config.load_timeout
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"another engine still serves {config.served_model_name!r} after {config.load_timeout:.0f} s: "
                        "unload it first, or raise load_timeout"
                    ) from None
                time.sleep(0.05)
        yield


if __name__ == "__main__":
    main()
