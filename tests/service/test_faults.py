"""Texts that ONNX Runtime, CUDA, cuDNN, cuBLAS and TensorRT write, and what they mean."""

import pytest

from service import faults
from service.errors import DeviceLostError, EngineError, OutOfMemoryError

CUDA_FAILURE = (
    "CUDA failure {code}: {text} ; GPU=0 ; hostname=node-1 ; "
    "file=/onnxruntime_src/onnxruntime/core/providers/cuda/gpu_data_transfer.cc ; line=63 ; "
    "expr=cudaMemcpyAsync(dst_data, src_data, bytes, cudaMemcpyHostToDevice, stream);"
)
ARENA = "/onnxruntime_src/onnxruntime/core/framework/bfc_arena.cc:376 void* onnxruntime::BFCArena::AllocateRawInternal"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(f"{ARENA}(size_t, bool) Failed to allocate memory for requested buffer of size 939524096"),
        RuntimeError(f"{ARENA} Available memory of 1024 is smaller than requested bytes of 2048"),
        RuntimeError(CUDA_FAILURE.format(code=2, text="out of memory")),
        RuntimeError("CUDNN failure 4: CUDNN_STATUS_ALLOC_FAILED ; GPU=0"),
        RuntimeError("CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0"),
        RuntimeError(
            "TensorRT EP failed: OutOfMemory: Error Code 2: OutOfMemory (Requested size was 209715200 bytes.)"
        ),
        RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : std::bad_alloc"),
        MemoryError("Unable to allocate 4.00 TiB for an array"),
    ],
)
def test_exhausted_memory(error):
    assert type(faults.translate(error)) is OutOfMemoryError


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (214, "uncorrectable ECC error encountered"),
        (700, "an illegal memory access was encountered"),
        (702, "the launch timed out and was terminated"),
        (710, "device-side assert triggered"),
        (716, "misaligned address"),
        (719, "unspecified launch failure"),
        (999, "unknown error"),
    ],
)
def test_sticky_errors(code, text):
    assert type(faults.translate(RuntimeError(CUDA_FAILURE.format(code=code, text=text)))) is DeviceLostError


def test_a_sticky_error_found_by_an_allocation_is_a_lost_device():
    text = CUDA_FAILURE.format(code=700, text="an illegal memory access was encountered")
    assert type(faults.translate(RuntimeError(f"{ARENA} Failed to allocate memory; {text}"))) is DeviceLostError


@pytest.mark.parametrize("code", [1, 35, 100, 101])
def test_errors_that_do_not_stick(code):
    error = faults.translate(RuntimeError(CUDA_FAILURE.format(code=code, text="invalid argument")))
    assert type(error) is EngineError


def test_the_message_is_short_and_on_one_line():
    message = str(faults.translate(RuntimeError("line\n" * 1000)))
    assert len(message) <= 400
    assert "\n" not in message


def test_an_exception_without_text_is_named():
    assert str(faults.translate(ValueError())) == "ValueError"
