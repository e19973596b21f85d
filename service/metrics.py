"""Every metric the service exports, in one place.

Base units, no request ids and nothing that a client chooses in labels. The `grpc_server_*` names are those of
go-grpc-prometheus, so that existing dashboards work.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
ROLES = ("answer", "shadow")
SHADOW_OUTCOMES = ("agree", "disagree", "failed", "skipped")
# What a refused request met: the bounds, the forecast, CoDel, the end of the server, a model still loading, too many
# calls that have not sent their message.
SHED = ("images", "bytes", "deadline", "codel", "draining", "not_ready", "unsent")
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

_GRPC = ("grpc_type", "grpc_service", "grpc_method")


class Metrics:
    """The service's metrics on a registry of their own.

    Attributes:
        registry: what `/metrics` renders.
    """

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry(auto_describe=True)
        self._answer_series: dict[tuple[str, int], AnswerSeries] = {}
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)

        self.grpc_started = Counter("grpc_server_started", "RPCs started.", _GRPC, registry=registry)
        self.grpc_handled = Counter("grpc_server_handled", "RPCs completed.", (*_GRPC, "grpc_code"), registry=registry)
        self.grpc_seconds = Histogram(
            "grpc_server_handling_seconds", "Time to answer an RPC.", _GRPC, buckets=SECONDS, registry=registry
        )

        self.stage_seconds = Histogram(
            "convoy_stage_duration_seconds",
            "Time of one request in a stage: decode, queue, infer.",
            ("model", "stage"),
            buckets=SECONDS,
            registry=registry,
        )
        self.images = Counter(
            "convoy_images", "Images answered, by outcome: classified, failed.", ("model", "outcome"), registry=registry
        )
        self.batch_size = Histogram(
            "convoy_batch_size",
            "Images in a batch, without padding.",
            ("model",),
            buckets=BATCH_SIZES,
            registry=registry,
        )
        self.batch_seconds = Histogram(
            "convoy_batch_duration_seconds",
            "Time of a batch on its executor.",
            ("model",),
            buckets=SECONDS,
            registry=registry,
        )
        self.queue_images = Gauge("convoy_queue_images", "Images waiting for a batch.", ("model",), registry=registry)
        self.decode_queue_images = Gauge(
            "convoy_decode_queue_images", "Images waiting for a decoder.", registry=registry
        )
        self.pending_images = Gauge("convoy_pending_images", "Images admitted and not yet answered.", registry=registry)
        self.pending_bytes = Gauge(
            "convoy_pending_bytes", "Encoded bytes admitted, not yet answered.", registry=registry
        )
        self.pending_images_limit = Gauge(
            "convoy_pending_images_limit", "Most images that may be pending.", registry=registry
        )
        self.pending_bytes_limit = Gauge(
            "convoy_pending_bytes_limit", "Most bytes that may be pending.", registry=registry
        )
        self.shed = Counter("convoy_shed", f"Requests refused: {', '.join(SHED)}.", ("reason",), registry=registry)
        for reason in SHED:  # from the start: a series born with its first count shows no increase
            self.shed.labels(reason)
        self.dropped = Counter(
            "convoy_dropped",
            "Requests taken out of a queue before they ran: expired, abandoned, shed.",
            ("stage", "reason"),
            registry=registry,
        )
        self.late = Counter(
            "convoy_late", "Requests that ran but ended after their deadline.", ("stage",), registry=registry
        )
        self.image_errors = Counter(
            "convoy_image_errors", "Images that could not be classified.", ("reason", "format"), registry=registry
        )
        self.model_info = Gauge(
            "convoy_model_info",
            "1 for each version that is served.",
            ("model", "version", "digest", "provider", "variant"),
            registry=registry,
        )
        self.model_load_seconds = Gauge(
            "convoy_model_load_seconds",
            "Time to load, warm up and check a version.",
            ("model", "version"),
            registry=registry,
        )
        self.model_load_failures = Counter(
            "convoy_model_load_failures", "Versions that could not be loaded.", ("model",), registry=registry
        )
        self.model_versions_lacking = Gauge(
            "convoy_model_versions_lacking",
            "Versions that should serve, as the repository has them now, and could not be loaded.",
            ("model",),
            registry=registry,
        )
        self.repository_reachable = Gauge(
            "convoy_repository_reachable",
            "1 if the last look at the repository succeeded, and found models if some are served.",
            registry=registry,
        )
        self.repository_reachable.set(1)
        self.canary_difference = Gauge(
            "convoy_canary_difference",
            "Largest difference of a canary's probability.",
            ("model", "version"),
            registry=registry,
        )
        self.canary_ok = Gauge(
            "convoy_canary_ok", "1 if the last canary passed.", ("model", "version"), registry=registry
        )
        self.shadow_images = Counter(
            "convoy_shadow_images",
            f"Images also classified by a shadow version: {', '.join(SHADOW_OUTCOMES)}.",
            ("model", "version", "outcome"),
            registry=registry,
        )
        self.version_seconds = Histogram(
            "convoy_version_duration_seconds",
            "Time of a request by the version that worked on it, as the answering one or as shadow.",
            ("model", "version", "role"),
            buckets=SECONDS,
            registry=registry,
        )
        self.loop_lag_seconds = Gauge(
            "convoy_event_loop_lag_seconds", "Longest delay of the event loop in the last 30 s.", registry=registry
        )
        self.tls_expiry = Gauge(
            "convoy_tls_certificate_expiry_timestamp_seconds",
            "End of validity of the certificate in use, since 1970; 0 without TLS.",
            registry=registry,
        )
        self.ready = Gauge("convoy_ready", "1 while the server takes traffic.", registry=registry)

    def model_known(self, model: str, queued: Callable[[], float], lacking: Callable[[], float]) -> None:
        """A model is in the repository: its series begin, at zero."""
        self.model_load_failures.labels(model=model)
        self.watch(self.model_versions_lacking.labels(model=model), lacking)
        self.watch(self.queue_images.labels(model=model), queued)

    def model_loaded(
        self,
        model: str,
        version: int,
        *,
        digest: str,
        provider: str,
        variant: str,
        load_s: float,
        canary_difference: float,
    ) -> None:
        """A version is in service."""
        labels = (model, str(version))
        self.model_info.labels(*labels, digest, provider, variant).set(1)
        self.model_load_seconds.labels(*labels).set(load_s)
        self.canary(model, version, ok=True, difference=canary_difference)

    def canary(self, model: str, version: int, *, ok: bool, difference: float | None) -> None:
        """A served version's canary ran; `difference` is None if the runtime failed on it."""
        labels = (model, str(version))
        self.canary_ok.labels(*labels).set(ok)
        if difference is not None:
            self.canary_difference.labels(*labels).set(difference)

    def model_gone(self, model: str, version: int, *, digest: str, provider: str, variant: str) -> None:
        """A version is out of service: its series end, so that no alert looks at it."""
        labels = (model, str(version))
        with contextlib.suppress(KeyError):
            self.model_info.remove(*labels, digest, provider, variant)
        for gauge in (self.model_load_seconds, self.canary_difference, self.canary_ok):
            with contextlib.suppress(KeyError):
                gauge.remove(*labels)

    def model_released(self, model: str, version: int) -> None:
        """Nothing works on a version any more that is out of service: what was counted of it ends, too."""
        self._answer_series.pop((model, version), None)
        for metric, lasts in ((self.version_seconds, ROLES), (self.shadow_images, SHADOW_OUTCOMES)):
            for each in lasts:
                with contextlib.suppress(KeyError):
                    metric.remove(model, str(version), each)

    def answer_series(self, model: str, version: int) -> AnswerSeries:
        """What every answered request of a version observes, looked up once."""
        key = (model, version)
        if key not in self._answer_series:
            self._answer_series[key] = AnswerSeries(self, model, version)
        return self._answer_series[key]

    def stage(self, name: str) -> StageObserver:
        """An observer for the batcher of a stage that belongs to no model (decode)."""
        return StageObserver(self, name)

    def model(self, name: str) -> ModelObserver:
        """An observer for a model's batcher."""
        return ModelObserver(self, name)

    def watch(self, gauge: Gauge, read: Callable[[], float]) -> None:
        """Lets a gauge read its value when it is scraped."""
        gauge.set_function(read)


class AnswerSeries:
    """The series of one version's answers: finding a series by its labels costs more than observing it."""

    def __init__(self, metrics: Metrics, model: str, version: int) -> None:
        self.total = metrics.version_seconds.labels(model, str(version), "answer")
        self.queue = metrics.stage_seconds.labels(model, "queue")
        self.decode = metrics.stage_seconds.labels(model, "decode")
        self.infer = metrics.stage_seconds.labels(model, "infer")
        self.classified = metrics.images.labels(model, "classified")
        self.failed = metrics.images.labels(model, "failed")


class StageObserver:
    """Counts what a batcher drops and finishes late."""

    def __init__(self, metrics: Metrics, stage: str) -> None:
        self._dropped = {
            reason: metrics.dropped.labels(stage=stage, reason=reason) for reason in ("expired", "abandoned", "shed")
        }
        self._late = metrics.late.labels(stage=stage)

    def batch(self, images: int, run_s: float) -> None:
        """A stage without a model has no batch metrics: its durations are observed for each request."""

    def dropped(self, reason: str, jobs: int) -> None:
        """Jobs left the queue without running."""
        self._dropped[reason].inc(jobs)

    def late(self, jobs: int) -> None:
        """Jobs finished after their deadline."""
        self._late.inc(jobs)


class ModelObserver(StageObserver):
    """The same, and the size and time of each batch."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        super().__init__(metrics, "infer")
        self._size = metrics.batch_size.labels(model=model)
        self._seconds = metrics.batch_seconds.labels(model=model)

    def batch(self, images: int, run_s: float) -> None:
        """A batch ran."""
        self._size.observe(images)
        self._seconds.observe(run_s)
