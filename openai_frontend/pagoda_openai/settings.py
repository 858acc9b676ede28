"""The frontend's settings: JSON in $PAGODA_FRONTEND, written by `pagoda serve` or by hand."""

from __future__ import annotations

import os

import msgspec


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    triton_address: str = "127.0.0.1:8001"
    triton_secret: str | None = None
    """Opens Triton's restricted protocols, where it has them."""
    api_key: str | None = None
    """Asked for on every route but /health and /ready when set."""
    max_body_bytes: int = 4 << 20
    metrics_folder: str | None = None
    """Where the workers of one service share their HTTP counts (prometheus_client's multiprocess mode)."""
    drain_grace: float = 4.0
    """Seconds that requests in flight get at shutdown."""
    slow_client_timeout: float = 30.0
    """Seconds that one write to a client may take; then its request alone is ended."""


def from_environment() -> Settings:
    """Raises msgspec.ValidationError naming the wrong setting."""
    return msgspec.json.decode(os.environ.get("PAGODA_FRONTEND", "{}"), type=Settings)
