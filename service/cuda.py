"""What has to be asked of NVIDIA's libraries directly: which GPUs there are, which TensorRT, and page-locked memory.

Through `ctypes`, so that a machine without them pays nothing and needs no package. Sources: CUDA driver API
(`cuInit`, `cuDeviceGetCount`, `cuDeviceGetName`, `cuDeviceGetAttribute`), CUDA runtime API (`cudaSetDevice`,
`cudaHostRegister`, `cudaGetLastError`), TensorRT (`getInferLibVersion`).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_DRIVER = "libcuda.so.1"
_RUNTIMES = ("libcudart.so.13", "libcudart.so.12")
# ONNX Runtime's provider is linked to both.
_TENSORRT, _TENSORRT_PARSER = "libnvinfer.so.10", "libnvonnxparser.so.10"

_SUCCESS = 0
_NAME_BYTES = 256
_COMPUTE_CAPABILITY_MAJOR = 75  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
_COMPUTE_CAPABILITY_MINOR = 76
_HOST_REGISTER_PORTABLE = 1

# Loads a shared library by name; raises OSError. The seam that tests replace.
Load = Callable[[str], Any]


@dataclass(frozen=True)
class Gpu:
    """One GPU this process may use; CUDA_VISIBLE_DEVICES is honoured by the driver."""

    index: int
    name: str
    compute_capability: str


def devices(load: Load = ctypes.CDLL) -> tuple[Gpu, ...]:
    """The GPUs that the driver shows to this process; none without a driver, or if it fails."""
    try:
        driver = load(_DRIVER)
    except OSError:
        return ()
    count = ctypes.c_int(0)
    if driver.cuInit(0) != _SUCCESS or driver.cuDeviceGetCount(ctypes.pointer(count)) != _SUCCESS:
        return ()
    return tuple(_describe(driver, index) for index in range(count.value))


def tensorrt_version(load: Load = ctypes.CDLL) -> str:
    """Version of the TensorRT library that ONNX Runtime would load, such as "10.13.3"; empty if there is none."""
    try:
        load(_TENSORRT_PARSER)
        number = int(load(_TENSORRT).getInferLibVersion())
    except (OSError, AttributeError):
        return ""
    # Since TensorRT 10: 10000 * major + 100 * minor + patch.
    return f"{number // 10_000}.{number // 100 % 100}.{number % 100}"


def select(gpu: int, load: Load = ctypes.CDLL) -> bool:
    """Makes a GPU the one that the calling thread talks to.

    ONNX Runtime's TensorRT provider runs on whichever that is, and fails if it is not the one it was made for.

    Returns:
        Whether it worked. If not, what runs next says why.
    """
    for name in _RUNTIMES:
        with contextlib.suppress(OSError):
            runtime = load(name)
            return _worked(runtime, runtime.cudaSetDevice(gpu))
    return False


def pages(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Zeros uint8 on memory pages of their own: pages that are shared with other data may not be locked twice."""
    size = math.prod(shape)
    return np.frombuffer(mmap.mmap(-1, size), np.uint8, size).reshape(shape)


def page_lock(array: NDArray[np.uint8], load: Load = ctypes.CDLL) -> bool:
    """Pins the pages of an array, so that copies to the GPU run at full speed, without a staging buffer between.

    Returns:
        Whether it worked. If not, copies are slower and everything else is the same.
    """
    for name in _RUNTIMES:
        with contextlib.suppress(OSError):
            runtime = load(name)
            pointer, size = ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)
            return _worked(runtime, runtime.cudaHostRegister(pointer, size, _HOST_REGISTER_PORTABLE))
    return False


def page_unlock(array: NDArray[np.uint8], load: Load = ctypes.CDLL) -> None:
    """Undoes `page_lock`."""
    for name in _RUNTIMES:
        with contextlib.suppress(OSError):
            runtime = load(name)
            _worked(runtime, runtime.cudaHostUnregister(ctypes.c_void_p(array.ctypes.data)))
            return


@functools.cache
def visible() -> tuple[Gpu, ...]:
    """`devices` of this process, asked once."""
    return devices()


def _worked(runtime: Any, status: int) -> bool:
    """Whether a call did. If not, its error is forgotten, or the thread's next kernel would be blamed for it."""
    if status != _SUCCESS:
        runtime.cudaGetLastError()
    return status == _SUCCESS


def _describe(driver: Any, index: int) -> Gpu:
    handle, name = ctypes.c_int(0), ctypes.create_string_buffer(_NAME_BYTES)
    driver.cuDeviceGet(ctypes.pointer(handle), index)
    driver.cuDeviceGetName(name, _NAME_BYTES, handle)
    capability = []
    for attribute in (_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR):
        value = ctypes.c_int(0)
        driver.cuDeviceGetAttribute(ctypes.pointer(value), attribute, handle)
        capability.append(str(value.value))
    return Gpu(index, name.value.decode(errors="replace"), ".".join(capability))
