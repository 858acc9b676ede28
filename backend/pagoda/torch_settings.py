"""What torch must be told before it is imported."""

from __future__ import annotations

import os

from pagoda.child import SPIN_COUNT


def apply() -> None:
    """Set what the environment does not say yet.

    A GPU's allocator grows and shrinks its segments in place: steps of ever different sizes otherwise leave gaps, which
    add up to half a GiB beside the largest step, memory that a measured share has no room for.
    """
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
