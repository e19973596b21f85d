"""The one table from domain errors to gRPC status codes."""

from __future__ import annotations

import grpc

from service.errors import (
    ArtifactError,
    ConfigurationError,
    ConvoyError,
    DeviceLostError,
    EngineError,
    ExpiredError,
    InvalidImageError,
    InvalidRequestError,
    NotFoundError,
    OutOfMemoryError,
    UnavailableError,
)

_MAX_TEXT = 4000

# The first row whose class matches decides; everything else is INTERNAL.
_TABLE: tuple[tuple[type[ConvoyError], grpc.StatusCode], ...] = (
    (InvalidRequestError, grpc.StatusCode.INVALID_ARGUMENT),
    (InvalidImageError, grpc.StatusCode.INVALID_ARGUMENT),
    (NotFoundError, grpc.StatusCode.NOT_FOUND),
    (UnavailableError, grpc.StatusCode.UNAVAILABLE),
    (OutOfMemoryError, grpc.StatusCode.UNAVAILABLE),
    (ExpiredError, grpc.StatusCode.DEADLINE_EXCEEDED),
    (ArtifactError, grpc.StatusCode.FAILED_PRECONDITION),
    (ConfigurationError, grpc.StatusCode.FAILED_PRECONDITION),
    (DeviceLostError, grpc.StatusCode.UNAVAILABLE),
    (EngineError, grpc.StatusCode.INTERNAL),
)


def code_of(error: Exception) -> grpc.StatusCode:
    """Status code that a client gets for an error."""
    for kind, code in _TABLE:
        if isinstance(error, kind):
            return code
    return grpc.StatusCode.INTERNAL


def message_of(error: Exception, request_id: str) -> str:
    """Text that a client gets: the domain's own sentence, or for a fault of the server only where to look it up."""
    if code_of(error) is grpc.StatusCode.INTERNAL:
        return f"internal error; the server's log has it under request id {request_id}"
    if isinstance(error, EngineError):  # the runtime's own words name files and addresses
        return f"the server cannot compute this now; its log has the cause under request id {request_id}"
    return shortened(str(error))


def shortened(text: str) -> str:
    """A text that fits into the trailers: clients refuse more than 8 KB of them, and then see another status."""
    limit = _MAX_TEXT if text.isascii() else _MAX_TEXT // 9  # percent-encoded, a character may take nine bytes
    return text if len(text) <= limit else f"{text[:limit]} ..."


def retry_pushback(error: Exception) -> tuple[tuple[str, str], ...]:
    """Trailing metadata that tells gRPC's retry logic when to try again."""
    if isinstance(error, UnavailableError) and error.retry_after_ms is not None:
        return (("grpc-retry-pushback-ms", str(error.retry_after_ms)),)
    return ()
