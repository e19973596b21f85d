"""The way of a model onto a GPU, from the choice to the answers, with sessions and buffers on the CPU."""

import functools
from pathlib import Path

import pytest
from toys import grey_outputs
from variants import CLASSES, levels_image, machine, slowed, version_with

from service import cuda, engine, providers, sessions
from service.candidates import Wishes
from service.cuda import Gpu
from service.errors import DeviceLostError, OutOfMemoryError, ProviderError
from service.providers import CPU, CUDA, TENSORRT, Plan
from service.runners import CudaRunner
from service.selection import Selector

LOST = "CUDA failure 700: an illegal memory access was encountered ; GPU=0"


class Stand:
    """What was opened, with which options; `before_open(options)` may fail or write files as TensorRT does."""

    def __init__(self):
        self.opened = []
        self.before_open = lambda options: None


@pytest.fixture
def stand(monkeypatch):
    made, on_cpu = Stand(), sessions._open  # noqa: SLF001

    def as_if(path, plan, options):
        made.opened.append(dict(options))
        made.before_open(options)
        return on_cpu(path, providers.cpu_plan(1), {})

    monkeypatch.setattr(sessions, "_open", as_if)
    monkeypatch.setattr(sessions, "_preload_cuda", lambda: None)
    monkeypatch.setattr(engine, "CudaRunner", functools.partial(CudaRunner, memory="cpu"))
    monkeypatch.setattr(cuda, "visible", lambda: (Gpu(0, "NVIDIA L4", "8.9"),) * 2)
    monkeypatch.setattr(cuda, "tensorrt_version", lambda: "10.13.3")
    yield made
    engine.GPU_LOST.clear()


@pytest.fixture
def version(tmp_path):
    return version_with(tmp_path)


def answers_right(one, spec):
    levels = [0, 200, 90]
    found = one.infer([levels_image(levels, spec)]).probabilities
    return found == pytest.approx(grey_outputs(levels, CLASSES)[1], abs=1e-5)


def graph_switches(stand):
    return [options["enable_cuda_graph"] for options in stand.opened]


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_what_was_measured_is_what_runs_and_the_next_start_remembers_it(version, stand, tmp_path, provider):
    selector = Selector(machine(gpus=("NVIDIA L4",)), tmp_path / "cache", lambda _: "")
    wishes = Wishes(providers=(provider,), max_batch_size=4)
    loads = {"cuda": 3, "tensorrt": 1}[provider]  # with CUDA each batch size has a session of its own
    for _ in range(2):
        stand.opened.clear()
        (one,) = selector.build(version, wishes)
        assert len(stand.opened) == loads
        assert one.provider == providers.NAMES[provider]
        assert set(one.measured_s) == {1, 2, 4}
        assert answers_right(one, version.manifest.input)
        one.close()


def test_what_is_not_chosen_is_let_go(stand, tmp_path, monkeypatch):
    closed, close = [], CudaRunner.close
    monkeypatch.setattr(CudaRunner, "close", lambda self: (closed.append(self), close(self)))
    version = version_with(tmp_path, fp32=slowed, fp16=lambda model: model)
    selector = Selector(machine(gpus=("NVIDIA L4",)), tmp_path / "cache", lambda _: "")
    (one,) = selector.build(version, Wishes(providers=("cuda",), max_batch_size=2))
    assert (one.variant, len(closed)) == ("model.fp16.onnx", 1)
    one.close()
    selector.table(version, Wishes(providers=("cuda",), max_batch_size=2), refresh=True)
    assert len(closed) == 4


def test_each_gpu_has_sessions_of_its_own_with_graphs_for_cuda_only(version, stand):
    for provider, each in ((CUDA, 3), (TENSORRT, 1)):
        stand.opened.clear()
        loaded = sessions.load(version, "model.onnx", Plan(provider, 1, gpus=(0, 1)), (1, 2, 4))
        assert [options["device_id"] for options in stand.opened] == ["0"] * each + ["1"] * each
        for on_gpu in loaded.on_gpus:
            assert tuple(on_gpu.sessions) == (1, 2, 4)
            assert len(set(map(id, on_gpu.sessions.values()))) == each
            assert (on_gpu.plain is not None) == (provider == CUDA)


def test_a_model_whose_graph_is_refused_runs_without(version, stand):
    def refuse(options):
        if options["enable_cuda_graph"] == "1":
            raise ProviderError("This session cannot use the graph capture feature as requested by the user")

    stand.before_open = refuse
    loaded = sessions.load(version, "model.onnx", Plan(CUDA, 1, gpus=(0,)), (1, 2))
    assert graph_switches(stand) == ["1", "0", "0"]
    assert loaded.on_gpus[0].plain is None


def test_a_model_that_is_in_part_on_the_cpu_binds_nothing_to_the_gpu(version, stand, monkeypatch):
    """ONNX Runtime would end the process."""
    monkeypatch.setattr(sessions, "_nodes", lambda session: {CUDA: 10, CPU: 2})
    monkeypatch.setattr(engine, "CudaRunner", pytest.fail)
    one, _ = engine.build(version, Plan(CUDA, 1, gpus=(0, 1)), 4)
    one.warm_up()
    for _ in range(2):
        assert answers_right(one, version.manifest.input)
    one.close()


def test_graphs_can_be_switched_off(version, stand):
    sessions.load(version, "model.onnx", Plan(CUDA, 1, gpus=(0,), options={"enable_cuda_graph": "0"}), (1, 2))
    assert graph_switches(stand) == ["0", "0"]


def test_a_lost_gpu_is_not_tidied_up(version, stand, monkeypatch):
    """ONNX Runtime would end the process."""
    plan = Plan(CUDA, 1, gpus=(0,))
    first, second = (engine.build(version, plan, 2)[0] for _ in range(2))
    monkeypatch.setattr(CudaRunner, "_once", lambda *_: (_ for _ in ()).throw(RuntimeError(LOST)))
    with pytest.raises(DeviceLostError):
        first.infer([levels_image([1], version.manifest.input)])
    monkeypatch.setattr(CudaRunner, "close", pytest.fail)
    first.close()
    second.close()
    assert engine.GPU_LOST.is_set()


def test_executors_that_cannot_all_be_made_are_let_go(version, stand, monkeypatch):
    closed, slot, close = [], CudaRunner._slot, CudaRunner.close  # noqa: SLF001

    def full(self, bucket):
        if self._gpu == 1:
            raise RuntimeError("Failed to allocate memory for requested buffer of size 4585490524")
        return slot(self, bucket)

    monkeypatch.setattr(CudaRunner, "_slot", full)
    monkeypatch.setattr(CudaRunner, "close", lambda self: (closed.append(self._gpu), close(self)))
    with pytest.raises(OutOfMemoryError):
        engine.build(version, Plan(CUDA, 1, gpus=(0, 1)), 2)
    assert sorted(closed) == [0, 1]


# --- TensorRT's engines on disk


ON_TENSORRT = Plan(TENSORRT, 1, gpus=(0,))


def compiles(options):
    """As TensorRT does: what is there is read, else it is made."""
    engine_file = Path(options["trt_engine_cache_path"]) / "model.engine"
    if not engine_file.exists():
        engine_file.write_text("half")
        engine_file.write_text("whole")
    elif engine_file.read_text() != "whole":
        raise ProviderError(f"TensorRT EP could not deserialize engine from cache: {engine_file}")


def open_on_tensorrt(version, cache):
    sessions.load(version, "model.onnx", ON_TENSORRT, (1, 2), cache)


def kept(cache):
    return [file.relative_to(cache).parts for file in sorted(cache.rglob("*")) if file.is_file()]


def test_a_compiled_engine_takes_its_place_when_it_is_complete(version, stand, tmp_path):
    cache, stand.before_open = tmp_path / "cache", compiles
    open_on_tensorrt(version, cache)
    ((kind, machine_name, key, file),) = kept(cache)
    assert (kind, machine_name, file) == ("tensorrt", "NVIDIA-L4-8-9-trt10-13-3", "model.engine")
    assert Path(stand.opened[0]["trt_engine_cache_path"]).name != key
    open_on_tensorrt(version, cache)
    assert Path(stand.opened[1]["trt_engine_cache_path"]).name == key


def test_half_an_engine_is_compiled_again(version, stand, tmp_path):
    cache, stand.before_open = tmp_path / "cache", compiles
    open_on_tensorrt(version, cache)
    (parts,) = kept(cache)
    cache.joinpath(*parts).write_text("half")
    open_on_tensorrt(version, cache)
    assert cache.joinpath(*parts).read_text() == "whole"
    assert kept(cache) == [parts]


def test_a_compilation_that_fails_leaves_nothing(version, stand, tmp_path):
    def fails(options):
        Path(options["trt_engine_cache_path"], "model.engine").write_text("half")
        raise ProviderError("no kernel")

    cache, stand.before_open = tmp_path / "cache", fails
    with pytest.raises(ProviderError, match="no kernel"):
        open_on_tensorrt(version, cache)
    assert not kept(cache)


def test_where_nothing_can_be_kept_it_compiles_each_time(version, stand, tmp_path):
    (tmp_path / "file").write_text("")
    open_on_tensorrt(version, tmp_path / "file")
    assert "trt_engine_cache_path" not in stand.opened[0]
