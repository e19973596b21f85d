"""What an exception of ONNX Runtime means.

ONNX Runtime reports through a handful of classes that share no base, and tells an exhausted allocator, a lost device
and a broken graph apart only in the text. The texts here are those of its sources: `bfc_arena.cc`, `cuda_call.cc`,
and CUDA's `cudaError_t`.
"""

from __future__ import annotations

import re

from service.errors import DeviceLostError, EngineError, OutOfMemoryError

# Errors after which CUDA says that the context cannot be used any more: the process has to be restarted.
_STICKY = frozenset({
    214,  # cudaErrorECCUncorrectable
    220,  # cudaErrorNvlinkUncorrectable
    700,  # cudaErrorIllegalAddress
    702,  # cudaErrorLaunchTimeout
    709,  # cudaErrorContextIsDestroyed
    710,  # cudaErrorAssert
    714,  # cudaErrorHardwareStackError
    715,  # cudaErrorIllegalInstruction
    716,  # cudaErrorMisalignedAddress
    717,  # cudaErrorInvalidAddressSpace
    718,  # cudaErrorInvalidPc
    719,  # cudaErrorLaunchFailure
    721,  # cudaErrorContained
    999,  # cudaErrorUnknown
})  # fmt: skip
_CUDA_FAILURE = re.compile(r"CUDA(?: failure| error) (\d+)", re.IGNORECASE)
_STICKY_WORDS = (
    "illegal memory access",
    "unspecified launch failure",
    "device-side assert",
    "misaligned address",
    "illegal instruction was encountered",
    "uncorrectable ecc error",
    "the launch timed out",
    "fallen off the bus",
)
_MEMORY_WORDS = (
    "failed to allocate memory",  # BFCArena::AllocateRawInternal
    "out of memory",  # CUDA failure 2, and TensorRT
    "smaller than requested bytes",  # the arena's own limit, gpu_mem_limit
    "alloc_failed",  # CUBLAS_STATUS_ALLOC_FAILED, CUDNN_STATUS_ALLOC_FAILED
    "bad_alloc",
    "bad allocation",
    "outofmemory",
)
_MESSAGE_CHARS = 400


def translate(error: Exception) -> EngineError:
    """The engine error that stands for an exception raised while a batch ran.

    Returns:
        DeviceLostError if nothing more can run in this process, OutOfMemoryError if a smaller batch may pass, else
        EngineError. The message is the original's first part.
    """
    text = str(error) or type(error).__name__
    lowered = text.lower()
    message = " ".join(text.split())[:_MESSAGE_CHARS]
    # A lost device can also be found by an allocation: what is worse is asked first.
    if any(int(code) in _STICKY for code in _CUDA_FAILURE.findall(text)) or any(w in lowered for w in _STICKY_WORDS):
        return DeviceLostError(f"the device is lost until this process is restarted: {message}")
    if isinstance(error, MemoryError) or any(word in lowered for word in _MEMORY_WORDS):
        return OutOfMemoryError(f"the device's memory is exhausted: {message}")
    return EngineError(message)
