"""Copies for a shadow version: compared, bounded in number, and ended without a trace."""

import asyncio
import gc
import warnings

import pytest

from service.errors import EngineError
from service.metrics import Metrics
from service.shadow import Shadow


@pytest.fixture
def metrics():
    return Metrics()


def counted(metrics):
    outcomes = ("agree", "disagree", "failed", "skipped")
    labels = [{"model": "grey", "version": "2", "outcome": outcome} for outcome in outcomes]
    values = [metrics.registry.get_sample_value("convoy_shadow_images_total", each) for each in labels]
    return {outcome: value for outcome, value in zip(outcomes, values, strict=True) if value is not None}


async def found(*classes):
    return classes


async def failing():
    raise EngineError("broken")


async def settle(metrics, outcomes):
    """Copies go on whenever the loop turns: a few turns end them."""
    for _ in range(20):
        await asyncio.sleep(0)
    assert counted(metrics) == outcomes


async def test_agreement_is_counted_by_image(metrics):
    shadow = Shadow(metrics)
    shadow.copy("grey", 2, [1, 2, None], 10, found(1, 3, None))
    await settle(metrics, {"agree": 2, "disagree": 1})
    await shadow.close()


async def test_a_copy_that_fails_is_counted_as_such(metrics):
    shadow = Shadow(metrics)
    shadow.copy("grey", 2, [1, 2], 10, failing())
    await settle(metrics, {"failed": 2})
    await shadow.close()


async def test_more_copies_than_may_be_under_way_are_skipped(metrics):
    shadow, go = Shadow(metrics), asyncio.Event()

    async def held():
        await go.wait()
        return [1]

    for _ in range(20):
        shadow.copy("grey", 2, [1], 10, held())
    assert counted(metrics) == {"skipped": 4}
    go.set()
    await settle(metrics, {"agree": 16, "disagree": 0, "skipped": 4})
    await shadow.close()


@pytest.mark.parametrize(("images", "nbytes", "fitting"), [(64, 10, 4), (1, 24 << 20, 2), (300, 100 << 20, 1)])
async def test_what_copies_hold_is_bounded_too_and_one_always_fits(metrics, images, nbytes, fitting):
    shadow, go = Shadow(metrics), asyncio.Event()

    async def held():
        await go.wait()
        return [1] * images

    for _ in range(6):
        shadow.copy("grey", 2, [1] * images, nbytes, held())
    assert counted(metrics) == {"skipped": (6 - fitting) * images}
    go.set()
    await settle(metrics, {"agree": fitting * images, "disagree": 0, "skipped": (6 - fitting) * images})
    shadow.copy("grey", 2, [1] * images, nbytes, held())
    await settle(metrics, {"agree": (fitting + 1) * images, "disagree": 0, "skipped": (6 - fitting) * images})
    await shadow.close()


async def test_a_copy_that_never_began_ends_without_a_warning(metrics):
    shadow = Shadow(metrics)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        shadow.copy("grey", 2, [1], 10, found(1))
        await shadow.close()  # before the loop could begin it
        gc.collect()

    assert [str(each.message) for each in caught] == []
    assert counted(metrics) == {}


async def test_a_version_is_in_use_as_long_as_its_copy_lasts(metrics):
    shadow, go, uses = Shadow(metrics), asyncio.Event(), []

    class Use:
        def __enter__(self):
            uses.append(True)

        def __exit__(self, *_):
            uses.append(False)

    async def held():
        await go.wait()
        return [1]

    shadow.copy("grey", 2, [1], 10, held(), Use())
    await asyncio.sleep(0)
    assert uses == [True]
    go.set()
    await settle(metrics, {"agree": 1, "disagree": 0})
    assert uses == [True, False]
    await shadow.close()
