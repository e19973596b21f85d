"""What loses a GPU for a process."""

import ctypes

# Ends with an error after which CUDA wants the process to be restarted; nothing outside of the process notices.
_TRAP = b""".version 7.5
.target sm_75
.address_size 64
.visible .entry trap_at_once() { trap; }
"""


def lose(gpu=0):
    """Breaks this process's context on a GPU, as a kernel that goes astray does."""
    driver = ctypes.CDLL("libcuda.so.1")
    context, module, kernel = (ctypes.c_void_p() for _ in range(3))
    assert driver.cuInit(0) == 0
    assert driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), gpu) == 0
    assert driver.cuCtxSetCurrent(context) == 0
    assert driver.cuModuleLoadData(ctypes.byref(module), _TRAP) == 0
    assert driver.cuModuleGetFunction(ctypes.byref(kernel), module, b"trap_at_once") == 0
    assert driver.cuLaunchKernel(kernel, 1, 1, 1, 1, 1, 1, 0, None, None, None) == 0
    assert driver.cuCtxSynchronize() != 0
