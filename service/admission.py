"""What may enter: bounds on the images and bytes in the house, refused at once when full.

Used on the event loop only, so it needs no lock. Knows no images, no gRPC and no ONNX.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from service.errors import DrainingError, OverloadedError

# A full house empties within a few batches; sooner than that a retry only adds load.
_RETRY_AFTER_MS = 100


class Admission:
    """Counts what was admitted and not yet answered.

    Args:
        max_images: bound on images.
        max_bytes: bound on bytes of encoded images.
    """

    def __init__(self, max_images: int, max_bytes: int) -> None:
        self.max_images = max_images
        self.max_bytes = max_bytes
        self.images = 0
        self.bytes = 0
        self._draining = False

    @contextmanager
    def admit(self, images: int, nbytes: int) -> Iterator[None]:
        """Holds a place for one request while it is worked on.

        Raises:
            DrainingError: the server is shutting down.
            OverloadedError: a bound would be exceeded; nothing was admitted.
        """
        if self._draining:
            raise DrainingError("the server is shutting down; try another replica", retry_after_ms=0)
        if self.images + images > self.max_images:
            raise OverloadedError(
                f"{self.images} images are pending and at most {self.max_images} may be", "images", _RETRY_AFTER_MS
            )
        if self.bytes + nbytes > self.max_bytes:
            raise OverloadedError(
                f"{self.bytes} bytes are pending and at most {self.max_bytes} may be", "bytes", _RETRY_AFTER_MS
            )
        self.images += images
        self.bytes += nbytes
        try:
            yield
        finally:
            self.images -= images
            self.bytes -= nbytes

    def drain(self) -> None:
        """From now on refuses everything new."""
        self._draining = True
