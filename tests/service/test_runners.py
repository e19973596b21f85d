"""Runners on real sessions. The one for GPUs runs here with its buffers in the CPU's memory: the same calls."""

import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from toys import TIMEOUT_S, grey_outputs
from variants import CLASSES, levels_image, version_with

from service import capture, providers, sessions
from service.runners import CudaRunner, HostRunner

BUCKETS = (1, 2, 4)


@pytest.fixture
def version(tmp_path):
    return version_with(tmp_path)


@pytest.fixture
def session(version):
    return sessions.load(version, "model.onnx", providers.cpu_plan(1), BUCKETS).session


def cuda_runner(session, version, *, graphs):
    return runner_of(dict.fromkeys(BUCKETS, session), version, plain=pytest.fail if graphs else None)


def runner_of(by_size, version, plain=None):
    return CudaRunner(by_size, 0, version.manifest.input.shape, CLASSES, plain=plain, memory="cpu")


def check(runner, version, levels):
    runner.pixels[: len(levels)] = levels_image(levels, version.manifest.input)
    outputs = runner.run(len(levels))
    logits, probabilities = grey_outputs(levels, CLASSES)
    np.testing.assert_allclose(outputs.logits, logits, atol=1e-4)
    np.testing.assert_allclose(outputs.probabilities, probabilities, atol=1e-5)


@pytest.mark.parametrize("levels", [[0], [9, 200], [255, 3, 77, 130]])
def test_host(session, version, levels):
    runner = HostRunner(session, BUCKETS[-1], version.manifest.input.shape)
    check(runner, version, [1] * 4)
    check(runner, version, levels)


@pytest.mark.parametrize("graphs", [True, False])
def test_every_bucket_has_buffers_of_its_own_that_are_filled_anew(session, version, graphs):
    runner = cuda_runner(session, version, graphs=graphs)
    for levels in ([255, 3, 77, 130], [9, 200], [0], [40, 50, 60, 70], [128], [1, 254]):
        check(runner, version, levels)


@pytest.mark.parametrize("graphs", [True, False])
def test_a_closed_runner_holds_nothing(session, version, graphs):
    watched = Watched(session)
    held, runner = weakref.ref(watched), cuda_runner(watched, version, graphs=graphs)
    del watched
    runner.run(1)
    runner.close()
    assert held() is None
    with pytest.raises(RuntimeError, match="shutdown"):
        runner.run(1)


class Watched:
    """A real session whose runs are written down: thread, what it was asked for the graph, and for the arena."""

    def __init__(self, session, in_run=lambda _graph: None):
        self._session, self._in_run, self.runs = session, in_run, []

    def io_binding(self):
        return self._session.io_binding()

    def run_with_iobinding(self, binding, options):
        graph, arena = (entry(options, name) for name in ("gpu_graph_id", "memory.enable_memory_arena_shrinkage"))
        self.runs.append((threading.get_ident(), graph, arena))
        self._in_run(graph)
        self._session.run_with_iobinding(binding, options)


def entry(options, name):
    try:
        return options.get_run_config_entry(name)
    except RuntimeError:
        return ""


def test_the_thread_talks_to_the_gpu_of_its_sessions(session, version, monkeypatch):
    selected = []
    monkeypatch.setattr("service.cuda.select", lambda gpu: selected.append((gpu, threading.get_ident())))
    watched = Watched(session)
    runner = runner_of({1: watched}, version)
    runner.run(1)
    runner.run(1)
    assert selected == [(0, watched.runs[0][0])]


@pytest.mark.parametrize("graphs", [True, False])
def test_every_batch_runs_on_one_thread_whoever_asks(session, version, graphs):
    """ONNX Runtime keeps graphs for each thread: on another one the first request of a size would pay for a capture."""
    by_size = {bucket: Watched(session) for bucket in BUCKETS}
    runner = runner_of(dict(by_size), version, plain=pytest.fail if graphs else None)
    with ThreadPoolExecutor(1) as warm_up, ThreadPoolExecutor(1) as owner:
        for bucket in BUCKETS:
            warm_up.submit(runner.run, bucket).result()
        owner.submit(runner.run, 2).result()
        runner.run(4)
    # Without a graph at first, then one that is captured, then replayed.
    begun = [("-1", "cpu:0"), *[("", "")] * graphs]
    assert [run[1:] for run in by_size[1].runs] == begun
    for bucket in (2, 4):
        assert [run[1:] for run in by_size[bucket].runs] == [*begun, ("", "")]
    threads = {run[0] for watched in by_size.values() for run in watched.runs}
    assert len(threads) == 1
    assert threading.get_ident() not in threads
    runner.close()


@pytest.mark.parametrize("reason", ["CUDA failure 900: operation not permitted when stream is capturing", "no memory"])
def test_what_cannot_be_captured_runs_without_graphs(session, version, reason):
    """Its stream is still capturing: the session has to go before anybody else may talk to a GPU."""

    def in_run(graph):
        if graph == "":
            raise RuntimeError(reason)

    by_size = {bucket: Watched(session, in_run) for bucket in BUCKETS}
    gone, plain = weakref.ref(by_size[4]), Watched(session)

    def reopened():
        assert gone() is None
        return plain

    runner = runner_of(by_size, version, reopened)
    for levels in ([255, 3, 77, 130], [9, 200], [0], [40, 50, 60, 70], [128]):
        check(runner, version, levels)
    assert [run[1] for run in plain.runs] == ["-1", "-1"]
    assert [run[1] for run in by_size[2].runs] == ["-1"]
    assert [run[1] for run in by_size[1].runs] == ["-1", "-1"]
    runner.close()


def test_a_runner_that_cannot_be_made_gives_its_pages_back(session, version, monkeypatch):
    locked = []
    monkeypatch.setattr("service.cuda.page_lock", lambda array: locked.append(array.ctypes.data) or True)
    monkeypatch.setattr("service.cuda.page_unlock", lambda array: locked.remove(array.ctypes.data))

    class Full:
        def io_binding(self):
            assert locked
            raise MemoryError

    with pytest.raises(MemoryError):
        runner_of({1: session, 2: Full()}, version)
    assert not locked


def test_nothing_else_runs_on_a_gpu_while_a_graph_is_captured(session, version):
    """In CUDA's global mode both would fail."""
    capturing, go_on, compiled = threading.Event(), threading.Event(), threading.Event()

    def in_run(graph):
        if graph:
            compiled.wait(TIMEOUT_S)
        else:
            capturing.set()
            assert go_on.wait(TIMEOUT_S)

    neighbour = Watched(session)
    served = cuda_runner(neighbour, version, graphs=False)
    loading = cuda_runner(Watched(session, in_run), version, graphs=True)
    with ThreadPoolExecutor(3) as pool:
        warm_up = pool.submit(loading.run, 4)
        pool.submit(served.run, 1).result(TIMEOUT_S)  # what is compiled disturbs nobody
        compiled.set()
        assert capturing.wait(TIMEOUT_S)
        neighbour.runs.clear()
        request, release = pool.submit(served.run, 1), pool.submit(cuda_runner(session, version, graphs=False).close)
        threading.Event().wait(0.1)
        assert not neighbour.runs
        assert not release.done()
        go_on.set()
        warm_up.result(TIMEOUT_S)
        request.result(TIMEOUT_S)
        release.result(TIMEOUT_S)
    loading.close()


def test_who_wants_to_be_alone_is_let_in_before_those_who_came_later():
    gate, order = capture.Gate(), []
    inside, leave = threading.Event(), threading.Event()

    def first():
        with gate.together():
            inside.set()
            assert leave.wait(TIMEOUT_S)
            order.append("first")

    def alone():
        with gate.alone():
            order.append("alone")

    def late():
        with gate.together():
            order.append("late")

    def waiting(count):
        while gate._waiting < count:  # noqa: SLF001
            pass

    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(first)]
        assert inside.wait(TIMEOUT_S)
        futures.append(pool.submit(alone))
        waiting(1)
        futures.append(pool.submit(late))
        leave.set()
        for future in futures:
            future.result(TIMEOUT_S)
    assert order == ["first", "alone", "late"]


def test_a_capture_that_fails_lets_the_others_in_again():
    gate = capture.Gate()
    with pytest.raises(ValueError, match="lost"), gate.alone():
        raise ValueError("lost")
    with gate.together(), gate.together():
        pass
