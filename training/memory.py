"""Memory while a model trains: it stays with the process, and where it is too little that is said with what helps.

Each step allocates the same activations and gradients as the one before. Left alone, glibc asks the system for every
large one and gives it back at once, and the system clears its pages each time: a good part of a small network's step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from service.errors import TrainingError
from service.resources import Malloc, return_large_blocks, tell_malloc, trim_memory

_MMAP_MAX, _TOP_PAD_BYTES = 65_536, 128 << 10  # glibc's defaults
_NEVER = 2**31 - 1
_STEP_BYTES = 64 << 20
_NO_MEMORY = "can't allocate memory"  # of PyTorch's allocator for the CPU, which has no error of its own


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


@contextlib.contextmanager
def shortage_told(images_at_once: int) -> Iterator[None]:
    """Says what helps if memory runs out within the block, the machine's or a GPU's.

    Args:
        images_at_once: that a step computes.

    Raises:
        TrainingError: in place of the runtime's error.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and _NO_MEMORY not in str(error):
            raise
        where = "GPU" if isinstance(error, torch.OutOfMemoryError) else "machine"
        raise TrainingError(
            f"the {where}'s memory is too small for {images_at_once} images at once: --accumulate 2 or more computes a "
            "batch in as many pieces and learns the same, but for BatchNorm; --batch-size and --image-size cost less "
            f"if they are smaller ({str(error).splitlines()[0] if str(error) else 'no more memory'})"
        ) from error
