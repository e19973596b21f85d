"""Loads, unloads and routes that an operator asks for, beside polls, failures and each other."""

import asyncio
import itertools
import shutil
import threading

import pytest
import toys
from repositories import Gate, damage, failures, opened, served, waiting_for_their_turn

from service.errors import (
    ArtifactError,
    ModelNotReadyError,
    NotFoundError,
)
from service.routing import Routing


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
        assert failures(repository) == []  # that it is gone is no failure to load it


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
