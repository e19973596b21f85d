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
        RuntimeError("CUDNN failure 4004: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED ; GPU=0"),
        RuntimeError("CUBLAS failure 3: the resource allocation failed ; GPU=0"),
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
    ("text", "short"),
    [
        ("Load model from model.onnx failed:system error number 24", True),  # EMFILE
        ("Load model from model.onnx failed:system error number 23", True),  # ENFILE
        ("Load model from model.onnx failed:system error number 12", True),  # ENOMEM
        ("Load model from model.onnx failed:system error number 13", False),  # EACCES
        ("Load model from model.onnx failed:system error number 2", False),
        ("Load model from model.onnx failed:system error number 120", False),
        ("std::bad_alloc", True),
        ("Load model from model.onnx failed:Protobuf parsing failed.", False),
    ],
)
def test_what_is_short_at_a_load_is_told_apart_from_damage(text, short):
    assert faults.is_shortage(RuntimeError(text)) is short


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (214, "uncorrectable ECC error encountered"),
        (700, "an illegal memory access was encountered"),
        (702, "the launch timed out and was terminated"),
        (710, "device-side assert triggered"),
        (716, "misaligned address"),
        (719, "unspecified launch failure"),
        (226, "contained"),
        (810, "the MPS client has been terminated"),
        (999, "unknown error"),
    ],
)
def test_sticky_errors(code, text):
    assert type(faults.translate(RuntimeError(CUDA_FAILURE.format(code=code, text=text)))) is DeviceLostError


@pytest.mark.parametrize("name", ["cudaErrorInvalidPc", "cudaErrorContextIsDestroyed", "cudaErrorNvlinkUncorrectable"])
def test_sticky_errors_that_a_kernel_leaves_by_name(name):
    text = f"Non-zero status code returned while running Conv node. Status Message: CUDA error {name}:what it means"
    assert type(faults.translate(RuntimeError(text))) is DeviceLostError
    plain = faults.translate(RuntimeError("CUDA error cudaErrorInvalidConfiguration:invalid configuration argument"))
    assert type(plain) is EngineError


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        (CUDA_FAILURE.format(code=900, text="operation not permitted when stream is capturing"), True),
        ("CUDA error cudaErrorStreamCaptureUnsupported:operation not permitted when stream is capturing", True),
        ("Graph capture did not complete after 8 internal runs for CUDAExecutionProvider.", True),
        ("This session cannot use the graph capture feature as requested by the user", True),
        (CUDA_FAILURE.format(code=2, text="out of memory"), False),
        (CUDA_FAILURE.format(code=909, text="attempted to launch a graph exec that is being destroyed"), False),
    ],
)
def test_what_cannot_be_captured_is_told_apart(text, refused):
    assert faults.no_capture(RuntimeError(text)) is refused


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
