"""Every error Pagoda raises on purpose, as one tree.

PagodaError                 code                 HTTP  gRPC
├── InvalidRequest          invalid_request      400   INVALID_ARGUMENT   the caller's fault: field, value, remedy
├── ModelNotFound           model_not_found      404   NOT_FOUND
├── Overloaded              overloaded           503   UNAVAILABLE        try again later
├── EngineUnavailable       engine_unavailable   503   UNAVAILABLE        the engine is starting, restarting or gone
├── DeadlineExceeded        deadline_exceeded    504   UNAVAILABLE        Triton has no code of its own for it
├── EngineFailure           engine_failure       500   INTERNAL           our fault; the log has the details
├── ConfigError             bad_config           -     INVALID_ARGUMENT   a configuration cannot work
└── CheckpointError         bad_checkpoint       -     INVALID_ARGUMENT   a model folder cannot be read as it stands

Messages are for the person who reads them: what was given, what is allowed, what to do.
They never hold a path of the server's disk, a region's name or a stack when they go to a client.
"""

from __future__ import annotations

from typing import ClassVar


class PagodaError(Exception):
    """The root. `code` travels on the wire; `http_status` is what the frontend answers."""

    code: ClassVar[str] = "error"
    http_status: ClassVar[int] = 500

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InvalidRequest(PagodaError):
    """A request that can never be served as it stands."""

    code = "invalid_request"
    http_status = 400

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class ModelNotFound(PagodaError):
    code = "model_not_found"
    http_status = 404


class Overloaded(PagodaError):
    code = "overloaded"
    http_status = 503


class EngineUnavailable(PagodaError):
    code = "engine_unavailable"
    http_status = 503


class DeadlineExceeded(PagodaError):
    code = "deadline_exceeded"
    http_status = 504


class EngineFailure(PagodaError):
    code = "engine_failure"


class ConfigError(PagodaError):
    code = "bad_config"


class CheckpointError(PagodaError):
    code = "bad_checkpoint"


_BY_CODE: dict[str, type[PagodaError]] = {
    cls.code: cls
    for cls in (
        ModelNotFound,
        Overloaded,
        EngineUnavailable,
        DeadlineExceeded,
        EngineFailure,
        ConfigError,
        CheckpointError,
    )
}


def from_code(code: str, message: str, field: str | None = None) -> PagodaError:
    """The error that `code` names, as it arrived over a wire; an unknown code is our own failure."""
    if code == InvalidRequest.code:
        return InvalidRequest(message, field=field)
    return _BY_CODE.get(code, EngineFailure)(message)
