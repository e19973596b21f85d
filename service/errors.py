"""What can go wrong, in the terms of the domain.

ConvoyError
├── InvalidRequestError         the caller asked for something that cannot be done
│   ├── TooManyImagesError      more than one request may have
│   └── UnusableImagesError     none of them can be used
├── InvalidImageError           one image cannot be used; `reason` says why
├── NotFoundError               no such model or version
├── UnavailableError            try again later; `retry_after_ms` says when
│   ├── OverloadedError         full, refused on arrival
│   ├── DrainingError           shutting down
│   └── ModelNotReadyError      known, but not able to answer now
├── ExpiredError                the deadline passed, or would have
├── ArtifactError               a model version on disk breaks the contract
│   └── OutOfReachError         it cannot be fetched now
├── ConfigurationError          settings, ports, paths: the operator has to act
│   └── ProviderError           an execution provider that was asked for is missing
├── EngineError                 the runtime failed while computing
│   ├── OutOfMemoryError        the device's allocator is exhausted
│   └── DeviceLostError         sticky: this process cannot use the device any more
├── DataError                   training data cannot be used
└── TrainingError               training cannot go on

Each message is one sentence or two for the person who has to act: what is wrong, and what to do. None of them knows
gRPC, HTTP or exit codes: `service.rpc.status` and `service.exits` map them.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence


class ConvoyError(Exception):
    """The root: everything Convoy raises on purpose."""


class InvalidRequestError(ConvoyError):
    """The request itself is wrong; sending it again will not help."""


class TooManyImagesError(InvalidRequestError):
    """A request has more images than one may have (`most`)."""

    def __init__(self, images: int, most: int) -> None:
        super().__init__(f"the request has {images} images, at most {most} are allowed; split it")
        self.most = most


class ImageFault(enum.Enum):
    """Why an image cannot be used. The names are those of the API's `ImageError.Reason`."""

    EMPTY = "empty"
    UNSUPPORTED_FORMAT = "unsupported_format"
    CORRUPT = "corrupt"
    TOO_LARGE = "too_large"
    NON_FINITE_OUTPUT = "non_finite_output"


class InvalidImageError(ConvoyError):
    """One image cannot be classified; its neighbours can.

    Attributes:
        reason: the kind of fault, for programs and metrics.
        image_format: format found in the header ("JPEG", "PNG" ...), or "unknown".
    """

    def __init__(self, reason: ImageFault, message: str, image_format: str = "unknown") -> None:
        super().__init__(message)
        self.reason = reason
        self.image_format = image_format


class UnusableImagesError(InvalidRequestError):
    """None of a request's images can be used; `faults` says of each why."""

    def __init__(self, message: str, faults: Sequence[InvalidImageError]) -> None:
        super().__init__(message)
        self.faults = tuple(faults)


class NotFoundError(ConvoyError):
    """No such model, or no such version of it."""


class UnavailableError(ConvoyError):
    """Not now. The same request may succeed later, or on another replica.

    Attributes:
        retry_after_ms: when trying again makes sense; None if unknown.
        reason: in one word, for metrics.
    """

    reason = "unavailable"

    def __init__(self, message: str, retry_after_ms: int | None = None) -> None:
        super().__init__(message)
        self.retry_after_ms = retry_after_ms


class OverloadedError(UnavailableError):
    """Refused because a bound is reached; `reason` names it."""

    def __init__(self, message: str, reason: str, retry_after_ms: int | None = None) -> None:
        super().__init__(message, retry_after_ms)
        self.reason = reason


class DrainingError(UnavailableError):
    """The server is shutting down; another replica may take the request at once."""

    reason = "draining"

    def __init__(self) -> None:
        super().__init__("the server is shutting down; try another replica", retry_after_ms=0)


class ModelNotReadyError(UnavailableError):
    """The model is known but cannot answer now."""

    reason = "not_ready"


class ExpiredError(ConvoyError):
    """The deadline passed before the work began, or would have passed before it ended."""


class ArtifactError(ConvoyError):
    """A model version on disk breaks the contract of `service.artifact`."""


class CanaryError(ArtifactError):
    """A model version that gives other answers than where it was exported.

    Attributes:
        difference: the largest one of a probability; NaN where an answer is not finite.
    """

    def __init__(self, message: str, difference: float) -> None:
        super().__init__(message)
        self.difference = difference


class OutOfReachError(ArtifactError):
    """A model version that cannot be fetched from where it lies; trying again may help."""


class ConfigurationError(ConvoyError):
    """Settings that cannot work; the message names the setting."""


class ProviderError(ConfigurationError):
    """An execution provider that was asked for is not available."""


class EngineError(ConvoyError):
    """The runtime failed while computing a batch."""


class OutOfMemoryError(EngineError):
    """The allocator of the device is exhausted; a smaller batch may pass."""


class DeviceLostError(EngineError):
    """A sticky device error: nothing more can run in this process."""


class DataError(ConvoyError):
    """Training data that cannot be used; the message names the path."""


class TrainingError(ConvoyError):
    """Training cannot go on; the message gives advice."""


# What loading a version may raise although neither its files nor the settings are at fault; later it may load.
PASSING = (OutOfReachError, OutOfMemoryError)
