"""Which version answers, what is said of those that do not, and what a start makes of the files it finds."""

import asyncio
import itertools
import shutil
import threading
from contextlib import asynccontextmanager

import pytest
import structlog
import toys

from service import serving
from service.errors import ConfigurationError, ModelNotReadyError, NotFoundError, OutOfReachError
from service.metrics import Metrics
from service.repository import Repository
from service.routing import Routing
from service.sources import LocalSource


@asynccontextmanager
async def opened(root, before_load=lambda gently: None, **options):
    """A repository with toy engines, not loaded yet."""
    metrics = Metrics()

    def load(path, gently):
        before_load(gently)
        return serving.load(
            path,
            lambda version: [toys.ToyEngine(len(version.manifest.classes))],
            metrics.model,
            window_s=0.0,
            codel_target_s=0.0,
            in_turn_s=0.0,
            gently=gently,
            on_device_lost=pytest.fail,
        )

    repository = Repository(LocalSource(root), load, metrics, release_timeout_s=2.0, **options)
    repository.registry = metrics.registry
    try:
        yield repository
    finally:
        await repository.close()


@pytest.fixture
def root(tmp_path):
    for number in (1, 2, 10):
        toys.write_version(tmp_path, "grey", number)
    toys.write_version(tmp_path, "other")
    return tmp_path


def served(repository):
    return [(model.name, model.number) for model in repository]


async def test_the_latest_of_every_model_is_served(root):
    async with opened(root) as repository:
        await repository.load_all()

        assert served(repository) == [("grey", 10), ("other", 1)]
        assert repository.get("grey").number == repository.get("grey", 10).number == 10


async def test_before_the_end_of_loading_nothing_is_unknown_yet(root):
    async with opened(root) as repository:
        with pytest.raises(ModelNotReadyError) as caught:
            repository.get("grey")

    assert caught.value.retry_after_ms


async def test_what_is_not_there_is_not_found_and_what_is_there_is_named(root):
    async with opened(root) as repository:
        await repository.load_all()

        with pytest.raises(NotFoundError, match=r"'nope'.*grey, other"):
            repository.get("nope")
        with pytest.raises(NotFoundError, match="no version 2; served are: 10"):
            repository.get("grey", 2)


async def test_no_name_is_enough_only_where_there_is_one_model(root):
    async with opened(root) as repository:
        await repository.load_all()
        with pytest.raises(NotFoundError):
            repository.get("")
    async with opened(root, names=("other",)) as repository:
        await repository.load_all()

        assert repository.get("").name == "other"


@asynccontextmanager
async def stopped_at(root, number, **options):
    """A repository that is being loaded and has come to its load of so many, counted from 1; and what lets it end."""
    come, go = asyncio.Event(), threading.Event()
    loop, loads = asyncio.get_running_loop(), itertools.count(1)

    def before_load(_):
        if next(loads) == number:
            loop.call_soon_threadsafe(come.set)
            assert go.wait(20)

    async with opened(root, before_load, **options) as repository:
        loading = asyncio.create_task(repository.load_all())
        await asyncio.wait_for(come.wait(), 20)

        async def end():
            go.set()
            await loading

        try:
            yield repository, end
        finally:
            await end()


async def test_while_others_are_loaded_a_name_is_needed(root):
    async with stopped_at(root, 2) as (repository, _):  # grey is served, other is not
        assert repository.get("grey").number == 10
        with pytest.raises(ModelNotReadyError):
            repository.get("")
        with pytest.raises(ModelNotReadyError):
            repository.get("nope")


@pytest.mark.parametrize("routing", [Routing("all", {10: 1.0}), Routing("10", shadow=1)])
async def test_a_model_answers_when_all_that_its_routing_needs_is_there(root, routing):
    async with stopped_at(root, 2, routings={"grey": routing}) as (repository, end):
        assert [number for _, number in served(repository)] == [1]
        with pytest.raises(ModelNotReadyError):
            repository.get("grey")
        await end()

        assert repository.get("grey").number == 10


async def test_a_shadow_that_is_left_alone_does_not_answer(root):
    async with opened(root, routings={"grey": Routing("10", shadow=1)}) as repository:
        await repository.load_all()
        await repository.unload("grey", 10)
        with pytest.raises(NotFoundError, match="shadow"):
            repository.get("grey")

        assert repository.default("grey") is None
        assert repository.get("grey", 1).number == 1


async def test_what_was_out_of_reach_is_tried_again_although_nothing_changed(root, monkeypatch):
    async with opened(root) as repository:
        await repository.load_all()
        toys.write_version(root, "grey", 11)

        def lost(*_):
            raise OutOfReachError("the network is down")

        with monkeypatch.context() as patch:
            patch.setattr(LocalSource, "fetch", lost)
            await repository.poll()
        assert [number for _, number, _ in repository.failures()] == [11]
        await repository.poll()

        assert served(repository) == [("grey", 11), ("other", 1)]
        assert not list(repository.failures())


async def test_a_failed_version_that_is_gone_is_no_failure_any_more(root):
    async with opened(root) as repository:
        await repository.load_all()
        paths = [toys.write_version(root, name, 11, canary_shift=0.5) for name in ("grey", "new")]
        await repository.poll()
        assert [(name, number) for name, number, _ in repository.failures()] == [("grey", 11), ("new", 11)]
        for path in paths:
            shutil.rmtree(path)
        await repository.poll()

        assert not list(repository.failures())


async def test_settings_of_what_is_not_there_are_told(root):
    routings = {"grey": Routing(traffic={1: 1.0, 8: 1.0}, shadow=9), "gray": Routing()}
    with structlog.testing.capture_logs() as lines:
        async with opened(root, routings=routings) as repository:
            await repository.load_all()

    told = [line for line in lines if line["event"].startswith("settings name")]
    assert [(line["model"], line.get("versions")) for line in told] == [("grey", [8, 9]), ("gray", None)]


async def test_a_routing_may_keep_several_versions(root):
    async with opened(root, routings={"grey": Routing(versions="latest:2")}) as repository:
        await repository.load_all()

        assert served(repository) == [("grey", 2), ("grey", 10), ("other", 1)]
        assert repository.get("grey", 2).number == 2
        assert repository.get("grey").number == 10


async def test_a_directory_that_is_another_model_is_refused(root):
    (root / "other").rename(root / "renamed")

    async with opened(root) as repository:
        with pytest.raises(Exception, match=r"the manifest says model other, the directory says renamed"):
            await repository.load_all()


async def test_staging_and_strangers_are_no_models(root):
    (root / ".hidden" / "1").mkdir(parents=True)
    (root / "empty").mkdir()
    (root / "notes.txt").write_text("x")
    (root / "grey" / ".11.writing-abc").mkdir()
    (root / "grey" / "11").mkdir()  # a copy that has not got its manifest yet

    async with opened(root) as repository:
        await repository.load_all()

        assert served(repository) == [("grey", 10), ("other", 1)]


async def test_a_missing_directory_says_how_to_get_one(tmp_path):
    async with opened(tmp_path / "nowhere") as repository:
        with pytest.raises(ConfigurationError, match=r"nowhere does not exist.*convoy train"):
            await repository.load_all()


async def test_loading_is_measured_and_failures_are_counted(root):
    model = root / "other" / "1" / "model.onnx"
    model.write_bytes(b"damaged")
    async with opened(root) as repository:
        with pytest.raises(Exception, match="does not match"):
            await repository.load_all()
        value = repository.registry.get_sample_value

        assert value("convoy_model_load_seconds", {"model": "grey", "version": "10"}) > 0
        assert value("convoy_canary_ok", {"model": "grey", "version": "10"}) == 1
        assert value("convoy_model_load_failures_total", {"model": "other"}) == 1


async def test_close_releases_every_engine(root):
    async with opened(root) as repository:
        await repository.load_all()
        engines = [model.engine for model in repository]

    assert [engine.closed for engine in engines] == [True, True]


class Gate:
    """Holds loads until it is opened."""

    def __init__(self):
        self.began = threading.Event()
        self.open = threading.Event()
        self.open.set()

    def __call__(self, _gently):
        self.began.set()
        assert self.open.wait(toys.TIMEOUT_S)

    async def hold(self, change):
        """Starts a change that loads; returns when it is being held."""
        self.began.clear()
        self.open.clear()
        task = asyncio.create_task(change)
        assert await asyncio.to_thread(self.began.wait, toys.TIMEOUT_S)
        return task


async def test_a_load_is_carried_through_when_its_caller_hangs_up_and_the_next_one_waits_for_it(root):
    gate = Gate()
    async with opened(root, gate) as repository:
        await repository.load_all()
        task = await gate.hold(repository.load("grey", 2))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.open.set()
        await repository.load("other")

        assert served(repository) == [("grey", 2), ("grey", 10), ("other", 1)]


async def test_closing_does_not_wait_for_a_load_under_way(root):
    gate = Gate()
    async with opened(root, gate) as repository:
        await repository.load_all()
        task = await gate.hold(repository.load("grey", 2))
        await repository.close()
        gate.open.set()
        with pytest.raises(asyncio.CancelledError):
            await task

        assert served(repository) == []


async def test_only_what_loads_beside_a_served_model_loads_gently(root):
    gently = []
    async with opened(root, gently.append, names=("grey",)) as repository:
        await repository.load_all()
        await repository.load("grey")
    assert gently == [False, True]
