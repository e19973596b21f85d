"""Memory that stays with the process while it trains.

In processes of their own: glibc moves a thread whose allocation once failed, as tests' do, to a heap that holds nothing
as large as these tensors.
"""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from service.errors import TrainingError
from training.memory import shortage_told

on_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc can be told")

MIB = 64  # a tensor's
BEGIN = """
import contextlib, resource, torch
from service.resources import rss_bytes
from training.memory import kept_memory

def tensor():
    return torch.zeros(4096, 4096)
"""
# Prints the page faults of a step whose tensors come and go as activations do, outside of the block and within.
STEPS = """
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        tensor().add(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
without = faults()
with kept_memory():
    for _ in range(3):  # until the heap has found its size
        faults()
    print(without, faults())
"""
# Prints the MiB that were held by nothing at the end of the block, and went back to the system with it.
LEFT = """
held = 0
with contextlib.suppress(ValueError), kept_memory():
    tensor()
    held = rss_bytes()
    {end}
print((held - rss_bytes()) >> 20)
"""


def printed(program: str) -> list[int]:
    command = [sys.executable, "-c", BEGIN + program]
    return [int(word) for word in subprocess.run(command, check=True, capture_output=True, timeout=120).stdout.split()]


@on_glibc
def test_steps_take_no_new_pages():
    without, within = printed(STEPS)
    assert within < without / 10


@on_glibc
@pytest.mark.parametrize("end", ["pass", "raise ValueError"])
def test_afterwards_memory_is_given_back_whatever_happened(end):
    [given_back] = printed(LEFT.format(end=end))
    assert given_back > MIB / 2


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"), "the GPU's .* 128 images"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), "the machine's"),
        (MemoryError(), r"--accumulate 2 .* \(no more memory\)"),
    ],
    ids=["GPU", "PyTorch on the CPU", "Python"],
)
def test_too_little_memory_is_told_with_what_helps(error, told):
    with pytest.raises(TrainingError, match=told), shortage_told(128):
        raise error


def test_another_error_is_left_as_it_is():
    with pytest.raises(RuntimeError, match="shapes differ") as left, shortage_told(128):
        raise RuntimeError("shapes differ")
    assert not isinstance(left.value, TrainingError)
