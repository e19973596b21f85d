"""Memory stays with the process while it trains.

Each step allocates the same activations and gradients as the one before. Left alone, glibc asks the system for every
large one and gives it back at once, and the system clears its pages each time: a good part of a small network's step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from service.resources import Malloc, return_large_blocks, tell_malloc, trim_memory

_MMAP_MAX, _TOP_PAD_BYTES = 65_536, 128 << 10  # glibc's defaults
_NEVER = 2**31 - 1
_STEP_BYTES = 64 << 20


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """Within the block the C library keeps what is freed, where it can be told (glibc); at its end it gives it back.

    The peak stays about what it was: what is kept is what the next step needs.
    """
    tell_malloc({Malloc.MMAP_MAX: 0, Malloc.TRIM_THRESHOLD: _NEVER, Malloc.TOP_PAD: _STEP_BYTES})
    try:
        yield
    finally:
        tell_malloc({Malloc.MMAP_MAX: _MMAP_MAX, Malloc.TOP_PAD: _TOP_PAD_BYTES})
        return_large_blocks()
        trim_memory()
