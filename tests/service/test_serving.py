"""A version in service: what it takes up, what it tells, and what it gives back."""

import time

import numpy as np
import pytest
import toys

from service import serving
from service.errors import CanaryError, DeviceLostError
from service.metrics import Metrics


def loaded(root, engines, **options):
    sane = {"window_s": 0.0, "codel_target_s": 0.0, "in_turn_s": 0.0, "gently": False, "on_device_lost": pytest.fail}
    return serving.load(root, lambda _: engines, Metrics().model, **{**sane, **options})


def test_engines_of_a_version_that_fails_its_canary_give_their_memory_back(tmp_path):
    engines = [toys.ToyEngine(), toys.ToyEngine(nan_at=85)]
    with pytest.raises(CanaryError):  # whichever executor it is that fails
        loaded(toys.write_version(tmp_path), engines)

    assert [engine.closed for engine in engines] == [True, True]


def test_executors_that_would_get_no_batch_give_their_memory_back(tmp_path):
    engines = [toys.ToyEngine() for _ in range(3)]
    loaded(toys.write_version(tmp_path), list(engines), in_turn_s=1.0)

    assert [engine.closed for engine in engines] == [False, True, True]


async def test_a_version_that_is_used_for_too_long_is_released_all_the_same(tmp_path):
    engine = toys.ToyEngine()
    model, _ = loaded(toys.write_version(tmp_path), [engine])
    model.batcher.start()
    with model.in_use():
        await model.release(0.01)
    assert engine.closed


async def test_a_lost_device_is_told_and_fails_the_request(tmp_path):
    """Liveness depends on it: nothing else restarts a server whose GPU is gone."""
    lost, engine = [], toys.ToyEngine()
    model, _ = loaded(toys.write_version(tmp_path), [engine], on_device_lost=lost.append)
    model.batcher.start()
    engine.fail_next(DeviceLostError("an illegal memory access"))
    with pytest.raises(DeviceLostError):
        await model.batcher.submit(np.zeros((1, 8, 8, 1), np.uint8), 1, time.monotonic() + 20)
    await model.release(1.0)

    assert [str(error) for error in lost] == ["an illegal memory access"]
