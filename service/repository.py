"""The models that are served: found on disk, verified, loaded, warmed up and checked before they take traffic."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from service import artifact, canary
from service.artifact import ModelVersion
from service.batcher import Batcher, Job
from service.engine import Engine, Outputs
from service.errors import ConfigurationError, ModelNotReadyError, NotFoundError
from service.latency import LatencyTable
from service.metrics import Metrics
from service.preprocess import Pixels
from service.schedule import Part

ModelBatcher = Batcher[Pixels, Outputs]

# Builds, and warms up, the engine of a version.
EngineFactory = Callable[[ModelVersion], Engine]


@dataclass(frozen=True)
class ServedModel:
    """One version, ready to answer.

    `canary_difference`: what its canary measured at load. `load_seconds`: from reading the manifest to ready.
    """

    version: ModelVersion
    engine: Engine
    batcher: ModelBatcher
    canary_difference: float
    load_seconds: float

    @property
    def name(self) -> str:
        """Name of the model."""
        return self.version.manifest.name

    @property
    def number(self) -> int:
        """Number of the version."""
        return self.version.manifest.version


class Repository:
    """Models by name and version.

    Args:
        root: directory of models.
        build: makes engines.
        metrics: receives load times, canaries and batches.
    """

    def __init__(self, root: Path, build: EngineFactory, metrics: Metrics) -> None:
        self._root = root
        self._build = build
        self._metrics = metrics
        self._served: dict[str, dict[int, ServedModel]] = {}
        self._complete = False

    def find(self, names: Sequence[str] = ()) -> list[Path]:
        """Directories of the versions to serve: the latest of each model.

        Args:
            names: the models to serve; empty means all.

        Raises:
            ConfigurationError: no such directory, no model in it, or a named one is missing.
        """
        if not self._root.is_dir():
            raise ConfigurationError(
                f"the repository {self._root} does not exist; train a model into it with "
                f"`convoy train DATA --repository {self._root} --name NAME`, or name another with --repository"
            )
        found = {path.name: artifact.versions(path) for path in sorted(self._root.iterdir()) if path.is_dir()}
        models = {name: numbers for name, numbers in found.items() if numbers}
        if missing := sorted(set(names) - set(models)):
            raise ConfigurationError(
                f"the repository {self._root} has no model {', '.join(missing)}; it has {', '.join(models) or 'none'}"
            )
        if not models:
            raise ConfigurationError(
                f"the repository {self._root} holds no model version; expected {self._root}/<model>/<number>/"
                f"{artifact.MANIFEST}. Train one with `convoy train DATA --repository {self._root} --name NAME`"
            )
        return [self._root / name / str(models[name][-1]) for name in models if not names or name in names]

    def load(self, path: Path) -> ServedModel:
        """Verifies, builds, warms up and checks one version. Blocking: call it off the event loop.

        Raises:
            ArtifactError, ProviderError, EngineError: it cannot be served.
        """
        began = time.monotonic()
        try:
            version = artifact.load(path)
            engine = self._build(version)
            difference = canary.check(version, engine)
        except Exception:
            self._metrics.model_load_failures.labels(model=path.parent.name).inc()
            raise
        name = version.manifest.name
        batcher: ModelBatcher = Batcher(
            [lambda parts: _infer(engine, parts)],
            sizes=LatencyTable(engine.buckets),
            name=f"infer-{name}",
            observer=self._metrics.model(name),
        )
        return ServedModel(version, engine, batcher, difference, time.monotonic() - began)

    def add(self, model: ServedModel) -> None:
        """Lets a loaded version take traffic. On the event loop."""
        model.batcher.start()
        self._served.setdefault(model.name, {})[model.number] = model
        labels = {"model": model.name, "version": str(model.number)}
        self._metrics.model_info.labels(**labels, digest=model.version.digest[:12], provider=model.engine.provider).set(
            1
        )
        self._metrics.model_load_seconds.labels(**labels).set(model.load_seconds)
        self._metrics.canary_difference.labels(**labels).set(model.canary_difference)
        self._metrics.canary_ok.labels(**labels).set(1)
        self._metrics.watch(self._metrics.queue_images.labels(model=model.name), lambda: model.batcher.queued_images)

    def complete(self) -> None:
        """From now on a model that is not here does not exist, rather than being not loaded yet."""
        self._complete = True

    def get(self, name: str, number: int | None = None) -> ServedModel:
        """The version that answers.

        Args:
            name: name of the model; empty is allowed if there is exactly one.
            number: version; None takes the latest.

        Raises:
            NotFoundError: no such model or version.
            ModelNotReadyError: models are still being loaded.
        """
        if not name and len(self._served) == 1:
            name = next(iter(self._served))
        versions = self._served.get(name)
        if versions is None:
            if not self._complete:
                raise ModelNotReadyError("models are still being loaded", retry_after_ms=500)
            known = ", ".join(sorted(self._served)) or "none"
            raise NotFoundError(f"there is no model {name!r}; served are: {known}")
        if number is None:
            return versions[max(versions)]
        if number not in versions:
            known = ", ".join(map(str, sorted(versions)))
            raise NotFoundError(f"model {name} has no version {number}; served are: {known}")
        return versions[number]

    def __iter__(self) -> Iterator[ServedModel]:
        """Every served version, by name and number."""
        for _, versions in sorted(self._served.items()):
            for _, model in sorted(versions.items()):
                yield model

    async def close(self) -> None:
        """Ends all batchers and releases all engines."""
        for model in self:
            await model.batcher.close()
            model.engine.close()


def _infer(engine: Engine, parts: Sequence[Part[Job[Pixels, Outputs]]]) -> list[Outputs]:
    """One batch: the parts' pixels in, each part's rows out."""
    outputs = engine.infer([part.job.payload[part.start : part.stop] for part in parts])
    results, row = [], 0
    for part in parts:
        end = row + part.stop - part.start
        results.append(Outputs(outputs.logits[row:end], outputs.probabilities[row:end]))
        row = end
    return results
