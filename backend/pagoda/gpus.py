"""Which GPUs a process of the service sees.

tritonserver sees none where no model needs it to. It would make a context on each GPU, which takes its start some time
and each GPU half a gigabyte, and an instance of each model for each GPU, where a Pagoda model has one engine. The
engines see what `pagoda serve` saw, or the one that their instance names.
"""

from __future__ import annotations

from collections.abc import Mapping

VISIBLE = "CUDA_VISIBLE_DEVICES"
_HIDDEN = "PAGODA_HIDDEN_DEVICES"
_ALL = "all"


def hidden(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without GPUs, from which `shown` makes one with them."""
    return {**environment, VISIBLE: "", _HIDDEN: environment.get(VISIBLE, _ALL)}


def shown(environment: Mapping[str, str], only: int | None = None) -> dict[str, str]:
    """The environment with the GPUs that `hidden` took from it; with `only`, just that one of them, counted from 0."""
    given = dict(environment)
    if (devices := given.pop(_HIDDEN, None)) is not None:
        given[VISIBLE] = devices
        if devices == _ALL:
            del given[VISIBLE]
    if only is not None:
        given[VISIBLE] = given[VISIBLE].split(",")[only].strip() if VISIBLE in given else str(only)
    return given
