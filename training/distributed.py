"""One process or many: `torchrun` starts the processes, this joins them, and the loop asks only `Group`.

    torchrun --nproc-per-node 2 -m service train DATA ...

A global batch is split over the processes, and each scales its loss by the size of the global batch, so that the
averaged gradient is that of one process with the whole batch. BatchNorm statistics are per process, as everywhere;
those of the main one are kept.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")

# Its functions have the default group as a default argument. DistributedDataParallel imports it: if that is the first
# time, and so after the group was made, they keep the group for ever.
_KEEPS_THE_GROUP = "torch.distributed.nn"

# Groups that were joined, until the process ends.
_joined: list[Any] = []

# One process reads the images, and exports, while the others wait for it; those of a lost one are ended by torchrun.
_TIMEOUT = timedelta(days=7)
_MEETING_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Group:
    """The processes that train together. `rank`: this one's number, from 0. `world`: how many there are."""

    rank: int = 0
    world: int = 1

    @property
    def main(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """True if the flag is up in any process; all processes have to ask."""
        if self.world == 1:
            return flag
        votes = torch.tensor([int(flag)])
        distributed.all_reduce(votes, distributed.ReduceOp.MAX)
        return bool(votes.item())

    def sum(self, values: list[float]) -> list[float]:
        """Sums over the processes, element by element."""
        if self.world == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(total)
        return [float(value) for value in total]

    def from_main(self, make: Callable[[], T]) -> T:
        """Calls `make` in the main process only; its value, which has to be picklable, in every process."""
        if self.world == 1:
            return make()
        box: list[Any] = [make() if self.main else None]
        distributed.broadcast_object_list(box)
        shared: T = box[0]
        return shared

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Overwrites the tensors of every process with those of the main one."""
        if self.world > 1:
            for tensor in tensors:
                distributed.broadcast(tensor, 0)

    def wait(self) -> None:
        """Returns when all processes have come here."""
        if self.world > 1:
            distributed.barrier()

    def part(self, count: int) -> slice:
        """This process's contiguous part of `count` rows; the parts differ by at most one row."""
        bounds = [count * rank // self.world for rank in range(self.world + 1)]
        return slice(bounds[self.rank], bounds[self.rank + 1])

    def gather(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Joins the rows [n, K] of all processes in the order of `part`."""
        if self.world == 1:
            return rows
        boxes: list[Any] = [None] * self.world
        distributed.all_gather_object(boxes, rows)
        return np.concatenate([box for box in boxes if len(box)])

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with gradients averaged over the processes; frozen parameters stay out of it."""
        return DistributedDataParallel(model) if self.world > 1 else model


@contextmanager
def joined() -> Iterator[Group]:
    """Joins the processes that `torchrun` has started; alone, that is a group of one.

    With GPUs the collectives of the loop's few numbers still run on the CPU (gloo), those of gradients on nccl.
    """
    world = processes()
    if world == 1:
        yield Group()
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    importlib.import_module(_KEEPS_THE_GROUP)
    distributed.init_process_group(backend, timeout=_TIMEOUT, **_meeting_point())
    _joined.append(distributed.group.WORLD)
    try:
        yield Group(distributed.get_rank(), world)
    finally:
        distributed.destroy_process_group()


@atexit.register
def _end_threads() -> None:
    """Ends gloo's threads, which otherwise live as long as the process.

    They let go of their last tensors with Python's lock. One that asks for it when the interpreter is gone is aborted,
    and the process with it, after all its work (pytorch/pytorch#179291). And DistributedDataParallel lets go of its
    group without giving the lock away: were it the last to do so, it would wait for those threads, and they for it.
    """
    gc.collect()
    _joined.clear()


def processes() -> int:
    """How many `torchrun` has started, this one among them; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def restarted() -> float | None:
    """When the `torchrun` began that has started these processes again, after one of them was lost.

    In seconds of the epoch; None if they are its first, or nobody's.
    """
    return psutil.Process(os.getppid()).create_time() if _attempt() > 0 else None


def _attempt() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _meeting_point() -> dict[str, Any]:
    """Where the processes exchange addresses: `torchrun`'s store, with a section of its own for each attempt.

    Without that, processes that were started again find addresses of the lost ones about every second time, and fail
    with "connection refused" (PyTorch 2.13, gloo).
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # PyTorch documents both stores, but its typing does not export them.
    store = distributed.TCPStore(address, port, world, is_master=False, timeout=_MEETING_TIMEOUT)  # type: ignore[attr-defined]
    section = distributed.PrefixStore(f"attempt_{_attempt()}", store)  # type: ignore[attr-defined]
    return {"store": section, "rank": rank, "world_size": world}


def device() -> torch.device:
    """The GPU that belongs to this process, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
