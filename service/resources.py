"""How much of the machine this process may use.

ONNX Runtime and most thread pools count the machine's processors; in a container that is wrong by the ratio of the
machine to the quota, and costs throughput and tail latency.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import math
import os
from collections.abc import Mapping
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")

# Above what a request allocates again and again (a decoded photo), below most of what a model does.
_LARGE_BYTES = 1 << 20
_KEPT_BYTES = 8 << 20


class Malloc(enum.IntEnum):
    """What glibc's malloc can be told, by mallopt(3)'s numbers."""

    TRIM_THRESHOLD = -1
    TOP_PAD = -2
    MMAP_THRESHOLD = -3
    MMAP_MAX = -4
    ARENA_MAX = -8


def cpu_count(cgroup: Path = _CGROUP) -> int:
    """CPUs this process may use, at least 1: the smaller of its affinity and its cgroup's quota, rounded up.

    Source: Linux cgroup v2 `cpu.max` ("<quota> <period>" in microseconds, or "max"), v1 `cpu.cfs_quota_us`.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_quota(cgroup)
    return max(1, affinity if quota is None else min(affinity, math.ceil(quota)))


def cgroup_quota(cgroup: Path = _CGROUP) -> float | None:
    """CPUs granted by the cgroup's quota; None if it grants all or cannot be read."""
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:
        quota_us = int((cgroup / "cpu" / "cpu.cfs_quota_us").read_text())
        period_us = int((cgroup / "cpu" / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return None
    return quota_us / period_us if quota_us > 0 and period_us > 0 else None


def cgroup_memory_left(cgroup: Path = _CGROUP) -> float:
    """Bytes that the cgroup's limit leaves, not counting files that the system would drop; infinite without a limit.

    Source: Linux cgroup v2 `memory.max`, `memory.current` and `memory.stat`; v1 `memory/memory.limit_in_bytes` etc.
    """
    v1 = cgroup / "memory"
    for folder, limit, usage, droppable in (
        (cgroup, "memory.max", "memory.current", "inactive_file"),
        (v1, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        with contextlib.suppress(OSError, ValueError):  # "max" is no number
            most, used = (int((folder / name).read_text()) for name in (limit, usage))
            facts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            return max(0, most - used + int(facts.get(droppable, 0)))
    return math.inf


BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, frozenset[str]]:
    """Name of the CPU and the instruction sets it has, as Linux spells them; empty where it cannot be read."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "", frozenset()
    facts: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        facts.setdefault(key.strip().lower(), value.strip())
    # ARM names neither model nor flags that way: "CPU part" and "Features".
    name = facts.get("model name") or facts.get("cpu part", "")
    return name, frozenset((facts.get("flags") or facts.get("features", "")).split())


def rss_bytes() -> int:
    """Resident memory of this process in bytes; 0 where /proc is missing."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def return_large_blocks() -> None:
    """Has the C library give large blocks back to the system when they are freed, where it can be told (glibc).

    Left alone it learns from the first model it frees to keep blocks of up to 32 MiB in heaps, one for each of many
    threads, and never trims the ends of those: memory grows with each reload until every heap has held a model.
    """
    tell_malloc({Malloc.MMAP_THRESHOLD: _LARGE_BYTES, Malloc.TRIM_THRESHOLD: _KEPT_BYTES})


def share_heap() -> None:
    """Has all threads that start from now on allocate from one heap, where the C library can be told (glibc).

    Left alone it makes up to eight heaps for each core. Loading a model leaves a few small things behind in one of
    them between its own, and the next one is loaded into another: memory grows until every heap is in pieces.
    """
    tell_malloc({Malloc.ARENA_MAX: 1})


def tell_malloc(options: Mapping[Malloc, int]) -> None:
    """Sets options of glibc's malloc; elsewhere does nothing."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for option, value in options.items():
            libc.mallopt(option, value)


def trim_memory() -> None:
    """Gives freed heap pages back to the system, where the C library can (glibc); elsewhere does nothing.

    ONNX Runtime frees a session's weights and arena, but glibc keeps the pages for itself: without this, memory grows
    with each reload until it has seen the worst case.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def process_age_s() -> float:
    """Seconds since this process was started, imports included; 0 where /proc is missing."""
    try:
        started_ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0.0
    return uptime_s - started_ticks / os.sysconf("SC_CLK_TCK")
