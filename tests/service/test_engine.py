"""The engine on ONNX Runtime's CPU provider, and its conduct when a device fails, on a runner that fails to order."""

import os
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import toys
from toys import grey_outputs
from variants import CLASSES, huge, levels_image, version_with

from service import engine, providers, sessions
from service.engine import OrtEngine, Outputs
from service.errors import ArtifactError, DeviceLostError, EngineError, OutOfMemoryError, ProviderError
from service.providers import CPU, CUDA, OPENVINO, Plan

# As ONNX Runtime 1.31 and CUDA write them.
OUT_OF_MEMORY = (
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running Conv node. "
    "Name:'/conv1/Conv' Status Message: /onnxruntime_src/onnxruntime/core/framework/bfc_arena.cc:376 void* "
    "onnxruntime::BFCArena::AllocateRawInternal(size_t, bool, onnxruntime::Stream*, bool, "
    "onnxruntime::WaitNotificationFn) Failed to allocate memory for requested buffer of size 4585490524"
)
ILLEGAL_ACCESS = (
    "[ONNXRuntimeError] : 1 : FAIL : CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; "
    "hostname=node-1 ; file=/onnxruntime_src/onnxruntime/core/providers/cuda/cuda_stream_handle.cc ; line=184 ; "
    "expr=cudaStreamSynchronize(static_cast<cudaStream_t>(GetHandle()));"
)


@pytest.fixture(scope="module")
def version(tmp_path_factory):
    return version_with(tmp_path_factory.mktemp("models"))


def cpu_engines(version, max_batch_size=8, executors=1):
    return engine.build(version, providers.cpu_plan(executors), max_batch_size)


class Runner:
    """The toy model in numpy; raises what `fail(bucket)` gives it."""

    def __init__(self, largest, fail=lambda bucket: None):
        self.pixels = np.zeros((largest, 2, 2, 1), np.uint8)
        self.ran = []
        self.closed = False
        self._fail = fail

    def run(self, bucket):
        self.ran.append(bucket)
        error = self._fail(bucket)
        if error is not None:
            raise error
        logits, probabilities = grey_outputs(self.pixels[:bucket].mean(axis=(1, 2, 3)), CLASSES)
        return Outputs(logits, probabilities)

    def close(self):
        self.closed = True


def toy(runner, buckets=(1, 2, 4, 8)):
    return OrtEngine(runner, Plan(CUDA, 1, gpus=(0,)), "model.onnx", buckets)


def threads():
    return {int(path.name) for path in Path("/proc/self/task").iterdir()}


def levels(count):
    return (np.arange(count) * 255 // max(1, count - 1)).astype(np.uint8)


def pixels(values):
    return np.broadcast_to(values[:, None, None, None], (len(values), 2, 2, 1))


@pytest.mark.parametrize("count", range(1, 9))
def test_each_image_gets_its_own_answer_at_every_batch_size(version, count):
    (one,) = cpu_engines(version)
    one.infer([levels_image([7] * 8, version.manifest.input)])  # what padding may contain
    outputs = one.infer([levels_image(levels(count), version.manifest.input)])
    logits, probabilities = grey_outputs(levels(count), CLASSES)
    np.testing.assert_allclose(outputs.logits, logits, atol=1e-4)
    np.testing.assert_allclose(outputs.probabilities, probabilities, atol=1e-5)


def test_chunks_are_joined_in_order(version):
    (one,) = cpu_engines(version)
    images = levels_image(levels(7), version.manifest.input)
    whole = one.infer([images])
    parts = one.infer([images[:1], images[1:5], images[5:]])
    np.testing.assert_array_equal(whole.probabilities, parts.probabilities)


def test_an_answer_is_not_overwritten_by_the_next_batch(version):
    (one,) = cpu_engines(version)
    first = one.infer([levels_image([0], version.manifest.input)])
    kept = first.probabilities.copy()
    one.infer([levels_image([255], version.manifest.input)])
    np.testing.assert_array_equal(first.probabilities, kept)


def test_executors_share_a_session_and_run_at_the_same_time(version):
    plan = providers.cpu_plan(3)
    loaded = sessions.load(version, "model.onnx", plan, (1, 4))
    engines = engine.executors(version, loaded, "model.onnx", (1, 4))
    assert not loaded.on_gpus
    assert len(engines) == 3
    wrong = []

    def work(one, level):
        for _ in range(200):
            found = one.infer([levels_image([level] * 3, version.manifest.input)]).probabilities
            if not np.allclose(found, grey_outputs([level] * 3, CLASSES)[1], atol=1e-5):
                wrong.append(level)

    threads = [threading.Thread(target=work, args=(one, 100 * i)) for i, one in enumerate(engines)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_warm_up_runs_and_measures_every_bucket(version):
    engines = cpu_engines(version, executors=2)
    engine.warm_up(engines)
    for one in engines:
        assert set(one.measured_s) == set(one.buckets) == {1, 2, 3, 4, 5, 6, 7, 8}
        assert all(seconds > 0 for seconds in one.measured_s.values())


def test_warm_up_captures_before_it_measures():
    runner = Runner(2)
    toy(runner, (1, 2)).warm_up()
    assert runner.ran == [2, 2, 2, 2, 1, 1, 1, 1]


def test_on_the_cpu_provider_one_executor_warms_up_for_all():
    runners = [Runner(5), Runner(5)]
    engines = [OrtEngine(runner, Plan(CPU, 1, 2), "model.onnx", (1, 2, 3, 4, 5)) for runner in runners]
    engine.warm_up(engines)
    # The largest for its memory only; quick ones are timed twice.
    assert runners[0].ran == [5, 4, 4, 2, 2, 1, 1]
    assert runners[1].ran == []
    measured_s = engines[0].measured_s
    assert measured_s[3] == pytest.approx((measured_s[2] + measured_s[4]) / 2)
    assert measured_s[5] == pytest.approx(measured_s[4] * 5 / 4)
    assert engines[1].measured_s == measured_s


def test_on_openvino_one_executor_warms_up_and_each_stream_runs_once():
    runners = [Runner(3), Runner(3), Runner(3)]
    engines = [OrtEngine(runner, Plan(OPENVINO, 1, 3), "model.onnx", (1, 2, 3)) for runner in runners]
    engine.warm_up(engines)
    # Each size once because it may compile, then twice to be timed.
    assert [runner.ran for runner in runners] == [[3, 3, 3, 2, 2, 2, 1, 1, 1, 1], [1], [1]]
    assert {id(one.measured_s) for one in engines} == {id(engines[0].measured_s)}
    assert set(engines[0].measured_s) == {1, 2, 3}


def test_a_single_bucket_is_measured_on_the_cpu_provider_too():
    runner = Runner(1)
    one = OrtEngine(runner, Plan(CPU, 1, 1), "model.onnx", (1,))
    engine.warm_up([one])
    assert runner.ran == [1, 1, 1]
    assert one.measured_s[1] > 0


def priorities(among):
    """Nice values of those of the threads that have not ended meanwhile."""
    found = set()
    for thread in among:
        with suppress(ProcessLookupError):
            found.add(os.getpriority(os.PRIO_PROCESS, thread))
    return found


async def test_threads_of_a_runtime_never_inherit_the_low_priority_of_a_load(version):
    before = threads()
    plan = providers.cpu_plan(3, executors=1)
    engines = engine.build(version, plan, 2)
    engine.warm_up(engines)
    assert plan.intra_op_threads == 3
    assert len(threads() - before) >= 2  # the third is the caller
    # Those of the warm-up may still be ending; the runtime's stay.
    await toys.eventually(lambda: priorities(threads() - before) == {os.getpriority(os.PRIO_PROCESS, 0)})


def test_a_failing_warm_up_says_so():
    engines = [toy(Runner(2), (1, 2)), toy(Runner(2, lambda bucket: RuntimeError("no kernel")), (1, 2))]
    with pytest.raises(EngineError, match="no kernel"):
        engine.warm_up(engines)


def test_it_tells_what_really_runs(version):
    (one,) = cpu_engines(version)
    assert (one.provider, one.variant) == (CPU, "model.onnx")
    loaded = sessions.load(version, "model.onnx", providers.cpu_plan(1), (1,))
    assert set(loaded.nodes) == {CPU}
    assert loaded.nodes[CPU] > 5


def test_the_session_is_freed_with_the_last_executor(version):
    engines = cpu_engines(version, executors=2)
    for one in engines:
        one.close()
    with pytest.raises(EngineError):
        engines[0].infer([levels_image([0], version.manifest.input)])


# --- failures


def test_an_exhausted_allocator_splits_the_batch_once():
    runner = Runner(8, lambda bucket: RuntimeError(OUT_OF_MEMORY) if bucket > 4 else None)
    values = levels(7)
    outputs = toy(runner).infer([pixels(values)])
    assert runner.ran == [8, 4, 4]
    np.testing.assert_allclose(outputs.probabilities, grey_outputs(values, CLASSES)[1], atol=1e-6)


def test_halves_that_do_not_fit_either_are_given_up():
    runner = Runner(8, lambda bucket: RuntimeError(OUT_OF_MEMORY) if bucket > 2 else None)
    with pytest.raises(OutOfMemoryError):
        toy(runner).infer([pixels(levels(8))])
    assert runner.ran == [8, 4]


@pytest.mark.parametrize("missing", [0, 1])
def test_answers_of_another_number_than_images_are_a_failure(missing):
    class Short(Runner):
        def run(self, bucket):
            rows = [*super().run(bucket)]
            rows[missing] = rows[missing][:-1]
            return tuple(rows)

    with pytest.raises(EngineError, match="rows for 4 images"):
        toy(Short(4, lambda bucket: None)).infer([pixels(levels(3))])


def test_a_single_image_is_not_split():
    runner = Runner(8, lambda bucket: RuntimeError(OUT_OF_MEMORY))
    with pytest.raises(OutOfMemoryError):
        toy(runner).infer([pixels(levels(1))])
    assert runner.ran == [1]


def test_a_lost_device_stays_lost_and_is_not_touched_again():
    broken = [RuntimeError(ILLEGAL_ACCESS)]
    runner = Runner(8, lambda bucket: broken.pop() if broken else None)
    one = toy(runner)
    with pytest.raises(DeviceLostError):
        one.infer([pixels(levels(3))])
    with pytest.raises(DeviceLostError, match="illegal memory access"):
        one.infer([pixels(levels(1))])
    assert runner.ran == [4]


def test_another_failure_fails_its_batch_only():
    broken = [RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : shape mismatch")]
    runner = Runner(8, lambda bucket: broken.pop() if broken else None)
    one = toy(runner)
    with pytest.raises(EngineError, match="shape mismatch") as failure:
        one.infer([pixels(levels(3))])
    assert type(failure.value) is EngineError
    assert len(one.infer([pixels(levels(3))]).logits) == 3


def test_onnx_runtime_s_own_exhaustion_is_recognised(tmp_path):
    version = version_with(tmp_path, fp32=lambda model: huge(model, 1 << 46))
    (one,) = cpu_engines(version, max_batch_size=2)
    with pytest.raises(OutOfMemoryError, match="exhausted"):
        one.infer([levels_image([0, 0], version.manifest.input)])


def test_a_broken_graph_is_the_artifact_s_fault(tmp_path):
    version = version_with(tmp_path)
    version.file("model.onnx").write_bytes(b"not a graph")
    with pytest.raises(ArtifactError, match=r"model\.onnx cannot be loaded by ONNX Runtime"):
        cpu_engines(version)


def test_a_provider_that_does_not_come_up_is_never_replaced_in_silence(version):
    with pytest.raises(ProviderError, match="CUDAExecutionProvider"):
        engine.build(version, Plan(CUDA, 1, gpus=(0,)), 2)


def test_warming_up_gives_way_to_who_serves(version):
    def nice():
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    with engine.side_by_side(cpu_engines(version)) as pool:
        assert pool.submit(nice).result() > nice()
