"""Composition root and life cycle: build, load, serve, drain, stop. It alone knows all the others."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from service import engine, logs, resources, selection, serving
from service.admission import Admission
from service.artifact import ModelVersion
from service.classifier import Classifier
from service.decode import decode_pool
from service.engine import Engine
from service.errors import ConvoyError, DeviceLostError
from service.exits import Exit
from service.http import HttpServer
from service.metrics import Metrics
from service.preprocess import Limits
from service.repository import Repository
from service.rpc.admin import Admin
from service.rpc.credentials import ServerTls
from service.rpc.listener import AdminListener, Listener, Options, host_port
from service.rpc.servicer import ImageClassifier
from service.selection import Selector
from service.serving import ServedModel
from service.settings import Settings
from service.sources import open_source

_log = logs.get("server")

# The loop beats this often; liveness fails after so many seconds without a beat.
_BEAT_S = 0.25

# A delay is to be seen by whoever scrapes every half minute.
_LAGS_S = 30.0
_STUCK_S = 10.0

# How long threads may go on after everything is closed.
_LINGER_S = 5.0

# A second request to stop within so many seconds is the same one: signals reach a process by more than one way.
_TWICE_S = 0.5

# What a thread's waking and its call back to the loop cost together, with the lock that both fight for.
_IN_TURN_S = 0.0002


class Server:
    """One serving process. `run` goes through its whole life.

    Args:
        settings: validated settings.

    Attributes:
        metrics: what `/metrics` shows.
        repository: the models.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lags: deque[float] = deque(maxlen=round(_LAGS_S / _BEAT_S))
        self._last_beat = time.monotonic()
        self._state = "starting"
        self._device_lost = ""
        self._stop, self._hurry = asyncio.Event(), asyncio.Event()
        self._stopped_at = 0.0
        self._periodic: list[asyncio.Task[None]] = []
        self._heart: asyncio.Task[None] | None = None
        cpus = resources.cpu_count()

        self.metrics = metrics = Metrics()
        self._selector = Selector(selection.this_machine(), settings.cache_dir)
        self._admission = Admission(settings.max_pending_images, settings.max_pending_bytes)
        self._decoder = decode_pool(settings.decode_threads or cpus, metrics.stage("decode"))
        self.repository = Repository(
            open_source(settings.repository, settings.cache_dir),
            self._load_version,
            metrics,
            names=settings.models,
            routings={name: own.routing for name, own in settings.model_settings.items()},
            release_timeout_s=settings.max_deadline_ms / 1000,
        )
        limits = Limits(max_pixels=settings.max_image_pixels, max_side=settings.max_image_side)
        self._classifier = Classifier(self._decoder, self._admission, limits, settings.max_images_per_request, metrics)
        servicer = ImageClassifier(
            self.repository, self._classifier, settings.default_deadline_ms / 1000, settings.max_deadline_ms / 1000
        )
        self._listener = Listener(_options(settings), servicer, metrics)
        self._admin = _admin(settings, self.repository, metrics)
        self._http: HttpServer | None = None
        self._watch()

    async def run(self) -> None:
        """Starts, serves until SIGTERM, SIGINT or SIGHUP, drains and stops."""
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # the last when its terminal is closed
            self._loop.add_signal_handler(number, self.request_stop, number.name)
        try:
            await self.startup()
            await self._stop.wait()
        finally:
            await self.shutdown()

    async def startup(self) -> None:
        """Opens the ports first, so that probes are answered and a taken port is found at once; then loads."""
        settings = self._settings
        self._loop = asyncio.get_running_loop()
        self._http = HttpServer(settings.host, settings.http_port, self.metrics.registry, self._live, self._ready)
        self._http.start()
        await self._listener.start()
        if self._admin is not None:
            await self._admin.start()
        self._decoder.start()
        self._heart = asyncio.create_task(_forever(_BEAT_S, self._beat))  # to the very end: a drain is no stuck loop
        await self._unless_stopped(self.repository.load_all())
        if self._stop.is_set():
            return
        self._every(settings.repository_poll_s, self.repository.poll)
        self._every(settings.canary_interval_s, self.repository.check_canaries)
        self._state = "ready"
        self.metrics.ready.set(not self._device_lost)
        self._listener.ready(ready=True)
        self._announce()

    async def shutdown(self) -> None:
        """Stops taking calls, waits for those in flight, ends threads, closes ports. Nothing accepted is lost."""
        settings, began, served = self._settings, time.monotonic(), self._state == "ready"
        self._state = "draining"
        self.metrics.ready.set(0)
        self._listener.ready(ready=False)
        if served:
            _log.info("draining", pending_images=self._admission.images, timeout_s=settings.drain_timeout_s)
            await self._unless_hurried(asyncio.sleep(settings.drain_delay_s))
        for task in self._periodic:
            task.cancel()
        if self._admin is not None:
            await self._admin.stop()
        lost = await self._stop_listening(settings.drain_timeout_s)
        self._admission.drain()
        await self._classifier.close()
        await self.repository.close()
        await self._decoder.close()
        if self._http is not None:
            self._http.stop()
        if self._heart is not None:
            self._heart.cancel()
        if served:
            say = _log.error if lost else _log.info
            say("stopped", cancelled_images=lost, seconds=round(time.monotonic() - began, 3))

    def request_stop(self, reason: str) -> None:
        """Lets `run` go on to `shutdown`; asked again, later, `shutdown` waits for nobody."""
        if not self._stop.is_set():
            self._stopped_at = time.monotonic()
            self._stop.set()
            _log.info("stop requested", reason=reason)
        elif time.monotonic() - self._stopped_at > _TWICE_S and not self._hurry.is_set():
            self._hurry.set()
            _log.warning("stop requested again: calls in flight are cancelled", reason=reason)

    @property
    def port(self) -> int:
        """The gRPC port that is open."""
        return self._listener.port

    @property
    def http_port(self) -> int:
        """The HTTP port that is open."""
        return self._http.port if self._http else 0

    @property
    def admin_port(self) -> int:
        """The admin port that is open; 0 if none is."""
        return self._admin.port if self._admin else 0

    # --- loading

    def _load_version(self, path: Path, gently: bool) -> tuple[ServedModel, float]:
        settings = self._settings
        # Who sets executors or a window wants threads.
        threaded = settings.wishes(path.parent.name).executors or settings.batch_window_ms
        return serving.load(
            path,
            self._build_engines,
            self.metrics.model,
            window_s=settings.batch_window_ms / 1000,
            codel_target_s=settings.codel_target_ms / 1000,
            in_turn_s=0.0 if threaded else _IN_TURN_S,
            gently=gently,
            on_device_lost=self._lose_device,
        )

    def _build_engines(self, version: ModelVersion) -> list[Engine]:
        return [*self._selector.build(version, self._settings.wishes(version.manifest.name))]

    # --- ending

    async def _unless_stopped(self, work: Awaitable[None]) -> None:
        """Waits for the work, or for the stop: then the work is cancelled."""
        task = asyncio.ensure_future(work)
        stop = asyncio.create_task(self._stop.wait())
        await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
        else:
            task.result()

    async def _stop_listening(self, timeout_s: float) -> int:
        """Closes the port and waits; gives the images whose calls were cancelled because they outlasted the timeout."""
        stopping = asyncio.create_task(self._listener.stop(timeout_s))
        # Looked at just before the rest is cancelled: afterwards nobody could count it.
        await self._unless_hurried(asyncio.wait({stopping}, timeout=max(0.0, timeout_s - 0.05)))
        lost = 0 if stopping.done() else self._admission.images
        if self._hurry.is_set():
            await self._listener.cancel()
        await stopping
        return lost

    async def _unless_hurried(self, waiting: Coroutine[Any, Any, Any]) -> None:
        """Waits, but not on after a second request to stop."""
        tasks = {asyncio.create_task(waiting), asyncio.create_task(self._hurry.wait())}
        _, others = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in others:
            task.cancel()

    def _lose_device(self, error: DeviceLostError) -> None:
        """Latches liveness: only a restart brings a lost device back. Called on an owner thread."""
        if not self._device_lost:
            self._device_lost = f"the device is lost: {error}"
            _log.error("device lost", error=str(error))
            self.metrics.ready.set(0)
            self._loop.call_soon_threadsafe(self._listener.lost)

    # --- what goes on beside the requests

    def _every(self, seconds: float, work: Callable[[], Awaitable[None]]) -> None:
        if seconds:
            self._periodic.append(asyncio.create_task(_forever(seconds, work)))

    async def _beat(self) -> None:
        """Measures the event loop's lag and proves to liveness that it turns."""
        now = time.monotonic()
        self._lags.append(max(0.0, now - self._last_beat - _BEAT_S))
        self.metrics.loop_lag_seconds.set(max(self._lags))
        self._last_beat = now

    def _live(self) -> tuple[bool, str]:
        if self._device_lost:
            return False, self._device_lost
        stuck_s = time.monotonic() - self._last_beat
        return (False, f"the event loop is stuck for {stuck_s:.0f} s") if stuck_s > _STUCK_S else (True, "live")

    def _ready(self) -> tuple[bool, str]:
        return self._state == "ready" and not self._device_lost, self._device_lost or self._state

    def _watch(self) -> None:
        metrics, admission = self.metrics, self._admission
        metrics.watch(metrics.pending_images, lambda: admission.images)
        metrics.watch(metrics.pending_bytes, lambda: admission.bytes)
        metrics.watch(metrics.decode_queue_images, lambda: self._decoder.queued_images)
        metrics.pending_images_limit.set(admission.max_images)
        metrics.pending_bytes_limit.set(admission.max_bytes)

    # --- what is told

    def _announce(self) -> None:
        settings = self._settings
        places = {"grpc": host_port(settings.host, self.port), "http": host_port(settings.host, self.http_port)}
        if self._admin is not None:
            places["admin"] = host_port(settings.admin_host, self.admin_port)
        _log.info(
            "ready",
            **places,
            models=[f"{model.name}/{model.number}" for model in self.repository],
            startup_seconds=round(resources.process_age_s(), 2),
            rss_mib=resources.rss_bytes() >> 20,
        )
        if sys.stderr.isatty():
            self._banner(Console(stderr=True, highlight=False), places)

    def _banner(self, console: Console, places: dict[str, str]) -> None:
        """What is served, where, and on which provider; for people. Machines read the log."""
        console.print(f"\n[bold]Convoy {metadata.version('convoy')}[/bold] is ready\n")
        for model in self.repository:
            manifest = model.version.manifest
            console.print(
                f"  [bold cyan]{model.name}[/bold cyan] version {model.number}: {escape(manifest.architecture)}, "
                f"{len(manifest.classes)} classes, {escape(model.engine.variant)} on {model.engine.provider}"
            )
        console.print(f"\n  gRPC     {places['grpc']}")
        console.print(f"  HTTP     http://{places['http']}/metrics  /health/live  /health/ready")
        if "admin" in places:
            console.print(f"  admin    {places['admin']}")
        first = next(iter(self.repository)).name
        console.print(f"\n  try      convoy classify IMAGE --server {places['grpc']} --model {first}")
        console.print("  stop     Ctrl-C\n")


async def _forever(seconds: float, work: Callable[[], Awaitable[None]]) -> None:
    while True:
        await asyncio.sleep(seconds)
        try:
            await work()
        except ConvoyError as error:
            _log.error("periodic work failed", error=str(error))
        except Exception:  # noqa: BLE001  # one bad round must not end the rounds
            _log.exception("periodic work failed")


def _options(settings: Settings) -> Options:
    return Options(
        host=settings.host,
        port=settings.port,
        max_message_bytes=settings.max_message_bytes,
        max_connection_age_s=settings.max_connection_age_s,
        # A connection that is retired, which happens all the time, has to outlive the longest call on it.
        grace_s=max(settings.drain_timeout_s, settings.max_deadline_ms / 1000),
        tls=_tls(settings),
        message_timeout_s=settings.message_timeout_s,
        # A call brings an image at least: more than may be pending could not be admitted anyway.
        max_unsent_calls=settings.max_pending_images,
        max_connections=settings.max_connections,
        max_calls_per_connection=settings.max_calls_per_connection,
        max_images_per_request=settings.max_images_per_request,
    )


def _tls(settings: Settings) -> ServerTls | None:
    certificate, key = settings.tls_certificate, settings.tls_key
    return ServerTls(certificate, key, settings.tls_client_ca) if certificate and key else None


def _admin(settings: Settings, repository: Repository, metrics: Metrics) -> AdminListener | None:
    if settings.admin_port is None:
        return None
    return AdminListener(settings.admin_host, settings.admin_port, Admin(repository), metrics)


def serve(settings: Settings) -> None:
    """Runs a server until it is told to stop. Blocking.

    Raises:
        ConvoyError: it could not start; the message says what to do.
    """
    import uvloop

    resources.return_large_blocks()
    resources.share_heap()

    async def main() -> None:
        workers = ThreadPoolExecutor(thread_name_prefix="worker")
        asyncio.get_running_loop().set_default_executor(workers)
        await Server(settings).run()
        workers.shutdown(wait=False)
        if engine.GPU_LOST.is_set():
            _leave_at_once()
        _leave_what_hangs()

    uvloop.run(main())


def _leave_what_hangs() -> None:
    """Ends the process, with exit code 0, if a thread goes on after all is closed: Python would wait without bound.

    That is a load that was under way: of a file system that does not answer, or of an engine that takes minutes.
    """
    end = time.monotonic() + _LINGER_S
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(max(0.0, end - time.monotonic()))
            if thread.is_alive():
                _log.warning("left a load behind that does not end", thread=thread.name)
                _leave_at_once()


def _leave_at_once() -> None:
    """Ends the process, with exit code 0, without freeing anything: what a lost GPU held would end it otherwise."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(Exit.OK)
