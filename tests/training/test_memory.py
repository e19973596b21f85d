"""Memory that stays with the process while it trains."""

from __future__ import annotations

import contextlib
import platform
import resource

import pytest
import torch

from service.resources import rss_bytes
from training.memory import kept_memory

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc can be told")

SIDE = 4096  # a float32 matrix of 64 MiB
BYTES = 4 * SIDE * SIDE


def faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def faults_of_a_step() -> int:
    """Page faults of three large tensors that come and go, as activations do."""
    before = faults()
    for _ in range(3):
        torch.zeros(SIDE, SIDE).add(1.0)
    return faults() - before


def test_steps_take_no_new_pages():
    faults_of_a_step()
    without = faults_of_a_step()
    with kept_memory():
        for _ in range(3):  # until the heap has found its size
            faults_of_a_step()
        within = faults_of_a_step()
    assert within < without / 10


def test_afterwards_memory_is_given_back():
    with kept_memory():
        torch.zeros(SIDE, SIDE)
        held = rss_bytes()
    assert held - rss_bytes() > BYTES / 2


def test_memory_is_given_back_after_a_failure():
    held = 0
    with contextlib.suppress(ValueError), kept_memory():
        torch.zeros(SIDE, SIDE)
        held = rss_bytes()
        raise ValueError
    assert held - rss_bytes() > BYTES / 2
