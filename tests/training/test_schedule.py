from itertools import pairwise

import numpy as np
import pytest

from training.config import ScheduleConfig
from training.schedule import rate


def rates(total=100, **config):
    return [rate(ScheduleConfig(**config), step, total) for step in range(total)]


@pytest.mark.parametrize("name", ["one-cycle", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.3])
def test_reaches_the_peak_and_never_leaves_its_range(name, warmup):
    values = rates(name=name, warmup=warmup)
    assert max(values) == 1.0
    assert min(values) > 0
    peak = values.index(1.0)
    assert peak == max(0, round(warmup * 100) - 1)
    assert all(a < b for a, b in pairwise(values[: peak + 1]))


@pytest.mark.parametrize("name", ["one-cycle", "cosine"])
def test_falls_to_the_final_rate(name):
    values = rates(1000, name=name, final=0.1)
    assert values[-1] == pytest.approx(0.1, abs=0.001)
    fall = values[values.index(1.0) :]
    assert all(a >= b for a, b in pairwise(fall))


@pytest.mark.parametrize("name", ["one-cycle", "cosine"])
def test_the_peak_is_had_once(name):
    assert rates(3, name=name, warmup=0.3) == pytest.approx([1.0, 0.75, 0.25])
    assert rates(10, name=name, warmup=0.3).count(1.0) == 1


def test_constant_stays():
    assert set(rates(name="constant", warmup=0.0)) == {1.0}


def test_a_single_step_learns():
    assert rates(1) == [1.0]


def test_the_warm_up_has_the_shape_that_its_name_says():
    half = {name: rate(ScheduleConfig(name=name, warmup=0.4), 9, 100) for name in ("one-cycle", "cosine", "constant")}
    assert half["one-cycle"] == pytest.approx((1 - np.cos(np.pi * 0.25)) / 2)
    assert half["cosine"] == half["constant"] == pytest.approx(0.25)
