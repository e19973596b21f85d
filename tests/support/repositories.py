"""Repositories on toy engines, for tests of what they serve and what they refuse."""

import asyncio
import threading
from contextlib import asynccontextmanager

import pytest
import toys

from service.metrics import Metrics
from service.repository import Repository
from service.sources import LocalSource


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@asynccontextmanager
async def opened(root, before_load=lambda gently: None, *, source=None, **options):
    """A repository with toy engines, which are listed in its `engines`; not loaded yet."""
    metrics, engines = Metrics(), []

    def build(version):
        engines.append(toys.ToyEngine(len(version.manifest.classes)))
        return engines[-1:]

    def load(path, gently):
        before_load(gently)
        return toys.toy_load(path, build, metrics, gently, pytest.fail)

    repository = Repository(source or LocalSource(root), load, metrics, release_timeout_s=2.0, **options)
    repository.metrics, repository.registry, repository.engines = metrics, metrics.registry, engines
    try:
        yield repository
    finally:
        await repository.close()


def served(repository):
    return [(model.name, model.number) for model in repository]


def failures(repository):
    """Name, number and reason of every version that could not be loaded, as of its last attempt."""
    return [(name, *failed) for name, model in repository.states() for failed in sorted(model.failed.items())]


def damage(path):
    (path / "model.onnx").write_bytes(b"damaged")


async def waiting_for_their_turn():
    """Until changes have looked at the source and wait behind the one that is held."""
    for _ in range(20):
        await asyncio.to_thread(lambda: None)


def filled(root):
    """Three versions of one model, and one of another."""
    for number in (1, 2, 10):
        toys.write_version(root, "grey", number)
    toys.write_version(root, "other")
    return root


class Gate:
    """Holds loads until it is opened."""

    def __init__(self):
        self.began = threading.Event()
        self.open = threading.Event()
        self.open.set()

    def __call__(self, _gently):
        self.began.set()
        assert self.open.wait(toys.TIMEOUT_S)

    async def hold(self, change):
        """Starts a change that loads; returns when it is being held."""
        self.began.clear()
        self.open.clear()
        task = asyncio.create_task(change)
        assert await asyncio.to_thread(self.began.wait, toys.TIMEOUT_S)
        return task
