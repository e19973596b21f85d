"""Which version answers, what is said of those that do not, and what a start makes of the files it finds."""

import asyncio
import itertools
import math
import os
import shutil
import threading
from contextlib import asynccontextmanager
from pathlib import Path

import prometheus_client
import pytest
import structlog
import toys

from service import artifact, serving
from service.errors import (
    ArtifactError,
    ConfigurationError,
    EngineError,
    InvalidRequestError,
    ModelNotReadyError,
    NotFoundError,
    OutOfReachError,
)
from service.metrics import Metrics
from service.repository import Repository
from service.routing import Routing
from service.sources import LocalSource, RemoteSource


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@asynccontextmanager
async def opened(root, before_load=lambda gently: None, *, source=None, **options):
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

    repository = Repository(source or LocalSource(root), load, metrics, release_timeout_s=2.0, **options)
    repository.metrics, repository.registry = metrics, metrics.registry
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
    clock = Clock()
    async with opened(root, clock=clock) as repository:
        await repository.load_all()
        toys.write_version(root, "grey", 11)

        def lost(*_):
            raise OutOfReachError("the network is down")

        with monkeypatch.context() as patch:
            patch.setattr(LocalSource, "fetch", lost)
            await repository.poll()
        assert [number for _, number, _ in repository.failures()] == [11]
        clock.now += 1
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


def broken(root, number):
    """A version whose canary fails."""
    return toys.write_version(root, "grey", number, canary_shift=0.5)


PINNED = {"grey": Routing(versions="1")}


async def test_while_a_route_loads_nothing_of_it_answers(root):
    gate, loads = Gate(), itertools.count(1)

    def before_load(gently):
        if next(loads) == 3:  # after the start's and the first of the route's
            gate(gently)

    async with opened(root, before_load, names=("grey",), routings=PINNED) as repository:
        await repository.load_all()
        task = await gate.hold(repository.route("grey", Routing("all", traffic={1: 98.0, 2: 1.0, 10: 1.0})))
        assert {repository.get("grey").number for _ in range(50)} == {1}
        gate.open.set()
        await task

        assert served(repository) == [("grey", 1), ("grey", 2), ("grey", 10)]


async def test_a_refused_route_leaves_everything_as_it_was(root):
    broken(root, 11)
    async with opened(root, routings=PINNED) as repository:
        await repository.load_all()
        before = served(repository)
        with pytest.raises(ArtifactError, match="canary"):
            await repository.route("grey", Routing("all", traffic={1: 98.0, 2: 1.0, 11: 1.0}))

        assert served(repository) == before
        assert repository.get("grey").number == 1
        assert repository.routing("grey") == PINNED["grey"]
        await repository.route("grey", Routing("2"))  # what was given up is loaded again
        assert repository.get("grey").number == 2


@pytest.mark.parametrize(
    "routing",
    [Routing("11"), Routing("11", traffic={11: 1.0}), Routing(traffic={1: 1.0, 11: 1.0}), Routing("1", shadow=11)],
    ids=["policy", "all traffic", "split", "shadow"],
)
async def test_a_route_to_a_version_that_cannot_be_served_is_refused_each_time(root, routing):
    broken(root, 11)
    async with opened(root, routings=PINNED) as repository:
        await repository.load_all()
        for _ in range(2):
            with pytest.raises(ArtifactError, match="canary"):
                await repository.route("grey", routing)
            await repository.poll()

        assert repository.get("grey").number == 1


async def canary_ok(repository, number=10):
    await repository.check_canaries()
    return repository.registry.get_sample_value("convoy_canary_ok", {"model": "grey", "version": str(number)})


async def test_a_canary_that_could_not_run_says_nothing_and_one_that_failed_does(root):
    async with opened(root) as repository:
        await repository.load_all()
        model = repository.get("grey")
        images = model.version.path / artifact.CANARY_DIR
        images.rename(images.with_name("elsewhere"))
        assert await canary_ok(repository) == 1
        images.with_name("elsewhere").rename(images)

        model.engine.fail_next(EngineError("lost"))
        assert await canary_ok(repository) == 0
        assert await canary_ok(repository) == 1
        model.engine.nan_at = model.engine.batches[-1][0]
        assert await canary_ok(repository) == 0
        name = "convoy_canary_difference"
        assert math.isnan(repository.registry.get_sample_value(name, {"model": "grey", "version": "10"}))


async def test_a_canary_that_does_not_get_its_turn_is_given_up(root, monkeypatch):
    monkeypatch.setattr(serving, "_CANARY_DEADLINE_S", 0.2)
    async with opened(root, names=("grey",)) as repository:
        await repository.load_all()
        engine = repository.get("grey").engine
        engine.pause()
        try:
            assert await asyncio.wait_for(canary_ok(repository), 10) == 1
        finally:
            engine.resume()


async def test_a_canary_of_a_version_that_is_retired_meanwhile_leaves_no_series(root):
    async with opened(root, names=("grey",)) as repository:
        await repository.load_all()
        engine = repository.get("grey").engine
        engine.pause()
        checking = asyncio.create_task(repository.check_canaries())
        await engine.began()
        await repository.load("grey", 2)
        await repository.unload("grey", 10)
        engine.fail_next(EngineError("lost"))
        engine.resume()
        await checking

        labels = {"model": "grey", "version": "10"}
        assert repository.registry.get_sample_value("convoy_canary_ok", labels) is None


async def test_a_directory_that_cannot_be_read_or_named_is_passed_over_once(root, monkeypatch):
    strange = root / os.fsdecode(b"caf\xe9") / "1"
    strange.mkdir(parents=True)
    (strange / artifact.MANIFEST).touch()
    iterdir = Path.iterdir

    def unreadable(path):
        if path.name == "other":
            raise PermissionError(13, "Permission denied")
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", unreadable)
    with structlog.testing.capture_logs() as lines:
        async with opened(root) as repository:
            await repository.load_all()
            await repository.poll()
            assert served(repository) == [("grey", 10)]
            prometheus_client.generate_latest(repository.registry)

    reasons = [line["reason"] for line in lines if line["event"] == "directory passed over"]
    assert len(reasons) == 2
    assert "not in UTF-8" in " ".join(reasons)
    assert "Permission denied" in " ".join(reasons)


async def test_a_version_that_cannot_be_read_is_counted_and_the_others_go_on(root):
    def before_load(_):
        if harmed.is_set():
            harmed.clear()
            raise PermissionError(13, "Permission denied")

    harmed = threading.Event()
    async with opened(root, before_load) as repository:
        await repository.load_all()
        toys.write_version(root, "grey", 11)
        toys.write_version(root, "other", 2)
        harmed.set()
        await repository.poll()

        assert served(repository) == [("grey", 10), ("other", 2)]
        [(name, number, reason)] = repository.failures()
        assert (name, number) == ("grey", 11)
        assert "cannot be read" in reason


async def test_a_number_that_the_api_cannot_name_is_no_version(root):
    shutil.copytree(root / "grey" / "10", root / "grey" / str(2**63))
    async with opened(root) as repository:
        await repository.load_all()
        assert repository.get("grey").number == 10


async def test_whether_the_repository_can_be_reached_shows_in_the_metrics(root):
    elsewhere = root.with_name(f"{root.name}-elsewhere")
    async with opened(root) as repository:
        await repository.load_all()
        reached = []
        for move in (lambda: None, lambda: root.rename(elsewhere), lambda: elsewhere.rename(root)):
            move()
            await repository.poll()
            reached.append(repository.registry.get_sample_value("convoy_repository_reachable"))
        assert reached == [1, 0, 1]


async def waiting_for_their_turn():
    """Until changes have looked at the source and wait behind the one that is held."""
    for _ in range(20):
        await asyncio.to_thread(lambda: None)


def damage(path):
    (path / "model.onnx").write_bytes(b"damaged")


@pytest.mark.parametrize(
    ("routing", "start", "published"),
    [
        (Routing(shadow=1), [("grey", 1), ("grey", 10)], 11),
        (Routing("latest:2"), [("grey", 2), ("grey", 10)], 11),
        (Routing("10,11", shadow=1), [("grey", 1), ("grey", 10)], 11),
    ],
)
async def test_a_version_that_does_not_load_takes_none_out_of_service(root, routing, start, published):
    async with opened(root, names=("grey",), routings={"grey": routing}) as repository:
        await repository.load_all()
        assert served(repository) == start
        damage(toys.write_version(root, "grey", published))
        await repository.poll()

        assert served(repository) == start
        assert repository.get("grey").number == 10


async def test_what_was_loaded_by_hand_takes_nothing_over_from_the_latest(root):
    async with opened(root, names=("grey",)) as repository:
        await repository.load_all()
        await repository.load("grey", 1)
        damage(toys.write_version(root, "grey", 11))
        await repository.poll()

        assert served(repository) == [("grey", 1), ("grey", 10)]
        assert repository.get("grey").number == 10


async def test_the_only_version_that_answers_stays_when_its_directory_goes(root):
    async with opened(root, names=("grey",), routings={"grey": Routing("2", shadow=1)}) as repository:
        await repository.load_all()
        shutil.rmtree(root / "grey" / "2")
        await repository.poll()

        assert repository.get("grey").number == 2


async def test_what_was_loaded_by_hand_is_no_successor_of_a_version_that_goes(root):
    async with opened(root, names=("grey",), routings={"grey": Routing("2")}) as repository:
        await repository.load_all()
        await repository.load("grey", 1)
        shutil.rmtree(root / "grey" / "2")
        await repository.poll()

        assert repository.get("grey").number == 2


@pytest.mark.parametrize("policy", ["all", "latest:2"])
async def test_a_version_that_does_not_load_keeps_none_that_was_taken_away(root, policy):
    async with opened(root, names=("grey",), routings={"grey": Routing(policy)}) as repository:
        await repository.load_all()
        damage(toys.write_version(root, "grey", 11))
        await repository.poll()
        shutil.rmtree(root / "grey" / "10")
        await repository.poll()

        assert repository.get("grey").number == 2


async def test_a_shadow_that_becomes_the_latest_is_still_no_answer(root):
    async with opened(root, names=("grey",), routings={"grey": Routing(shadow=11)}) as repository:
        await repository.load_all()
        toys.write_version(root, "grey", 11)
        await repository.poll()

        assert served(repository) == [("grey", 10), ("grey", 11)]
        assert repository.get("grey").number == 10
        await repository.route("grey", Routing(shadow=10))
        assert repository.get("grey").number == 11


async def test_a_model_of_which_only_a_shadow_is_there_is_refused(root):
    async with opened(root, routings={"other": Routing(shadow=1)}) as repository:
        with pytest.raises(ConfigurationError, match="model other"):
            await repository.load_all()
    async with opened(root) as repository:
        await repository.load_all()
        with pytest.raises(InvalidRequestError, match="beside its shadow"):
            await repository.route("other", Routing(shadow=1))
        assert repository.get("other").number == 1


async def test_an_unload_that_a_poll_waits_behind_is_not_undone(root):
    gate = Gate()
    async with opened(root, gate) as repository:
        await repository.load_all()
        loading = await gate.hold(repository.load("other", 1))
        unloading = asyncio.create_task(repository.unload("grey"))
        await asyncio.sleep(0)
        toys.write_version(root, "grey", 11)
        polling = asyncio.create_task(repository.poll())
        await waiting_for_their_turn()
        gate.open.set()
        await asyncio.gather(loading, unloading, polling)

        assert served(repository) == [("other", 1)]
        await repository.load("grey")
        assert repository.get("grey").number == 11


async def test_a_failed_load_forgets_nothing_that_was_done_by_hand(root):
    async with opened(root, names=("grey",), routings={"grey": Routing("all")}) as repository:
        await repository.load_all()
        await repository.unload("grey", 10)
        damage(root / "grey" / "1")
        with pytest.raises(ArtifactError):
            await repository.load("grey")
        await repository.poll()

        assert repository.get("grey").number == 2


async def test_a_failure_that_may_pass_is_tried_again_after_ever_longer_pauses(root, monkeypatch):
    clock, attempts = Clock(), []

    def failing(gently):
        attempts.append(clock.now)
        if broken:
            raise OSError(24, "Too many open files")

    broken = False
    async with opened(root, failing, names=("grey",), clock=clock) as repository:
        await repository.load_all()
        attempts.clear()
        broken = True
        toys.write_version(root, "grey", 11)
        for _ in range(300):
            await repository.poll()
            clock.now += 1
        pauses = [later - earlier for earlier, later in itertools.pairwise(attempts)]
        assert pauses == [1, 2, 4, 8, 16, 32, 64, 128]
        broken = False
        clock.now += 300
        await repository.poll()

        assert served(repository) == [("grey", 11)]
        assert list(repository.failures()) == []


class Unsteady(LocalSource):
    """Cannot look at some versions, or at nothing."""

    def __init__(self, root):
        super().__init__(root)
        self.broken = ()
        self.down = False

    def models(self):
        if self.down:
            raise ConfigurationError("it cannot be read")
        return super().models()

    def fingerprint(self, name, number):
        if (name, number) in self.broken:
            raise OutOfReachError(f"{name} version {number} cannot be listed")
        return super().fingerprint(name, number)


async def test_a_version_that_cannot_be_looked_at_holds_up_no_other(root):
    source = Unsteady(root)
    async with opened(root, source=source) as repository:
        await repository.load_all()
        before = repository.get("grey")
        toys.write_version(root, "other", 2)
        source.broken = (("grey", 10),)
        await repository.poll()
        source.broken = ()
        await repository.poll()

        assert served(repository) == [("grey", 10), ("other", 2)]
        assert repository.get("grey") is before
        assert list(repository.failures()) == []


async def test_a_new_version_that_cannot_be_looked_at_is_a_failure_until_it_can(root):
    source, clock = Unsteady(root), Clock()
    async with opened(root, source=source, names=("grey",), clock=clock) as repository:
        await repository.load_all()
        toys.write_version(root, "grey", 11)
        source.broken = (("grey", 11),)
        for _ in range(4):
            await repository.poll()
        assert list(repository.failures()) == [("grey", 11, "grey version 11 cannot be listed")]
        assert repository.registry.get_sample_value("convoy_model_load_failures_total", {"model": "grey"}) == 1
        clock.now += 1
        source.broken = ()
        await repository.poll()
        loaded = repository.get("grey")
        await repository.poll()

        assert repository.get("grey") is loaded
        assert (loaded.number, list(repository.failures())) == (11, [])


@pytest.mark.parametrize("number", [None, 10])
async def test_a_load_by_hand_of_what_cannot_be_looked_at_says_so(root, number):
    source = Unsteady(root)
    async with opened(root, source=source, names=("grey",)) as repository:
        await repository.load_all()
        before = repository.get("grey")
        source.broken = (("grey", 10),)
        with pytest.raises(OutOfReachError):
            await repository.load("grey", number)

        assert repository.get("grey") is before


async def test_traffic_moves_between_versions_in_service_while_the_source_is_down(root):
    source = Unsteady(root)
    async with opened(root, source=source, names=("grey",), routings={"grey": Routing("latest:2")}) as repository:
        await repository.load_all()
        source.down, source.broken = True, (("grey", 2), ("grey", 10))
        with pytest.raises(ConfigurationError):
            await repository.route("grey", Routing("1"))
        await repository.route("grey", Routing("latest:2", traffic={2: 1.0}))

        assert repository.get("grey").number == 2
        assert served(repository) == [("grey", 2), ("grey", 10)]


async def test_a_damaged_version_is_tried_once(root):
    clock = Clock()
    async with opened(root, names=("grey",), clock=clock) as repository:
        await repository.load_all()
        damage(toys.write_version(root, "grey", 11))
        for _ in range(5):
            await repository.poll()
            clock.now += 1000

        assert repository.registry.get_sample_value("convoy_model_load_failures_total", {"model": "grey"}) == 1


async def test_whatever_a_version_raises_ends_no_round(root):
    def raising(gently):
        if strange:
            raise ValueError("embedded null byte")

    strange = False
    async with opened(root, raising) as repository:
        await repository.load_all()
        strange = True
        toys.write_version(root, "grey", 11)
        await repository.poll()

        assert [(name, number) for name, number, _ in repository.failures()] == [("grey", 11)]
        assert served(repository) == [("grey", 10), ("other", 1)]


async def test_a_model_that_is_loaded_again_is_not_ready_rather_than_unknown(root):
    gate = Gate()
    async with opened(root, gate) as repository:
        await repository.load_all()
        await repository.unload("other")
        with pytest.raises(NotFoundError):
            repository.get("other")
        loading = await gate.hold(repository.load("other"))
        with pytest.raises(ModelNotReadyError):
            repository.get("other")
        gate.open.set()
        await loading

        assert repository.get("other").number == 1


async def test_a_start_tries_again_what_failed_by_hand_before(root):
    broken = True

    def failing(gently):
        if broken:
            raise OSError(24, "Too many open files")

    async with opened(root, failing, names=("grey",)) as repository:
        with pytest.raises(ArtifactError):
            await repository.load("grey", 10)
        broken = False
        await repository.load_all()

        assert served(repository) == [("grey", 10)]


async def test_a_failed_load_of_an_unloaded_model_leaves_it_unloaded(root):
    async with opened(root, names=("grey",), routings={"grey": Routing("all")}) as repository:
        await repository.load_all()
        await repository.unload("grey")
        damage(root / "grey" / "10")
        with pytest.raises(ArtifactError):
            await repository.load("grey")
        assert served(repository) == []
        with pytest.raises(NotFoundError):
            repository.get("grey")
        shutil.rmtree(root / "grey" / "10")
        await repository.load("grey")

        assert served(repository) == [("grey", 1), ("grey", 2)]


async def test_a_poll_that_looked_before_a_load_does_not_go_back_behind_it(root):
    gate = Gate()
    async with opened(root, gate) as repository:
        await repository.load_all()
        loading = await gate.hold(repository.load("other"))
        again = asyncio.create_task(repository.load("grey"))
        polling = asyncio.create_task(repository.poll())
        await waiting_for_their_turn()
        toys.write_version(root, "grey", 11)
        gate.open.set()
        await asyncio.gather(loading, again, polling)

        assert repository.get("grey").number == 11
        shutil.rmtree(root / "grey" / "11")
        await repository.poll()
        assert repository.get("grey").number == 10


async def test_the_copy_of_a_version_that_is_being_loaded_is_not_tidied_away(root, tmp_path_factory):
    gate, source = Gate(), RemoteSource(f"file://{root}", tmp_path_factory.mktemp("cache"))
    async with opened(root, gate, source=source, names=("grey",)) as repository:
        await repository.load_all()
        await repository.unload("grey")
        loading = await gate.hold(repository.load("grey", 2))
        shutil.rmtree(root / "grey" / "2")
        polling = asyncio.create_task(repository.poll())
        await waiting_for_their_turn()
        gate.open.set()
        await asyncio.gather(loading, polling)

        assert served(repository) == [("grey", 2)]


async def test_an_unload_while_the_model_is_being_loaded_has_the_last_word(root):
    gate = Gate()
    async with opened(root, gate) as repository:
        await repository.load_all()
        loading = await gate.hold(repository.load("grey", 2))
        unloading = asyncio.create_task(repository.unload("grey"))
        await waiting_for_their_turn()
        gate.open.set()
        await asyncio.gather(loading, unloading)
        await repository.poll()

        assert served(repository) == [("other", 1)]


async def test_a_route_goes_by_what_is_there_when_its_turn_comes(root):
    gate = Gate()
    async with opened(root, gate) as repository:
        await repository.load_all()
        loading = await gate.hold(repository.load("other"))
        routing = asyncio.create_task(repository.route("grey", Routing("latest", shadow=2)))
        await waiting_for_their_turn()
        toys.write_version(root, "grey", 11)
        gate.open.set()
        await asyncio.gather(loading, routing)

        assert served(repository) == [("grey", 2), ("grey", 11), ("other", 1)]


async def test_a_route_that_waited_behind_an_unload_brings_nothing_back(root):
    gate = Gate()
    async with opened(root, gate) as repository:
        await repository.load_all()
        loading = await gate.hold(repository.load("other"))
        unloading = asyncio.create_task(repository.unload("grey"))
        await asyncio.sleep(0)
        routing = asyncio.create_task(repository.route("grey", Routing("1")))
        await waiting_for_their_turn()
        gate.open.set()
        await asyncio.gather(loading, unloading)
        with pytest.raises(NotFoundError):
            await routing
        await repository.load("grey")

        assert served(repository) == [("grey", 10), ("other", 1)]


async def test_a_model_that_waits_for_its_turn_to_be_loaded_is_not_ready(root):
    gate = Gate()
    async with opened(root, gate, names=("grey", "other")) as repository:
        await repository.load_all()
        await repository.unload("grey")
        loading = await gate.hold(repository.load("other"))
        again = asyncio.create_task(repository.load("grey"))
        await waiting_for_their_turn()
        with pytest.raises(ModelNotReadyError):
            repository.get("grey")
        gate.open.set()
        await asyncio.gather(loading, again)

        assert repository.get("grey").number == 10


async def test_memory_that_is_short_for_a_while_does_not_keep_a_version_out(root):
    def before_load(_):
        if short.is_set():
            raise MemoryError

    clock, short = Clock(), threading.Event()
    async with opened(root, before_load, names=("grey",), clock=clock) as repository:
        await repository.load_all()
        toys.write_version(root, "grey", 11)
        short.set()
        await repository.poll()
        [(_, _, reason)] = repository.failures()
        short.clear()
        clock.now += 1
        await repository.poll()

        assert "not enough memory" in reason
        assert served(repository) == [("grey", 11)]


async def test_what_was_counted_of_a_version_ends_with_it(root):
    """Each version that ever was would stay in the metrics, and be sent at each scrape."""
    async with opened(root, names=("grey",)) as repository:
        await repository.load_all()
        metrics, lines = repository.metrics, []

        def scraped():
            return prometheus_client.generate_latest(repository.registry).decode().splitlines()

        for number in range(11, 15):
            toys.write_version(root, "grey", number)
            await repository.poll()
            metrics.answer_series("grey", number).total.observe(1.0)
            metrics.shadow_images.labels("grey", str(number), "agree").inc()
            await toys.eventually(
                lambda before=number - 1: not any(f'version="{before}"' in line for line in scraped())
            )
            lines.append(len(scraped()))
        assert len(set(lines)) == 1

        await repository.load("grey")  # the same number again: it goes on counting
        await waiting_for_their_turn()
        metrics.answer_series("grey", 14).total.observe(1.0)
        labels = {"model": "grey", "version": "14", "role": "answer"}
        assert repository.registry.get_sample_value("convoy_version_duration_seconds_count", labels) == 2


async def test_engines_are_closed_off_the_event_loop(root):
    """To give back gigabytes takes a while."""
    async with opened(root, names=("grey",)) as repository:
        await repository.load_all()
        threads, engine = [], repository.get("grey").engine
        engine.close = lambda: threads.append(threading.current_thread())
        await repository.load("grey")
        await toys.eventually(lambda: threads)

        assert threads != [threading.main_thread()]
