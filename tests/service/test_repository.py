"""Which version answers, what is said of those that do not, and what a start makes of the files it finds."""

import asyncio
import itertools
import math
import shutil
import threading
from contextlib import asynccontextmanager

import prometheus_client
import pytest
import structlog
import toys
from repositories import damage, filled, opened, served, waiting_for_their_turn

from service import artifact, serving
from service.errors import (
    ArtifactError,
    ConfigurationError,
    EngineError,
    InvalidRequestError,
    ModelNotReadyError,
    NotFoundError,
)
from service.routing import Routing
from service.sources import RemoteSource


@pytest.fixture
def root(tmp_path):
    return filled(tmp_path)


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
        assert [engine.closed for engine in repository.engines].count(False) == len(before)
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


async def test_a_number_that_the_api_cannot_name_is_no_version(root):
    shutil.copytree(root / "grey" / "10", root / "grey" / str(2**63))
    async with opened(root) as repository:
        await repository.load_all()
        assert repository.get("grey").number == 10


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
        assert list(repository.failures()) == []  # that it is gone is no failure to load it


async def test_a_route_forgets_what_was_done_by_hand(root):
    async with opened(root, names=("grey",), routings={"grey": Routing("all")}) as repository:
        await repository.load_all()
        await repository.unload("grey", 1)
        await repository.poll()
        assert served(repository) == [("grey", 2), ("grey", 10)]
        await repository.route("grey", Routing("1,10"))
        await repository.poll()
        await repository.poll()  # the first leaves alone what was changed meanwhile

        assert served(repository) == [("grey", 1), ("grey", 10)]


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
        await waiting_for_their_turn()
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


async def test_an_unloaded_model_answers_again_when_all_that_its_routing_needs_is_there(root):
    loads, second, go = itertools.count(), threading.Event(), threading.Event()

    def before_load(_):
        if next(loads) == 4:  # 1, 10 and the other at the start, then 1 and 10 again
            second.set()
            assert go.wait(toys.TIMEOUT_S)

    async with opened(root, before_load, routings={"grey": Routing("1,10")}) as repository:
        await repository.load_all()
        await repository.unload("grey")
        loading = asyncio.create_task(repository.load("grey"))
        try:
            assert await asyncio.to_thread(second.wait, toys.TIMEOUT_S)
            with pytest.raises(ModelNotReadyError):
                repository.get("grey")
        finally:
            go.set()
        await loading
        assert repository.get("grey").number == 10


async def test_a_version_that_is_refused_for_its_name_gives_its_memory_back(root, monkeypatch):
    engines = []

    class Kept(toys.ToyEngine):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            engines.append(self)

    monkeypatch.setattr(toys, "ToyEngine", Kept)
    (root / "other").rename(root / "renamed")
    async with opened(root, names=("renamed",)) as repository:
        with pytest.raises(ArtifactError, match="the directory says renamed"):
            await repository.load_all()
        assert [engine.closed for engine in engines] == [True]
