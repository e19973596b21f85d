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
from repositories import Gate, damage, opened, served, waiting_for_their_turn

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
