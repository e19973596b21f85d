"""The one table from domain errors to gRPC status codes."""

from __future__ import annotations

import grpc
from convoy.v1 import image_classifier_pb2 as pb
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

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
    TooManyImagesError,
    UnavailableError,
    UnusableImagesError,
)
from service.rpc.describe import NAMED_FAULTS, fault

_MAX_TEXT = 4000
_DETAILS = "grpc-status-details-bin"

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


def details_of(error: Exception, text: str) -> tuple[tuple[str, bytes], ...]:
    """Why, for programs: trailing metadata of gRPC's richer error model. `text`: the status's own, as clients check."""
    if isinstance(error, UnusableImagesError):
        detail: Message = pb.ImageErrors(errors=map(fault, error.faults[:NAMED_FAULTS]))
    elif isinstance(error, TooManyImagesError):
        detail = ErrorInfo(reason="TOO_MANY_IMAGES", domain="convoy.v1", metadata={"max_images": str(error.most)})
    else:
        return ()
    status = Status(code=code_of(error).value[0], message=text)
    status.details.add().Pack(detail)
    return ((_DETAILS, status.SerializeToString()),)


def retry_pushback(error: Exception) -> tuple[tuple[str, str], ...]:
    """Trailing metadata that tells gRPC's retry logic when to try again."""
    if isinstance(error, UnavailableError) and error.retry_after_ms is not None:
        return (("grpc-retry-pushback-ms", str(error.retry_after_ms)),)
    return ()
