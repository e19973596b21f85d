"""What an exception of ONNX Runtime means.

ONNX Runtime reports through a handful of classes that share no base, and tells an exhausted allocator, a lost device
and a broken graph apart only in the text. The texts here are those of its sources: `bfc_arena.cc`, `cuda_call.cc`,
and CUDA's `cudaError_t`.
"""

from __future__ import annotations

import re

from service.errors import DeviceLostError, EngineError, OutOfMemoryError

# Errors after which CUDA says that the process has to be restarted (`driver_types.h`). ONNX Runtime writes the number,
# or after a kernel the name.
_STICKY = {
    214: "cudaErrorECCUncorrectable",
    220: "cudaErrorNvlinkUncorrectable",
    226: "cudaErrorContained",  # 721 before CUDA 13
    700: "cudaErrorIllegalAddress",
    702: "cudaErrorLaunchTimeout",
    709: "cudaErrorContextIsDestroyed",
    710: "cudaErrorAssert",
    714: "cudaErrorHardwareStackError",
    715: "cudaErrorIllegalInstruction",
    716: "cudaErrorMisalignedAddress",
    717: "cudaErrorInvalidAddressSpace",
    718: "cudaErrorInvalidPc",
    719: "cudaErrorLaunchFailure",
    721: "cudaErrorTensorMemoryLeak",
    810: "cudaErrorMpsClientTerminated",
    911: "cudaErrorExternalDevice",
    999: "cudaErrorUnknown",
}
_STICKY_CODES = {*map(str, _STICKY), *_STICKY.values()}
_CUDA_FAILURE = re.compile(r"CUDA (?:failure|error) (\d+|cudaError\w+)", re.IGNORECASE)
# CUDA's errors of a capture have numbers from 900 to 908; the rest is the session's.
_NO_CAPTURE = re.compile(r"CUDA (?:failure|error) (?:90[0-8]|cudaErrorStreamCapture\w*)|graph capture", re.IGNORECASE)
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
    "alloc_failed",  # CUBLAS_STATUS_ALLOC_FAILED, and CUDNN_STATUS_ALLOC_FAILED before cuDNN 9
    "allocation_failed",  # CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED
    "resource allocation failed",  # cublasGetStatusString
    "bad_alloc",
    "bad allocation",
    "outofmemory",
)
# Of a file that is opened: no memory, no descriptor in the system or in this process; and of Python's own.
_SHORT = re.compile(r"system error number (?:12|23|24)\b|too many open files|can't start new thread", re.IGNORECASE)
_MESSAGE_CHARS = 400


def translate(error: Exception) -> EngineError:
    """The engine error that stands for an exception raised while a batch ran.

    Returns:
        DeviceLostError if nothing more can run in this process, OutOfMemoryError if a smaller batch may pass, else
        EngineError. The message is the original's first part.
    """
    text = str(error) or type(error).__name__
    message = " ".join(text.split())[:_MESSAGE_CHARS]
    # A lost device can also be found by an allocation: what is worse is asked first.
    codes = _STICKY_CODES.intersection(_CUDA_FAILURE.findall(text))
    if codes or any(word in text.lower() for word in _STICKY_WORDS):
        return DeviceLostError(f"the device is lost until this process is restarted: {message}")
    if _of_memory(error):
        return OutOfMemoryError(f"the device's memory is exhausted: {message}")
    return EngineError(message)


def is_shortage(error: Exception) -> bool:
    """Whether an exception of loading says that memory, descriptors or threads are short, which may pass."""
    return _of_memory(error) or _SHORT.search(str(error)) is not None


def _of_memory(error: Exception) -> bool:
    lowered = str(error).lower()
    return isinstance(error, MemoryError) or any(word in lowered for word in _MEMORY_WORDS)


def no_capture(error: Exception) -> bool:
    """Whether an exception says that the kernels of a model cannot be captured into a CUDA graph."""
    return _NO_CAPTURE.search(str(error)) is not None
