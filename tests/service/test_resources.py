"""CPUs as the cgroup grants them, and memory as the C library keeps it."""

import math
import os
import platform
import subprocess
import sys

import pytest

from service import resources


@pytest.fixture
def v2(tmp_path):
    def write(text):
        (tmp_path / "cpu.max").write_text(text)
        return tmp_path

    return write


def v1(root, quota, period):
    (root / "cpu").mkdir()
    (root / "cpu" / "cpu.cfs_quota_us").write_text(quota)
    (root / "cpu" / "cpu.cfs_period_us").write_text(period)
    return root


@pytest.mark.parametrize(
    ("text", "quota"), [("200000 100000\n", 2.0), ("150000 100000", 1.5), ("50000 100000", 0.5), ("max 100000\n", None)]
)
def test_cgroup_v2(v2, text, quota):
    assert resources.cgroup_quota(v2(text)) == quota


@pytest.mark.parametrize(("quota", "period", "expected"), [("400000", "100000", 4.0), ("-1", "100000", None)])
def test_cgroup_v1(tmp_path, quota, period, expected):
    assert resources.cgroup_quota(v1(tmp_path, quota, period)) == expected


@pytest.mark.parametrize("text", ["", "nonsense", "1 2 3", "x 100000"])
def test_what_cannot_be_read_grants_everything(v2, text):
    assert resources.cgroup_quota(v2(text)) is None


@pytest.mark.parametrize(
    ("folder", "files", "left"),
    [
        ("", {"memory.max": "1000", "memory.current": "700", "memory.stat": "anon 500\ninactive_file 150\n"}, 450),
        ("", {"memory.max": "1000", "memory.current": "1200", "memory.stat": "inactive_file 0\n"}, 0),
        ("", {"memory.max": "max", "memory.current": "700", "memory.stat": ""}, math.inf),
        (
            "memory",
            {
                "memory.limit_in_bytes": "1000",
                "memory.usage_in_bytes": "600",
                "memory.stat": "total_inactive_file 100\n",
            },
            500,
        ),
        ("", {}, math.inf),
    ],
)
def test_memory_that_the_cgroup_leaves(tmp_path, folder, files, left):
    (tmp_path / folder).mkdir(exist_ok=True)
    for name, text in files.items():
        (tmp_path / folder / name).write_text(text)

    assert resources.cgroup_memory_left(tmp_path) == left


def test_without_a_cgroup_the_affinity_counts(tmp_path):
    assert resources.cgroup_quota(tmp_path) is None
    assert resources.cpu_count(tmp_path) == len(os.sched_getaffinity(0))


def test_a_quota_below_the_affinity_wins_and_is_at_least_one(v2):
    assert resources.cpu_count(v2("10000 100000")) == 1


def test_a_fraction_is_rounded_up_but_never_above_the_affinity(v2):
    assert resources.cpu_count(v2("150000 100000")) == min(2, len(os.sched_getaffinity(0)))
    assert resources.cpu_count(v2("99900000 100000")) == len(os.sched_getaffinity(0))


def test_resident_memory_is_of_this_process():
    assert 10 << 20 < resources.rss_bytes() < 64 << 30


needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc can be told")

# Prints the MiB that stay resident when four threads have each held a large block, as sessions do.
LARGE_BLOCKS = """
import ctypes, sys, threading
from service import resources

libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
if sys.argv[1] == "told":
    resources.return_large_blocks()

def hold(meanwhile=lambda: None):
    block = libc.malloc(24 << 20)
    ctypes.memset(block, 1, 24 << 20)
    meanwhile()
    libc.free(block)

hold()  # the C library learns that blocks of this size come and go
before = resources.rss_bytes()
together = threading.Barrier(4)
threads = [threading.Thread(target=hold, args=(together.wait,)) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
resources.trim_memory()
print((resources.rss_bytes() - before) >> 20)
"""


# Prints how many heaps the C library has when four threads have each allocated something.
HEAPS = """
import ctypes, sys, threading
from service import resources

libc = ctypes.CDLL("libc.so.6")
libc.fdopen.restype, libc.malloc_info.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
if sys.argv[1] == "told":
    resources.share_heap()

together = threading.Barrier(4)

def allocate():
    libc.malloc(100_000)
    together.wait()

threads = [threading.Thread(target=allocate) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
stream = ctypes.c_void_p(libc.fdopen(1, b"w"))
libc.malloc_info(0, stream)
libc.fflush(stream)
"""


def told(program, *arguments):
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def resident_mib(*arguments):
    return int(told(LARGE_BLOCKS, *arguments))


@needs_glibc
def test_large_blocks_go_back_to_the_system_whatever_the_c_library_has_learned():
    assert resident_mib("untold") > 40  # what trimming alone leaves
    assert resident_mib("told") < 8


@needs_glibc
def test_threads_share_one_heap():
    assert told(HEAPS, "untold").count("<heap nr=") > 1
    assert told(HEAPS, "told").count("<heap nr=") == 1
