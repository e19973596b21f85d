"""Composition root and life cycle: build, load, serve, drain, stop. It alone knows all the others."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from importlib import metadata
from pathlib import Path

from rich.console import Console

from service import engine, logs, providers, resources
from service.admission import Admission
from service.artifact import ModelVersion
from service.classifier import Classifier
from service.decode import decode_pool
from service.engine import OrtEngine
from service.http import HttpServer
from service.metrics import Metrics
from service.preprocess import Limits
from service.repository import Repository
from service.rpc.listener import Listener, Options
from service.rpc.servicer import ImageClassifier
from service.settings import Settings

_log = logs.get("server")

# The loop beats this often; liveness fails after so many seconds without a beat.
_BEAT_S = 0.25
_STUCK_S = 10.0


class Server:
    """One serving process. `run` goes through its whole life.

    Args:
        settings: validated settings.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._began = time.monotonic()
        self._last_beat = self._began
        self._state = "starting"
        self._stop = asyncio.Event()

        cpus = resources.cpu_count()
        self.metrics = Metrics()
        self._plan = providers.cpu_plan(engine.available_providers(), cpus, settings.intra_op_threads)
        self._admission = Admission(settings.max_pending_images, settings.max_pending_bytes)
        self._decoder = decode_pool(settings.decode_threads or cpus, self.metrics.stage("decode"))
        self.repository = Repository(settings.repository, self._build_engine, self.metrics)
        classifier = Classifier(
            self._decoder,
            self._admission,
            Limits(max_pixels=settings.max_image_pixels, max_side=settings.max_image_side),
            settings.max_images_per_request,
            self.metrics,
        )
        servicer = ImageClassifier(
            self.repository, classifier, settings.default_deadline_ms / 1000, settings.max_deadline_ms / 1000
        )
        self._listener = Listener(
            Options(
                host=settings.host,
                port=settings.port,
                max_message_bytes=settings.max_message_bytes,
                max_connection_age_s=settings.max_connection_age_s,
                grace_s=settings.drain_timeout_s,
            ),
            servicer,
            self.metrics,
        )
        self._http: HttpServer | None = None
        self._watch()

    async def run(self) -> None:
        """Starts, serves until SIGTERM or SIGINT, drains and stops."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.request_stop, number.name)
        beat = asyncio.create_task(self._beat())
        try:
            await self.startup()
            await self._stop.wait()
        finally:
            await self.shutdown()
            beat.cancel()

    async def startup(self) -> None:
        """Opens the ports first, so that probes are answered and a taken port is found at once; then loads."""
        settings = self._settings
        paths = self.repository.find(settings.models)
        self._http = HttpServer(settings.host, settings.http_port, self.metrics.registry, self._live, self._ready)
        self._http.start()
        await self._listener.start()
        self._decoder.start()
        for path in paths:
            await self._load(path)
            if self._stop.is_set():
                return
        self.repository.complete()
        self._state = "ready"
        self.metrics.ready.set(1)
        await self._listener.ready(ready=True)
        self._announce()

    async def shutdown(self) -> None:
        """Stops taking calls, waits for those in flight, ends threads, closes ports. Nothing accepted is lost."""
        settings = self._settings
        began = time.monotonic()
        self._state = "draining"
        self.metrics.ready.set(0)
        await self._listener.ready(ready=False)
        pending = self._admission.images
        _log.info("draining", pending_images=pending, timeout_s=settings.drain_timeout_s)
        await asyncio.sleep(settings.drain_delay_s if self._stop.is_set() else 0)
        lost = await self._stop_listening(settings.drain_timeout_s)
        self._admission.drain()
        await self.repository.close()
        await self._decoder.close()
        if self._http is not None:
            self._http.stop()
        seconds = round(time.monotonic() - began, 3)
        if lost:
            _log.error("stopped with calls cancelled", images=lost, seconds=seconds)
        else:
            _log.info("stopped", seconds=seconds)

    async def _stop_listening(self, timeout_s: float) -> int:
        """Images whose calls were cancelled because they outlasted the timeout."""
        stopping = asyncio.create_task(self._listener.stop(timeout_s))
        # Looked at just before the rest is cancelled: afterwards nobody could count it.
        done, _ = await asyncio.wait({stopping}, timeout=max(0.0, timeout_s - 0.05))
        lost = 0 if done else self._admission.images
        await stopping
        return lost

    def request_stop(self, reason: str) -> None:
        """Lets `run` go on to `shutdown`."""
        _log.info("stop requested", reason=reason)
        self._stop.set()

    @property
    def port(self) -> int:
        """The gRPC port that is open."""
        return self._listener.port

    @property
    def http_port(self) -> int:
        """The HTTP port that is open."""
        return self._http.port if self._http else 0

    def _build_engine(self, version: ModelVersion) -> OrtEngine:
        built = OrtEngine(version, self._plan, self._settings.max_batch_size)
        built.warm_up()
        return built

    async def _load(self, path: Path) -> None:
        model = await asyncio.to_thread(self.repository.load, path)
        self.repository.add(model)
        _log.info(
            "model loaded",
            model=model.name,
            version=model.number,
            provider=model.engine.provider,
            canary_difference=round(model.canary_difference, 6),
            seconds=round(model.load_seconds, 3),
        )

    async def _beat(self) -> None:
        """Measures the event loop's lag and proves to liveness that it turns."""
        while True:
            due = time.monotonic() + _BEAT_S
            await asyncio.sleep(_BEAT_S)
            self._last_beat = time.monotonic()
            self.metrics.loop_lag_seconds.set(max(0.0, self._last_beat - due))

    def _live(self) -> tuple[bool, str]:
        stuck_s = time.monotonic() - self._last_beat
        return (False, f"the event loop is stuck for {stuck_s:.0f} s") if stuck_s > _STUCK_S else (True, "live")

    def _ready(self) -> tuple[bool, str]:
        return self._state == "ready", self._state

    def _watch(self) -> None:
        metrics, admission = self.metrics, self._admission
        metrics.watch(metrics.pending_images, lambda: admission.images)
        metrics.watch(metrics.pending_bytes, lambda: admission.bytes)
        metrics.watch(metrics.decode_queue_images, lambda: self._decoder.queued_images)
        metrics.pending_images_limit.set(admission.max_images)
        metrics.pending_bytes_limit.set(admission.max_bytes)

    def _announce(self) -> None:
        settings = self._settings
        _log.info(
            "ready",
            grpc=f"{settings.host}:{self.port}",
            http=f"{settings.host}:{self.http_port}",
            models=[f"{model.name}/{model.number}" for model in self.repository],
            startup_seconds=round(time.monotonic() - self._began, 3),
            rss_mib=resources.rss_bytes() >> 20,
        )
        if sys.stderr.isatty():
            self._banner(Console(stderr=True, highlight=False))

    def _banner(self, console: Console) -> None:
        """What is served, where, and on which provider; for people. Machines read the log."""
        host, port = self._settings.host, self.port
        console.print(f"\n[bold]Convoy {metadata.version('convoy')}[/bold] is ready\n")
        for model in self.repository:
            manifest = model.version.manifest
            console.print(
                f"  [bold cyan]{model.name}[/bold cyan] version {model.number}: {manifest.architecture}, "
                f"{len(manifest.classes)} classes, on {model.engine.provider}"
            )
        console.print(f"\n  gRPC     {host}:{port}")
        console.print(f"  metrics  http://{host}:{self.http_port}/metrics   health  /health/ready")
        first = next(iter(self.repository)).name
        console.print(f"\n  try      convoy classify IMAGE --server {host}:{port} --model {first}\n  stop     Ctrl-C\n")


def serve(settings: Settings) -> None:
    """Runs a server until it is told to stop. Blocking.

    Raises:
        ConvoyError: it could not start; the message says what to do.
    """
    import uvloop

    async def main() -> None:
        await Server(settings).run()

    uvloop.run(main())
