"""Which providers, with which options, threads and batch sizes."""

import json
from pathlib import Path

import onnxruntime as ort
import pytest
import toys
from onnxruntime.capi import _pybind_state

from service import providers
from service.errors import ProviderError
from service.providers import CPU, CUDA, OPENVINO, TENSORRT, Plan

ALL = {CPU, OPENVINO, CUDA, TENSORRT}


def missing_but(*present):
    return lambda name: "" if name in present else f"no {name}"


# --- batch sizes


@pytest.mark.parametrize(
    ("provider", "largest", "expected"),
    [
        (CPU, 1, (1,)),
        (CPU, 8, (1, 2, 3, 4, 5, 6, 7, 8)),
        (CPU, 32, (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32)),
        (OPENVINO, 11, (1, 2, 3, 4, 5, 6, 7, 8, 10, 11)),
        (CUDA, 32, (1, 2, 4, 8, 16, 32)),
        (TENSORRT, 48, (1, 2, 4, 8, 16, 32, 48)),
    ],
)
def test_buckets_are_dense_where_padding_costs(provider, largest, expected):
    assert Plan(provider, 1).buckets(largest) == expected


def test_little_is_wasted_on_a_cpu():
    buckets = Plan(CPU, 1).buckets(256)
    for images in range(1, 257):
        padded = next(size for size in buckets if size >= images)
        assert padded <= 1.25 * images


# --- threads


@pytest.mark.parametrize(
    ("cpus", "asked", "expected"),
    [
        (1, {}, (1, 1)),
        (2, {}, (2, 1)),
        (8, {}, (8, 1)),
        (16, {}, (8, 2)),
        (17, {}, (8, 2)),
        (2, {"intra_op_threads": 2}, (1, 2)),
        (8, {"intra_op_threads": 3}, (2, 3)),
        (8, {"executors": 2}, (2, 4)),
        (2, {"executors": 4}, (4, 1)),
        (2, {"executors": 3, "intra_op_threads": 2}, (3, 2)),
        (1, {"provider": OPENVINO}, (2, 1)),
        (2, {"provider": OPENVINO}, (3, 1)),
        (16, {"provider": OPENVINO}, (8, 2)),
        (8, {"provider": OPENVINO, "intra_op_threads": 4}, (2, 4)),
        (8, {"provider": OPENVINO, "executors": 2}, (2, 4)),
    ],
)
def test_cpus_are_shared_out(cpus, asked, expected):
    plan = providers.cpu_plan(cpus, **asked)
    assert (plan.executors, plan.intra_op_threads) == expected


# --- which


@pytest.mark.parametrize(
    ("gpus", "present", "expected"),
    [
        (0, ALL, (CPU, OPENVINO)),
        (0, {CPU}, (CPU,)),
        (1, ALL, (TENSORRT, CUDA)),
        (2, {CPU, CUDA}, (CUDA,)),
    ],
)
def test_auto_takes_what_the_machine_has(gpus, present, expected):
    usable, left_out = providers.chain(("auto",), missing_but(*present), gpus=gpus, allow_fallback=False)
    assert usable == expected
    assert all(why == f"no {name}" for name, why in left_out.items())


def test_a_gpu_that_nothing_can_use_is_an_error():
    with pytest.raises(ProviderError, match=r"tensorrt: no Tensorrt.*cuda: no CUDA.*allow_fallback"):
        providers.chain(("auto",), missing_but(CPU), gpus=1, allow_fallback=False)


def test_what_is_named_keeps_its_order_and_counts_once():
    usable, _ = providers.chain(("cuda", "cpu", "cuda"), missing_but(*ALL), gpus=1, allow_fallback=False)
    assert usable == (CUDA, CPU)


def test_what_is_named_and_missing_is_an_error_even_if_another_is_there():
    with pytest.raises(ProviderError, match="cuda: no CUDAExecutionProvider"):
        providers.chain(("cuda", "cpu"), missing_but(CPU), gpus=0, allow_fallback=False)


@pytest.mark.parametrize(("requested", "expected"), [(("cuda", "openvino"), (OPENVINO,)), (("cuda",), (CPU,))])
def test_fallback_has_to_be_allowed(requested, expected):
    usable, left_out = providers.chain(requested, missing_but(CPU, OPENVINO), gpus=0, allow_fallback=True)
    assert usable == expected
    assert left_out == {CUDA: f"no {CUDA}"}


def test_a_misspelt_provider_is_an_error_whatever_is_allowed():
    with pytest.raises(ProviderError, match="no provider cudo; choose from auto, tensorrt, cuda, openvino, cpu"):
        providers.chain(("cudo",), missing_but(*ALL), gpus=1, allow_fallback=True)


# --- options


def test_cuda_grows_its_arena_as_asked_and_lets_the_settings_win():
    options = providers.cuda_options(Plan(CUDA, 1, options={"gpu_mem_limit": "1024", "use_tf32": "0"}), 1, graphs=True)
    assert options["device_id"] == "1"
    assert options["arena_extend_strategy"] == "kSameAsRequested"
    assert options["enable_cuda_graph"] == "1"
    assert options["prefer_nhwc"] == "1"
    assert options["gpu_mem_limit"] == "1024"
    assert options["use_tf32"] == "0"


def test_the_settings_change_neither_the_gpu_nor_what_was_tried_without_graphs():
    plan = Plan(CUDA, 1, options={"device_id": "7", "enable_cuda_graph": "1"})
    options = providers.cuda_options(plan, 1, graphs=False)
    assert (options["device_id"], options["enable_cuda_graph"]) == ("1", "0")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cudo": {}}, "no provider cudo; choose from tensorrt, cuda, openvino, cpu"),
        (
            {"cuda": {"device_id": 1}},
            "device_id of cuda cannot be set: every GPU that CUDA_VISIBLE_DEVICES shows is used",
        ),
        ({"tensorrt": {"trt_cuda_graph_enable": "True"}}, "trt_cuda_graph_enable of tensorrt cannot be set"),
    ],
)
def test_options_that_would_break_what_is_built_here_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        providers.check_options(options)


@pytest.mark.parametrize(
    ("precision", "fp16", "int8"), [("fp16", "True", "False"), ("int8", "True", "True"), ("", "False", "False")]
)
def test_tensorrt_s_profile_spans_every_bucket(precision, fp16, int8):
    options = providers.tensorrt_options(
        Plan(TENSORRT, 1, precision=precision),
        0,
        shape=(224, 224, 3),
        input_name="image",
        buckets=(1, 2, 4, 8),
        cache=Path("/cache/gpu/key"),
    )
    assert options["trt_profile_min_shapes"] == "image:1x224x224x3"
    assert options["trt_profile_opt_shapes"] == options["trt_profile_max_shapes"] == "image:8x224x224x3"
    assert (options["trt_fp16_enable"], options["trt_int8_enable"]) == (fp16, int8)
    assert options["trt_engine_cache_path"] == "/cache/gpu/key"
    assert options["trt_timing_cache_path"] == "/cache/gpu/key"


def test_tensorrt_lets_the_settings_win_but_for_the_gpu():
    plan = Plan(TENSORRT, 1, precision="fp16", options={"trt_fp16_enable": "False", "trt_max_workspace_size": "1024"})
    options = providers.tensorrt_options(plan, 1, shape=(8, 8, 1), input_name="image", buckets=(1,), cache=None)
    assert (options["trt_fp16_enable"], options["trt_max_workspace_size"]) == ("False", "1024")
    assert options["device_id"] == "1"


def asked_of_tensorrt(options, tmp_path):
    """ONNX Runtime's binding reads TensorRT's options before it looks for the library, which need not be there."""
    quiet = ort.SessionOptions()
    quiet.log_severity_level = 4
    version = toys.write_version(tmp_path)
    session = _pybind_state.InferenceSession(quiet, str(version / "model.onnx"), True, False)
    session.initialize_session([TENSORRT, CPU], [options, {}], set())


@pytest.mark.parametrize("precision", ["fp16", "int8", ""])
def test_onnx_runtime_takes_tensorrt_s_options(tmp_path, precision):
    plan = Plan(TENSORRT, 1, precision=precision)
    shape = {"shape": (2, 2, 1), "input_name": "image", "buckets": (1, 2)}
    asked_of_tensorrt(providers.tensorrt_options(plan, 0, **shape, cache=tmp_path / "gpu" / "key"), tmp_path)


@pytest.mark.parametrize("wrong", [{"trt_fp16_enable": "1"}, {"trt_no_such_option": "True"}])
def test_it_would_not_take_others(tmp_path, wrong):
    with pytest.raises(RuntimeError, match=next(iter(wrong))):
        asked_of_tensorrt(wrong, tmp_path)


def test_without_a_cache_tensorrt_is_told_of_none():
    options = providers.tensorrt_options(
        Plan(TENSORRT, 1), 0, shape=(8, 8, 1), input_name="image", buckets=(1,), cache=None
    )
    assert not [name for name in options if "cache" in name]


FACTS = {
    "gpu_name": "NVIDIA H100 80GB HBM3",
    "compute_capability": "9.0",
    "tensorrt": "10.13.3",
    "onnxruntime": "1.31.1",
    "digest": "a" * 64,
    "plan": Plan(TENSORRT, 1, precision="fp16"),
    "buckets": (1, 2, 4),
}


@pytest.mark.parametrize(
    "change",
    [
        {"gpu_name": "NVIDIA L4"},
        {"compute_capability": "8.9"},
        {"tensorrt": "10.14.0"},
        {"onnxruntime": "1.32.0"},
        {"digest": "b" * 64},
        {"plan": Plan(TENSORRT, 1, precision="int8")},
        {"plan": Plan(TENSORRT, 1, precision="fp16", options={"trt_builder_optimization_level": "5"})},
        {"buckets": (1, 2, 4, 8)},
    ],
)
def test_a_compiled_engine_is_found_only_where_it_fits(change):
    root = Path("/cache")
    assert providers.tensorrt_cache(root, **FACTS) == providers.tensorrt_cache(root, **FACTS)
    assert providers.tensorrt_cache(root, **FACTS) != providers.tensorrt_cache(root, **{**FACTS, **change})


def test_the_directory_of_compiled_engines_can_be_read_by_people():
    path = providers.tensorrt_cache(Path("/cache"), **FACTS)
    assert path.parent == Path("/cache/tensorrt/NVIDIA-H100-80GB-HBM3-9-0-trt10-13-3")


def test_openvino_gets_one_stream_for_each_executor():
    plan = providers.cpu_plan(8, provider=OPENVINO, executors=2, precision="bf16")
    assert json.loads(providers.openvino_config(plan)) == {
        "CPU": {
            "INFERENCE_NUM_THREADS": "8",
            "NUM_STREAMS": "2",
            "ENABLE_CPU_PINNING": "NO",
            "INFERENCE_PRECISION_HINT": "bf16",
        }
    }


def test_openvino_s_properties_from_the_settings_win():
    plan = Plan(OPENVINO, 1, 2, "bf16", options={"INFERENCE_PRECISION_HINT": "f32", "CACHE_DIR": "/cache"})
    properties = json.loads(providers.openvino_config(plan))["CPU"]
    assert properties["INFERENCE_PRECISION_HINT"] == "f32"
    assert properties["CACHE_DIR"] == "/cache"
