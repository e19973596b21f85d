"""Who gives way to whom."""

import ctypes
import os
import platform
import struct
import threading

import pytest

from service import threads

SLICES_SINCE = (6, 12)


def niceness():
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def test_work_in_the_background_gives_way_and_leaves_its_caller_as_it_was():
    before = niceness()

    assert threads.in_background(lambda more: niceness() + more, 100) == min(19, before + 10) + 100
    assert niceness() == before


def test_what_fails_in_the_background_fails_its_caller():
    with pytest.raises(ZeroDivisionError):
        threads.in_background(divmod, 1, 0)


def test_work_in_turns_sleeps_for_as_long_as_each_piece_took(monkeypatch):
    clock, slept = [0.0], []
    monkeypatch.setattr(threads.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(threads.time, "sleep", slept.append)

    for seconds in threads.in_turns([1.0, 0.25]):
        clock[0] += seconds

    assert slept == [1.0, 0.25]


def slice_ns():
    """The slice of the calling thread, as sched_getattr(2) tells it."""
    attributes = struct.Struct("=IIQiIQQQ")
    buffer = ctypes.create_string_buffer(attributes.size)
    number = {"x86_64": 315, "aarch64": 275}[platform.machine()]
    assert ctypes.CDLL(None).syscall(number, 0, buffer, attributes.size, 0) == 0
    return attributes.unpack(buffer.raw)[5]


def on_a_thread(work):
    found = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


def ordinary():
    """The slice of an ordinary thread; the thread of the tests may have served."""
    threads.computes()
    return slice_ns()


since_slices = pytest.mark.skipif(
    tuple(int(part) for part in platform.release().split(".")[:2]) < SLICES_SINCE,
    reason="threads have slices of their own since Linux 6.12",
)


@since_slices
def test_a_thread_that_answers_soon_has_a_short_slice_and_its_old_priority():
    def answering():
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 3)
        threads.answers_soon()
        return slice_ns(), niceness()

    assert on_a_thread(ordinary) > 100_000
    assert on_a_thread(answering) == (100_000, 3)
    assert on_a_thread(ordinary) > 100_000


@since_slices
def test_threads_inherit_it_until_they_compute():
    def started():
        inherited = slice_ns()
        threads.computes()
        return inherited, slice_ns()

    def answering():
        threads.answers_soon()
        return on_a_thread(started), threads.in_background(slice_ns), slice_ns()

    usual = on_a_thread(ordinary)

    assert on_a_thread(answering) == ((100_000, usual), usual, 100_000)


def test_where_it_cannot_be_asked_for_nothing_happens(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")

    assert on_a_thread(lambda: (threads.answers_soon(), niceness())) == (None, niceness())
