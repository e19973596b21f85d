"""Which variant runs on which provider: the fastest that gives the right answers, found by trying.

Every candidate is loaded, has to pass the version's canary, and is measured as it would run: all executors at once.
The outcome is kept on disk, so that only the first start on a kind of machine pays for it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from service import canary, cuda, engine, logs, plan_cache, providers, resources, sessions, trial
from service.artifact import ModelVersion
from service.candidates import Candidate, Machine, Wishes, enumerate_candidates
from service.engine import OrtEngine
from service.errors import PASSING, ArtifactError, ConvoyError, ProviderError
from service.plan_cache import PlanCache, Row, Table
from service.preprocess import Pixels
from service.providers import AUTO, CPU, GPU_PROVIDERS, OPENVINO, TENSORRT
from service.sessions import Loaded
from service.trial import Passed

_log = logs.get("plan")

# Below this time of an image on the CPU provider, OpenVINO is not worth loading (unless it is asked for): an RPC
# costs 0.2 ms elsewhere, and the plugin 70 MiB with a model.
_WORTHWHILE_S = 0.001
# Of those this near to the fastest, the most exact is taken: noise decides nothing.
_AS_GOOD = 0.95
_EXACTNESS = ("fp32", "fp16", "int8", "trt-int8")

# Why a provider cannot be used here; empty if it can.
Missing = Callable[[str], str]


class Selector:
    """Builds the engines of model versions.

    Args:
        machine: to run on.
        cache_dir: where measurements and compiled engines are kept.
        missing: why a provider cannot be used here; empty if it can.
    """

    def __init__(self, machine: Machine, cache_dir: Path, missing: Missing = sessions.missing) -> None:
        self._machine = machine
        self._cache_dir = cache_dir
        self._cache = PlanCache(cache_dir / "plans")
        self._missing = missing

    def build(self, version: ModelVersion, wishes: Wishes) -> list[OrtEngine]:
        """The executors of the best candidate, warmed up.

        Raises:
            ProviderError: a provider that was asked for is missing or cannot run the model.
            ConfigurationError: there is no such variant.
            ArtifactError: no candidate passes the canary, or the graph breaks the contract.
            EngineError: the chosen candidate fails while it is warmed up.
            OutOfReachError, OutOfMemoryError: memory or descriptors are short.
        """
        name = plan_cache.key(version, wishes, self._machine)
        engines = self._remembered(version, wishes, name)
        if engines is None:
            table, passed = self._measure(version, wishes, name)
            engines = passed.engines or _executors(version, table, passed.loaded)
            self._tell(version, table, remembered=False)
        try:
            engine.warm_up(engines)
        except BaseException:
            _close(engines)
            raise
        return engines

    def table(self, version: ModelVersion, wishes: Wishes, *, refresh: bool = False) -> tuple[Table, bool]:
        """What `build` chooses from, and whether it was remembered; `refresh` measures in any case.

        Raises:
            ConvoyError: as for `build`.
        """
        name = plan_cache.key(version, wishes, self._machine)
        known = None if refresh else self._cache.read(name, wishes.budget_s)
        if known is not None:
            return known, True
        table, passed = self._measure(version, wishes, name)
        _close(passed.engines)
        return table, False

    def _remembered(self, version: ModelVersion, wishes: Wishes, name: str) -> list[OrtEngine] | None:
        """The executors of an earlier choice; None if there is none, or if it does not work any more."""
        table = self._cache.read(name, wishes.budget_s)
        if table is None:
            return None
        try:
            candidates, _ = enumerate_candidates(version, wishes, self._machine, self._lazily_missing(wishes))
            chosen = next(candidate for candidate in candidates if _describes(table.chosen, candidate))
            buckets = chosen.plan.buckets(wishes.max_batch_size)
            loaded = sessions.load(version, chosen.variant.file, chosen.plan, buckets, self._cache_dir)
        except PASSING:
            raise
        except (ArtifactError, ProviderError, StopIteration) as error:
            _log.warning("a remembered plan does not work any more; measuring again", error=str(error))
            self._cache.forget(name)
            return None
        self._tell(version, table, remembered=True)
        return _executors(version, table, loaded)

    # --- measuring

    def _measure(self, version: ModelVersion, wishes: Wishes, name: str) -> tuple[Table, Passed]:
        """Tries the candidates; gives the table, and the best one in memory. Keeps the table under `name`.

        But not if something was short: another time the outcome may be another one.
        """
        short: list[ConvoyError] = []
        began = time.monotonic()
        missing = self._lazily_missing(wishes)
        candidates, left_out = enumerate_candidates(version, wishes, self._machine, missing)
        for provider, why in left_out.items():
            log = _log.info if AUTO in wishes.providers else _log.warning
            log("provider left out", provider=providers.short_name(provider), reason=why)
        images = canary.pixels(version)
        rows, best = self._try_all(version, candidates, wishes, images, began, short)
        if best is None and wishes.allow_fallback and CPU not in {row.provider for row in rows}:
            _log.warning("falling back to the CPU", model=version.manifest.name)
            on_cpu = dataclasses.replace(wishes, providers=("cpu",))
            more, _ = enumerate_candidates(version, on_cpu, self._machine, missing)
            more_rows, best = self._try_all(version, more, on_cpu, images, began, short)
            rows = [*rows, *more_rows]
        try:
            chosen, passed = self._accepted(version, wishes, rows, best)
        except (ArtifactError, ProviderError):
            _close(best[1].engines if best else ())
            if short:
                raise short[0] from None
            raise
        table = Table(
            rows=tuple(row.model_copy(update={"outcome": "chosen"}) if row is chosen else row for row in rows),
            largest_batch=_largest_batch(chosen, wishes),
            seconds=round(time.monotonic() - began, 3),
            cut_at_s=wishes.budget_s if any(row.note == _spent(wishes) for row in rows) else None,
        )
        if not short and not self._cache.write(name, table):
            _log.warning("what was measured cannot be kept: each start measures again", cache_dir=str(self._cache_dir))
        resources.trim_memory()
        return table, passed

    def _try_all(
        self,
        version: ModelVersion,
        candidates: Sequence[Candidate],
        wishes: Wishes,
        images: Pixels,
        began: float,
        short: list[ConvoyError],
    ) -> tuple[list[Row], tuple[Row, Passed] | None]:
        """Tries one after the other; only the best so far stays in memory. `short` gets errors that may pass."""
        rows: list[Row] = []
        best: tuple[Row, Passed] | None = None
        for candidate in candidates:
            reason = self._reason_to_skip(candidate, rows, wishes, time.monotonic() - began)
            if reason:
                rows.append(trial.row(candidate, outcome="skipped", note=reason))
                continue
            try:
                row, passed = trial.run(version, candidate, wishes.max_batch_size, images, self._cache_dir)
            except PASSING as error:
                short.append(error)
                row, passed = trial.row(candidate, outcome="failed", note=str(error)), None
            rows.append(row)
            if passed is None:
                continue
            if best is not None and not _better(row, best[0]):
                _close(passed.engines)
                continue
            _close(best[1].engines if best else ())
            best = row, passed
        return rows, best

    def _reason_to_skip(self, candidate: Candidate, rows: Sequence[Row], wishes: Wishes, elapsed_s: float) -> str:
        """Why a candidate need not be tried; empty if it has to be."""
        passed = [row for row in rows if row.images_per_second]
        provider = candidate.plan.provider
        # TensorRT compiles for minutes; to try one more precision of a file elsewhere takes a second.
        if provider == TENSORRT and any(
            row.provider == provider and row.file == candidate.variant.file for row in passed
        ):
            return "the same file passes in a faster precision"
        if passed and elapsed_s > wishes.budget_s:
            return _spent(wishes)
        if provider == OPENVINO and AUTO in wishes.providers:
            on_cpu_s = min((_seconds_per_image(row) for row in passed if row.provider == CPU), default=_WORTHWHILE_S)
            if on_cpu_s < _WORTHWHILE_S:
                return f"an image takes {on_cpu_s * 1e3:.2g} ms on the CPU provider: nothing to gain"
            return self._missing(OPENVINO)
        return ""

    def _lazily_missing(self, wishes: Wishes) -> Missing:
        """Asking about OpenVINO loads it; with `auto` that waits until it is known to be worthwhile."""

        def missing(provider: str) -> str:
            if provider == OPENVINO and AUTO in wishes.providers:
                return "" if self._machine.versions.get("openvino") else "the extra `openvino` is not installed"
            return self._missing(provider)

        return missing

    def _accepted(
        self, version: ModelVersion, wishes: Wishes, rows: Sequence[Row], best: tuple[Row, Passed] | None
    ) -> tuple[Row, Passed]:
        """The best candidate, if it may run.

        Raises:
            ProviderError: what was asked for by name cannot run at all, even if something else could.
            ArtifactError: nothing can.
        """
        if not wishes.allow_fallback:
            self._check_asked(version, wishes, rows)
        if best is None:
            raise ArtifactError(f"{version.path} cannot be served: {_reasons(rows)}")
        return best

    def _check_asked(self, version: ModelVersion, wishes: Wishes, rows: Sequence[Row]) -> None:
        asked = {providers.NAMES[name] for name in wishes.providers if name != AUTO}
        if AUTO in wishes.providers and self._machine.gpus:
            asked = {row.provider for row in rows}
        failed = {provider for provider in asked if _all_failed(provider, rows)}
        if failed and (AUTO not in wishes.providers or failed == asked):
            reasons = _reasons([row for row in rows if row.provider in failed])
            raise ProviderError(
                f"{version.path} cannot run as asked ({reasons}); mend that, name other `providers`, or set "
                "`allow_fallback` to go on without"
            )

    def _tell(self, version: ModelVersion, table: Table, *, remembered: bool) -> None:
        """What really runs, in the log."""
        row = table.chosen
        _log.info(
            "plan",
            model=version.manifest.name,
            version=version.manifest.version,
            provider=row.provider,
            variant=row.variant,
            precision=row.precision or "as in the file",
            executors=row.executors,
            threads=row.threads,
            images_per_second=row.images_per_second,
            largest_batch=table.largest_batch,
            nodes=row.nodes,
            remembered=remembered,
            seconds=0.0 if remembered else table.seconds,
        )


def this_machine() -> Machine:
    """What this process may compute on."""
    name, flags = resources.cpu_model()
    gpus = tuple(gpu.name for gpu in cuda.visible())
    return Machine(resources.cpu_count(), name, flags, gpus, sessions.library_versions())


def _executors(version: ModelVersion, table: Table, loaded: Loaded) -> list[OrtEngine]:
    buckets = loaded.plan.buckets(table.largest_batch)
    return engine.executors(version, loaded, table.chosen.file, buckets)


def _close(engines: Iterable[OrtEngine]) -> None:
    """Lets go of the executors of what will not run."""
    for each in engines:
        each.close()


def _spent(wishes: Wishes) -> str:
    return f"the budget of {wishes.budget_s:g} s is spent"


def _describes(row: Row, candidate: Candidate) -> bool:
    plan = candidate.plan
    return (row.provider, row.file, row.precision) == (plan.provider, candidate.variant.file, plan.precision)


def _better(row: Row, best: Row) -> bool:
    """Faster; or about as fast, and more exact."""
    new, old = row.images_per_second or 0.0, best.images_per_second or 0.0
    if _EXACTNESS.index(row.variant) < _EXACTNESS.index(best.variant):
        return new >= _AS_GOOD * old
    return new * _AS_GOOD > old


def _seconds_per_image(row: Row) -> float:
    """Time that one executor needs for an image."""
    return row.executors / row.images_per_second if row.images_per_second else float("inf")


def _largest_batch(row: Row, wishes: Wishes) -> int:
    """On a CPU the time of a batch grows with its size: larger ones than the limit would only add latency."""
    if row.provider in GPU_PROVIDERS or not wishes.batch_limit_s:
        return wishes.max_batch_size
    fitting = int(wishes.batch_limit_s / _seconds_per_image(row))
    return max(1, min(wishes.max_batch_size, fitting))


def _all_failed(provider: str, rows: Sequence[Row]) -> bool:
    outcomes = {row.outcome for row in rows if row.provider == provider}
    return bool(outcomes) and outcomes <= {"failed"}


def _reasons(rows: Sequence[Row]) -> str:
    return "; ".join(f"{row.variant} on {providers.short_name(row.provider)}: {row.note}" for row in rows if row.note)
