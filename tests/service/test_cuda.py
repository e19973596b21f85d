"""What is asked of NVIDIA's libraries, with libraries that only exist here."""

import numpy as np
import pytest

from service import cuda
from service.cuda import Gpu


class Driver:
    """libcuda with these GPUs: (name, major, minor)."""

    def __init__(self, *gpus, status=0):
        self.gpus = gpus
        self.status = status

    def cuInit(self, flags):  # noqa: N802  # the driver's name
        return self.status

    def cuDeviceGetCount(self, count):  # noqa: N802
        count.contents.value = len(self.gpus)
        return 0

    def cuDeviceGet(self, handle, index):  # noqa: N802
        handle.contents.value = index
        return 0

    def cuDeviceGetName(self, name, size, handle):  # noqa: N802
        name.value = self.gpus[handle.value][0].encode()
        return 0

    def cuDeviceGetAttribute(self, value, attribute, handle):  # noqa: N802
        value.contents.value = self.gpus[handle.value][{75: 1, 76: 2}[attribute]]
        return 0


class Runtime:
    """libcudart that records what is pinned."""

    def __init__(self, status=0):
        self.pinned = {}
        self.status = status
        self.forgotten = 0

    def cudaSetDevice(self, gpu):  # noqa: N802
        self.selected = gpu
        return self.status

    def cudaHostRegister(self, pointer, size, flags):  # noqa: N802
        self.pinned[pointer.value] = (size.value, flags)
        return self.status

    def cudaHostUnregister(self, pointer):  # noqa: N802
        del self.pinned[pointer.value]
        return 0

    def cudaGetLastError(self):  # noqa: N802
        self.forgotten += 1
        return self.status


class TensorRt:
    def __init__(self, number):
        self.number = number

    def getInferLibVersion(self):  # noqa: N802
        return self.number


def loads(**libraries):
    """A loader that knows these libraries by the start of their names."""

    def load(name):
        for prefix, library in libraries.items():
            if name.startswith(prefix):
                return library
        raise OSError(f"{name}: cannot open shared object file")

    return load


def test_gpus_are_described_in_the_driver_s_order():
    driver = Driver(("NVIDIA H100 80GB HBM3", 9, 0), ("NVIDIA L4", 8, 9))
    assert cuda.devices(loads(libcuda=driver)) == (Gpu(0, "NVIDIA H100 80GB HBM3", "9.0"), Gpu(1, "NVIDIA L4", "8.9"))


def test_no_driver_no_gpus():
    assert cuda.devices(loads()) == ()


def test_a_driver_that_does_not_come_up_shows_none():
    assert cuda.devices(loads(libcuda=Driver(("NVIDIA L4", 8, 9), status=999))) == ()


@pytest.mark.parametrize(("number", "version"), [(101303, "10.13.3"), (100000, "10.0.0")])
def test_tensorrt_s_version(number, version):
    libraries = {"libnvinfer": TensorRt(number), "libnvonnxparser": object()}
    assert cuda.tensorrt_version(loads(**libraries)) == version


def test_no_tensorrt():
    assert cuda.tensorrt_version(loads()) == ""
    assert cuda.tensorrt_version(loads(libnvinfer=TensorRt(101303))) == ""  # without its parser it is of no use


def test_a_thread_s_gpu_is_selected():
    runtime = Runtime()
    assert cuda.select(1, loads(libcudart=runtime))
    assert runtime.selected == 1
    assert not cuda.select(1, loads(libcudart=Runtime(status=100)))
    assert not cuda.select(1, loads())


def test_pages_are_locked_and_unlocked():
    runtime, array = Runtime(), np.zeros((4, 8, 8, 3), np.uint8)
    load = loads(libcudart=runtime)
    assert cuda.page_lock(array, load)
    assert runtime.pinned == {array.ctypes.data: (array.nbytes, 1)}
    cuda.page_unlock(array, load)
    assert not runtime.pinned


def test_pages_are_of_their_own():
    first, second = cuda.pages((2, 3, 3, 1)), cuda.pages((2, 3, 3, 1))
    assert first.shape == (2, 3, 3, 1)
    assert not first.any()
    first[:] = 7
    assert not second.any()
    assert first.ctypes.data % 4096 == second.ctypes.data % 4096 == 0


def test_pages_that_cannot_be_locked_are_only_slower():
    array = np.zeros(8, np.uint8)
    failing = Runtime(status=2)
    assert not cuda.page_lock(array, loads(libcudart=failing))
    assert failing.forgotten == 1  # or the next kernel of the thread would be blamed for it
    assert not cuda.page_lock(array, loads())
    cuda.page_unlock(array, loads())
