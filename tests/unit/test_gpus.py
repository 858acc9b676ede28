"""GPUs are hidden from tritonserver and shown to the engines."""

from __future__ import annotations

import pytest
from pagoda import gpus

GIVEN = [{}, {"CUDA_VISIBLE_DEVICES": ""}, {"CUDA_VISIBLE_DEVICES": "3, 5"}]


@pytest.mark.parametrize("given", GIVEN)
def test_what_was_hidden_is_shown_as_it_was(given: dict[str, str]) -> None:
    environment = {"PATH": "/bin", **given}
    hidden = gpus.hidden(environment)
    assert hidden["CUDA_VISIBLE_DEVICES"] == ""
    assert gpus.shown(hidden) == environment
    assert gpus.shown(environment) == environment


@pytest.mark.parametrize(("given", "index", "visible"), [(GIVEN[0], 1, "1"), (GIVEN[2], 0, "3"), (GIVEN[2], 1, "5")])
def test_an_instance_counts_the_gpus_that_the_service_sees(given: dict[str, str], index: int, visible: str) -> None:
    for environment in (given, gpus.hidden(given)):
        assert gpus.shown(environment, index) == {"CUDA_VISIBLE_DEVICES": visible}
