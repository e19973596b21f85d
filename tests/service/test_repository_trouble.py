"""What the repository makes of versions and places that cannot be read, now or for good."""

import asyncio
import gc
import itertools
import os
import shutil
import threading
from pathlib import Path

import prometheus_client
import pytest
import structlog
import toys
from repositories import Clock, damage, failures, opened, served, waiting_for_their_turn

from service import artifact, loading
from service.batcher import Batcher
from service.errors import ArtifactError, ConfigurationError, OutOfReachError
from service.model_state import ModelState
from service.routing import Routing
from service.sources import LocalSource


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
        assert [number for _, number, _ in failures(repository)] == [11]
        clock.now += 1
        await repository.poll()

        assert served(repository) == [("grey", 11), ("other", 1)]
        assert not failures(repository)


async def test_a_failed_version_that_is_gone_is_no_failure_any_more(root):
    async with opened(root) as repository:
        await repository.load_all()
        paths = [toys.write_version(root, name, 11, canary_shift=0.5) for name in ("grey", "new")]
        await repository.poll()
        assert [(name, number) for name, number, _ in failures(repository)] == [("grey", 11), ("new", 11)]
        for path in paths:
            shutil.rmtree(path)
        await repository.poll()

        assert not failures(repository)


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
        [(name, number, reason)] = failures(repository)
        assert (name, number) == ("grey", 11)
        assert "cannot be read" in reason


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


async def test_a_repository_that_is_suddenly_empty_counts_as_out_of_reach(root):
    mounted = root.with_name(f"{root.name}-mounted")
    with structlog.testing.capture_logs() as lines:
        async with opened(root) as repository:
            await repository.load_all()
            root.rename(mounted)
            root.mkdir()
            for _ in range(2):
                await repository.poll()
                assert repository.registry.get_sample_value("convoy_repository_reachable") == 0
                assert served(repository) == [("grey", 10), ("other", 1)]
            root.rmdir()
            mounted.rename(root)
            await repository.poll()
            assert repository.registry.get_sample_value("convoy_repository_reachable") == 1

    assert len([line for line in lines if line["event"].startswith("repository is empty")]) == 1


async def test_a_version_whose_directory_goes_is_told_once(root):
    with structlog.testing.capture_logs() as lines:
        async with opened(root) as repository:
            await repository.load_all()
            shutil.rmtree(root / "grey")
            for _ in range(3):
                await repository.poll()
            assert served(repository) == [("grey", 10), ("other", 1)]

    told = [line for line in lines if line["event"].startswith("version is gone")]
    assert [(line["model"], line["version"]) for line in told] == [("grey", 10)]


async def test_what_failed_before_its_volume_went_away_counts_until_it_is_back(root):
    mounted = root.with_name(f"{root.name}-mounted")
    async with opened(root) as repository:
        await repository.load_all()
        damage(toys.write_version(root, "grey", 11))
        await repository.poll()
        root.rename(mounted)
        root.mkdir()
        await repository.poll()

        assert [number for _, number, _ in failures(repository)] == [11]
        assert repository.registry.get_sample_value("convoy_model_versions_lacking", {"model": "grey"}) == 1


async def test_versions_that_should_serve_and_do_not_show_in_the_metrics(root):
    def lacking():
        return repository.registry.get_sample_value("convoy_model_versions_lacking", {"model": "grey"})

    async with opened(root) as repository:
        await repository.load_all()
        assert lacking() == 0
        damage(toys.write_version(root, "grey", 11))
        await repository.poll()
        assert lacking() == 1
        toys.write_version(root, "grey", 12)
        await repository.poll()
        assert lacking() == 0  # nobody needs version 11 any more
        damage(root / "grey" / "12")
        await repository.poll()
        assert lacking() == 1  # in service, but as it was before
        await repository.unload("grey")
        assert lacking() == 0


async def test_a_load_that_lasts_is_told_again_and_again_until_it_ends(root, monkeypatch):
    monkeypatch.setattr(loading, "_LONG_LOAD_S", 0.01)
    held = threading.Event()

    with structlog.testing.capture_logs() as lines:

        def told():
            return [line["version"] for line in lines if line["event"] == "model is still being loaded"]

        async with opened(root, lambda gently: held.wait(30), names=("grey",)) as repository:
            task = asyncio.create_task(repository.load_all())
            await asyncio.sleep(0.5)
            held.set()
            await task
            count = len(told())
            await asyncio.sleep(0.1)
            assert told() == [10] * count
            assert count > 1


@pytest.mark.parametrize("place", ["load", "start"])
async def test_a_shortage_of_threads_passes(root, monkeypatch, place):
    clock, short = Clock(), threading.Event()

    def out_of_threads(*_):
        if short.is_set():
            raise RuntimeError("can't start new thread")

    start = Batcher.start
    if place == "start":
        monkeypatch.setattr(Batcher, "start", lambda batcher: (out_of_threads(), start(batcher)))
    async with opened(root, out_of_threads if place == "load" else lambda _: None, clock=clock) as repository:
        await repository.load_all()
        toys.write_version(root, "grey", 11)
        short.set()
        await repository.poll()
        assert [number for _, number, _ in failures(repository)] == [11]
        assert served(repository) == [("grey", 10), ("other", 1)]
        short.clear()
        clock.now += 1
        await repository.poll()

        assert served(repository) == [("grey", 11), ("other", 1)]


async def test_a_copy_that_vanished_while_it_was_loaded_is_tried_again(root):
    clock, vanishing = Clock(), threading.Event()

    def before_load(_):
        if vanishing.is_set():
            vanishing.clear()
            (root / "grey" / "11").rename(root / "grey" / "aside")

    async with opened(root, before_load, clock=clock) as repository:
        await repository.load_all()
        toys.write_version(root, "grey", 11)
        vanishing.set()
        await repository.poll()
        assert served(repository) == [("grey", 10), ("other", 1)]
        (root / "grey" / "aside").rename(root / "grey" / "11")
        clock.now += 1
        await repository.poll()

        assert served(repository) == [("grey", 11), ("other", 1)]


async def test_a_failure_that_nobody_waits_for_is_no_complaint_of_the_event_loop(root):
    complaints = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context["message"]))
    held = threading.Event()
    async with opened(root, lambda _: held.wait(30), names=("grey",)) as repository:
        damage(root / "grey" / "10")
        loading = asyncio.create_task(repository.load("grey"))
        await waiting_for_their_turn()
        loading.cancel()
        held.set()
        await asyncio.gather(loading, return_exceptions=True)
        while not failures(repository):
            await waiting_for_their_turn()
    gc.collect()
    await asyncio.sleep(0)

    assert complaints == []


async def test_a_load_that_never_ends_holds_up_no_unload_of_another_model(root):
    held, hanging = threading.Event(), threading.Event()

    def before_load(_):
        if hanging.is_set():
            held.wait(30)

    async with opened(root, before_load) as repository:
        await repository.load_all()
        hanging.set()
        loading = asyncio.create_task(repository.load("other"))
        await waiting_for_their_turn()
        await asyncio.wait_for(repository.unload("grey"), 10)
        assert served(repository) == [("other", 1)]
        held.set()
        await loading


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
        assert failures(repository) == []


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
        assert failures(repository) == []


async def test_a_new_version_that_cannot_be_looked_at_is_a_failure_until_it_can(root):
    source, clock = Unsteady(root), Clock()
    async with opened(root, source=source, names=("grey",), clock=clock) as repository:
        await repository.load_all()
        toys.write_version(root, "grey", 11)
        source.broken = (("grey", 11),)
        for _ in range(4):
            await repository.poll()
        assert failures(repository) == [("grey", 11, "grey version 11 cannot be listed")]
        assert repository.registry.get_sample_value("convoy_model_load_failures_total", {"model": "grey"}) == 1
        clock.now += 1
        source.broken = ()
        await repository.poll()
        loaded = repository.get("grey")
        await repository.poll()

        assert repository.get("grey") is loaded
        assert (loaded.number, failures(repository)) == (11, [])


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

        assert [(name, number) for name, number, _ in failures(repository)] == [("grey", 11)]
        assert served(repository) == [("grey", 10), ("other", 1)]


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
        [(_, _, reason)] = failures(repository)
        short.clear()
        clock.now += 1
        await repository.poll()

        assert "not enough memory" in reason
        assert served(repository) == [("grey", 11)]


def test_pauses_stop_growing():
    state = ModelState(Routing())
    for _ in range(20):
        state.note_failure(1, OutOfReachError("away"), 0.0)

    assert state.may_try_again(1, 300.0)


async def test_a_version_that_failed_and_was_taken_away_is_tried_when_it_comes_back_as_it_was(root, tmp_path_factory):
    broken, aside = False, tmp_path_factory.mktemp("aside") / "11"

    def before_load(_):
        if broken:
            raise ArtifactError("broken")

    async with opened(root, before_load, names=("grey",)) as repository:
        await repository.load_all()
        broken = True
        path = toys.write_version(root, "grey", 11)
        await repository.poll()
        path.rename(aside)
        await repository.poll()
        broken = False
        aside.rename(path)
        await repository.poll()

        assert served(repository) == [("grey", 11)]


def test_a_model_that_was_unloaded_lacks_nothing():
    state = ModelState(Routing(), present=[1], failed={1: "broken"})
    assert state.lacking == [1]
    state.unloaded = True
    assert state.lacking == []


def test_of_a_split_in_halves_the_newer_is_the_default():
    old, new = object(), object()
    assert ModelState(Routing(traffic={1: 0.5, 2: 0.5}), served={1: old, 2: new}).default() is new


def test_a_version_is_no_shadow_of_itself():
    old, new = object(), object()
    state = ModelState(Routing(shadow=1), served={1: old, 2: new})
    assert (state.shadow(new), state.shadow(old)) == (old, None)
