"""How threads share the CPUs: who computes gives way to who answers.

The threads that talk to clients work for some 100 µs and sleep; those that decode, infer and load compute for as long
as they are let. On a busy CPU Linux lets a thread finish its slice, about 3 ms, before another one that wakes gets it,
whatever their priorities: every step of a request would wait for that.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

_BACKGROUND_NICE = 10
# The shortest that Linux grants, and what stands for the system's own choice.
_SHORT_NS, _DEFAULT = 100_000, 0
# sched_setattr(2) has no wrapper in the C library of most systems; its number there.
_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
# struct sched_attr: size, policy, flags, nice, priority, runtime, deadline, period.
_ATTR = struct.Struct("=IIQiIQQQ")


def answers_soon() -> None:
    """Has the calling thread interrupt those that compute when it wakes, whatever is left of their slices.

    It gets no larger share of the CPU by that, only smaller pieces of it. Threads that it starts are the same. Since
    Linux 6.12; elsewhere nothing happens.
    """
    _set_slice(_SHORT_NS)


def computes() -> None:
    """Has the calling thread be an ordinary one again, whoever started it."""
    _set_slice(_DEFAULT)


def _set_slice(slice_ns: int) -> None:
    with contextlib.suppress(OSError, AttributeError, KeyError):
        nice = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        attributes = _ATTR.pack(_ATTR.size, os.SCHED_OTHER, 0, nice, 0, slice_ns, 0, 0)
        ctypes.CDLL(None).syscall(_SCHED_SETATTR[platform.machine()], 0, attributes, 0)


def lower_priority() -> None:
    """Lets every other thread of the process go before this one, for good; where Linux's per-thread nice exists.

    For short-lived threads that measure and warm up beside traffic. Threads that they start inherit it.
    """
    with contextlib.suppress(OSError, AttributeError):
        thread = threading.get_native_id()
        nice = os.getpriority(os.PRIO_PROCESS, thread) + _BACKGROUND_NICE  # Linux cuts it to the 19 that there are
        os.setpriority(os.PRIO_PROCESS, thread, nice)
    computes()


def in_background(work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Calls a function on a thread of its own that gives way to every other one, and waits for what it returns.

    For work that computes outside of Python. A thread of low priority that has Python's lock keeps it while others have
    the CPUs, and then everybody waits for it.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="background", initializer=lower_priority) as pool:
        return pool.submit(work, *args, **kwargs).result()


def in_turns(pieces: Iterable[T]) -> Iterator[T]:
    """The pieces of a long work; after each it sleeps for as long as that took.

    A thread that wakes to answer a request then waits for one small piece at most. A low priority alone lets it wait
    for the scheduler's next tick.
    """
    began = time.perf_counter()
    for piece in pieces:
        yield piece
        time.sleep(time.perf_counter() - began)
        began = time.perf_counter()
