"""The models that are served: which versions, which of them answers, and how they come and go.

A new version is loaded, verified, warmed up and checked beside the old one, then takes traffic from one request to the
next; the old one answers what it has begun and gives its memory back. A version that fails to load changes nothing.

Routes and versions change on the event loop only, so a request sees either the old state or the new one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from service import loading, logs
from service.errors import (
    ArtifactError,
    CanaryError,
    ConfigurationError,
    ConvoyError,
    EngineError,
    InvalidRequestError,
    ModelNotReadyError,
    NotFoundError,
    OutOfReachError,
)
from service.metrics import Metrics
from service.model_state import ModelState
from service.resources import trim_memory
from service.routing import Routing
from service.serving import ServedModel
from service.sources import Fingerprint, Source

_log = logs.get("repository")

# Loads a version from its directory; gives its canary's largest difference, too. Blocking.
Loader = Callable[[Path, bool], tuple[ServedModel, float]]


class Repository:
    """Models by name and version.

    Args:
        source: where versions come from.
        load: makes a served model of a directory; gently if it is told so.
        metrics: receives load times, failures, canaries.
        names: the models to serve; empty means all.
        routings: of models that do not follow the default.
        release_timeout_s: how long a replaced version may take to finish what it has begun.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        source: Source,
        load: Loader,
        metrics: Metrics,
        *,
        names: tuple[str, ...] = (),
        routings: Mapping[str, Routing] | None = None,
        release_timeout_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._source = source
        self._load = load
        self._metrics = metrics
        self._names = names
        self._routings = dict(routings or {})
        self._release_timeout_s = release_timeout_s
        self._models: dict[str, ModelState] = {}
        # One load at a time: two would fight for the CPU with the traffic. Whoever loads took the model's own lock
        # before: what is asked of a model is done in that order, and no other's load delays taking it out of service.
        self._loading = asyncio.Lock()
        self._touched: set[str] = set()  # models that an operator changed since the source was last looked at
        self._releases: set[asyncio.Task[None]] = set()
        self._changes: set[asyncio.Task[None]] = set()
        self._complete = False
        self._empty = False

    # --- which version answers

    def get(self, name: str, number: int | None = None) -> ServedModel:
        """The version that answers a request.

        Args:
            name: name of the model; empty is allowed if there is exactly one.
            number: version; None follows the routing.

        Raises:
            NotFoundError: no such model or version.
            ModelNotReadyError: models are still being loaded.
        """
        model = self._find(name)
        if number is None:
            return model.answering()
        if number not in model.served:
            known = ", ".join(map(str, sorted(model.served)))
            raise NotFoundError(f"the model has no version {number}; served are: {known}")
        return model.served[number]

    def default(self, name: str) -> ServedModel | None:
        """The version that gets most of the traffic: the heaviest of the split, else the latest; None if none does."""
        model = self._models.get(name)
        return model.default() if model else None

    def shadow(self, name: str, answering: ServedModel) -> ServedModel | None:
        """The version that gets a copy of a request, if there is one beside the one that answers."""
        model = self._models.get(name)
        return model.shadow(answering) if model else None

    def __iter__(self) -> Iterator[ServedModel]:
        """Every served version, by name and number."""
        for _, model in sorted(self._models.items()):
            for _, served in sorted(model.served.items()):
                yield served

    def names(self) -> Iterator[str]:
        """Of the models that have a served version."""
        return (name for name, model in self._models.items() if model.served)

    def states(self) -> list[tuple[str, ModelState]]:
        """What is known of every model, by name; to be read only."""
        return sorted(self._models.items())

    def routing(self, name: str) -> Routing:
        """How a model's requests are routed."""
        return self._routing_for(name)

    # --- coming and going

    async def load_all(self) -> None:
        """Loads what is there at start.

        Raises:
            ConfigurationError: the source is empty, or a named model is missing.
            ConvoyError: a version cannot be served.
        """
        everything = await self._present()
        if missing := sorted(set(self._names) - set(everything)):
            raise ConfigurationError(
                f"the repository {self._source.location} has no model {', '.join(missing)}; it has "
                f"{', '.join(sorted(everything)) or 'none'}"
            )
        present = {name: everything[name] for name in self._names or everything}
        if not present:
            raise ConfigurationError(
                f"the repository {self._source.location} holds no model version; expected "
                f"{self._source.location}/<model>/<number>/manifest.json. Train one with "
                f"`convoy train DATA --repository {self._source.location} --name NAME`"
            )
        for name, numbers in sorted(present.items()):
            if not self._routing_for(name).answering(numbers):
                raise ConfigurationError(_nobody_answers(name, self._routing_for(name), numbers))
            async with self._model(name).changing, self._loading:
                await self._settle(name, numbers, strict=True)
        self._complete = True
        for name, routing in self._routings.items():
            if absent := routing.missing(everything.get(name, [])):
                _log.warning("settings name versions that are not there", model=name, versions=absent)
            elif name not in everything:
                _log.warning("settings name a model that is not there", model=name)

    async def poll(self) -> None:
        """Looks at the source once and follows it: new and changed versions are loaded, superseded ones retired.

        Failures change nothing. They are counted and logged once for each state of the files; those that may pass, each
        time that they are tried again.
        """
        self._touched.clear()
        try:
            present = await self._present()
        except ConfigurationError as error:
            self._metrics.repository_reachable.set(0)
            _log.warning("repository cannot be read", error=str(error))
            return
        if self._is_lost(present):
            return
        for name, model in self._models.items():
            model.present = present.get(name, [])
            model.forget_failures(model.present)
            for number in model.newly_gone():
                _log.warning("version is gone from the repository and serves on", model=name, version=number)
        for name, numbers in sorted(present.items()):
            known = self._models.get(name)
            if name in (self._names or present) and (known is None or not known.unloaded):
                async with self._model(name).changing, self._loading:
                    if name not in self._touched:  # else `numbers` may be out of date: the next round sees to it
                        await self._settle(name, numbers, strict=False)
        async with self._loading:  # what is being loaded must not be tidied away
            await asyncio.to_thread(self._source.tidy, present, {(served.name, served.number) for served in self})

    async def load(self, name: str, number: int | None = None) -> None:
        """Loads a model, or loads it again from what is now on disk. The versions already served answer meanwhile.

        Args:
            name: name of the model.
            number: one version; it is served beside the others. Without it, what was loaded or unloaded by version
                before is forgotten, and the model's policy decides again.

        Raises:
            NotFoundError: the source has no such model or version.
            ArtifactError, ProviderError, EngineError: it cannot be served; the old version serves on, and what was done
                by hand still holds.
        """
        await self._carried_through(self._load_again(name, number))

    async def _load_again(self, name: str, number: int | None) -> None:
        await self._numbers(name, number)  # of a model that is not there nothing is noted
        model = self._model(name)
        with model.awaiting():
            async with model.changing, self._loading:
                present = await self._numbers(name, number)  # now that it is its turn
                if number is None:
                    await self._load_afresh(name, present)
                else:
                    await self._replace(name, number, force=True)
                    model.by_hand[number] = True
                model.settled, model.unloaded = True, False
                self._touched.add(name)

    async def _load_afresh(self, name: str, present: list[int]) -> None:
        """All that the routing needs, whatever was done by hand; if one cannot be served, none comes in besides."""
        model = self._model(name)
        before, by_hand = set(model.served), model.by_hand
        model.by_hand = {}
        try:
            await self._settle(name, present, strict=True, force=True)
        except BaseException:
            model.by_hand = by_hand
            for number in model.served.keys() - before:
                self._withdraw(name, number)
            raise

    async def unload(self, name: str, number: int | None = None) -> None:
        """Takes a model, or one version of it, out of service; polling does not bring it back, `load` does.

        Raises:
            NotFoundError: it is not served.
        """
        async with self._find(name).changing:
            model = self._find(name)  # it may have been unloaded while this waited
            if number is not None and number not in model.served:
                raise NotFoundError(f"model {name} has no version {number} in service")
            numbers = list(model.served) if number is None else [number]
            model.unloaded = model.unloaded or set(numbers) == set(model.served)
            model.settled = not model.unloaded
            for each in numbers:
                model.by_hand[each] = False
                self._withdraw(name, each)
            self._touched.add(name)

    async def route(self, name: str, routing: Routing) -> None:
        """Changes the versions, the split and the shadow of a model; loads first what that needs.

        Raises:
            InvalidRequestError: a policy or weights that make no sense, or a version that does not exist.
            ArtifactError, ProviderError, EngineError: a version cannot be served; the routing stays as it was.
        """
        await self._carried_through(self._route(name, routing))

    async def _route(self, name: str, routing: Routing) -> None:
        routing.check()
        async with self._find(name).changing, self._loading:
            model = self._find(name)  # it may have been unloaded while this waited
            try:
                present = (await self._present()).get(name, [])
            except ConfigurationError:
                # Traffic can be taken off a bad version while the source is down, if all it needs is in service.
                present = sorted(model.served)
                if routing.missing(present):
                    raise
            known = sorted({*present, *model.served})
            if unknown := routing.missing(known):
                raise InvalidRequestError(f"model {name} has no version {', '.join(map(str, unknown))}; it has {known}")
            if not routing.answering(known):
                raise InvalidRequestError(_nobody_answers(name, routing, known))
            # Nothing answers before everything is there: a version in service may take traffic.
            loaded = await self._loaded_beside(name, routing.needed(present))
            model.routing = routing
            model.present = present
            model.by_hand.clear()
            model.unloaded = False
            for each in loaded:
                self._admit(model, *each)
            self._retire_others(name, present)
            self._touched.add(name)
            split = {"traffic": dict(routing.traffic)} if routing.traffic else {}
            _log.info("model routed", model=name, versions=routing.versions, shadow=routing.shadow, **split)

    async def check_canaries(self) -> None:
        """Runs every served version's canary once; a failure is logged and shows in the metrics.

        One that could not be run, because the server is busy or an image is out of reach, says nothing of the answers.
        """
        for served in list(self):
            difference: float | None = None
            wrong: ConvoyError | None = None
            try:
                difference = await served.canary()
            except CanaryError as error:
                difference, wrong = error.difference, error
            except EngineError as error:
                wrong = error
            except ConvoyError as error:
                _log.warning("canary could not run", model=served.name, version=served.number, error=str(error))
                continue
            if self._models[served.name].served.get(served.number) is not served:
                continue  # retired meanwhile: its series have ended
            self._metrics.canary(served.name, served.number, ok=wrong is None, difference=difference)
            if wrong is not None:
                _log.error("canary failed", model=served.name, version=served.number, error=str(wrong))

    async def close(self) -> None:
        """Retires everything and waits for it; changes under way are given up."""
        for change in self._changes:
            change.cancel()
        await asyncio.gather(*self._changes, return_exceptions=True)
        for served in list(self):
            self._retire(served.name, served.number)
        await asyncio.gather(*self._releases)

    # --- inside

    async def _carried_through(self, change: Coroutine[Any, Any, None]) -> None:
        """Makes a change to its end, even if the caller hangs up.

        The thread that loads would go on in any case, beside the next load, and what it loaded would belong to nobody.
        """
        task = asyncio.create_task(change)
        self._changes.add(task)
        task.add_done_callback(self._ended)
        await asyncio.shield(task)

    def _ended(self, change: asyncio.Task[None]) -> None:
        self._changes.discard(change)
        if not change.cancelled():
            change.exception()  # has been logged; if the caller has hung up nobody else asks for it

    def _find(self, name: str) -> ModelState:
        if not name and self._complete:
            serving = list(self.names())
            name = serving[0] if len(serving) == 1 else name
        model = self._models.get(name)
        if model is not None and model.ready:
            return model
        if not self._complete or (model is not None and model.coming):
            raise ModelNotReadyError("models are still being loaded", retry_after_ms=500)
        known = ", ".join(sorted(self.names())) or "none"
        raise NotFoundError(f"there is no model {name!r}; served are: {known}" if name else f"name the model: {known}")

    def _routing_for(self, name: str) -> Routing:
        known = self._models.get(name)
        return known.routing if known else self._routings.get(name, Routing())

    def _model(self, name: str) -> ModelState:
        if name not in self._models:
            model = self._models[name] = ModelState(self._routing_for(name))
            self._metrics.model_known(name, lambda: model.queued_images, lambda: len(model.lacking))
        return self._models[name]

    async def _present(self) -> dict[str, list[int]]:
        return await asyncio.to_thread(self._source.models)

    async def _numbers(self, name: str, number: int | None) -> list[int]:
        """The versions of a model in the source; NotFoundError if it has none, or not this one."""
        present = (await self._present()).get(name, [])
        if not present or (number is not None and number not in present):
            what = name if number is None else f"{name} version {number}"
            raise NotFoundError(f"the repository has no {what}: no {name}/{number or 1}/manifest.json is in it")
        return present

    def _is_lost(self, present: Mapping[str, list[int]]) -> bool:
        """A volume that is not mounted any more is an empty directory: what was in it still counts."""
        empty = not present and any(True for _ in self)
        self._metrics.repository_reachable.set(not empty)
        if empty and not self._empty:
            _log.warning(
                "repository is empty, what was loaded serves on; is its volume mounted?",
                repository=self._source.location,
            )
        self._empty = empty
        return empty

    async def _settle(self, name: str, present: list[int], *, strict: bool, force: bool = False) -> None:
        """Loads what a model needs, and retires the rest. The caller holds both locks.

        Args:
            name: of the model.
            present: its versions in the source.
            strict: a version that cannot be served is raised; else it is passed over.
            force: everything is loaded again.
        """
        model = self._model(name)
        model.present = present
        try:
            with model.awaiting():
                for number in model.needed(present):
                    with suppress(*(() if strict else (ConvoyError,))):
                        await self._replace(name, number, force=force, unless_served=strict)
        finally:
            model.settled = True
        self._retire_others(name, present)

    def _retire_others(self, name: str, present: list[int]) -> None:
        for number in self._models[name].superseded(present):
            self._withdraw(name, number)

    def _withdraw(self, name: str, number: int) -> None:
        """Takes a version out of service; when it is needed again it is loaded again."""
        self._retire(name, number)
        self._models[name].seen.pop(number, None)

    async def _replace(self, name: str, number: int, *, force: bool = False, unless_served: bool = False) -> None:
        """Loads a version unless its files are those of the last attempt, and swaps it in.

        Args:
            name: of the model.
            number: of the version.
            force: whatever its files are.
            unless_served: the same, if it is not in service.
        """
        model = self._model(name)
        wanted = force or (unless_served and number not in model.served) or model.may_try_again(number, self._clock())
        try:
            fingerprint = await asyncio.to_thread(self._source.fingerprint, name, number)
        except OutOfReachError as error:
            if not wanted and number in model.seen:  # whether it has changed is seen when it is back
                _log.warning("version cannot be looked at", model=name, version=number, error=str(error))
                return
            model.seen[number] = ()
            self._note_failure(name, number, error)
            raise
        if not wanted and model.seen.get(number) == fingerprint:
            return
        if not fingerprint and not force and number in model.served:
            return  # gone from the source: what is served stays until something takes its place
        self._admit(model, *await self._loaded(name, number, fingerprint))

    async def _loaded_beside(self, name: str, numbers: Iterable[int]) -> list[tuple[ServedModel, float]]:
        """Those versions that are not in service as they are in the source now; all of them, or none."""
        model = self._model(name)
        loaded: list[tuple[ServedModel, float]] = []
        try:
            for number in numbers:
                try:
                    fingerprint = await asyncio.to_thread(self._source.fingerprint, name, number)
                except OutOfReachError:
                    if number in model.served:
                        continue
                    raise
                if number not in model.served or fingerprint not in ((), model.seen.get(number)):
                    loaded.append(await self._loaded(name, number, fingerprint))
        except BaseException:
            for served, _ in loaded:
                model.seen.pop(served.number, None)
                await served.release(0)
            raise
        return loaded

    async def _loaded(self, name: str, number: int, fingerprint: Fingerprint) -> tuple[ServedModel, float]:
        """A version that is ready to serve, and its canary's largest difference; a failure is counted and kept."""
        model = self._model(name)
        model.seen[number] = fingerprint
        model.loading = load = loading.Load(name, number)
        path: Path | None = None
        try:
            with load.told_while_it_lasts():
                path = await asyncio.to_thread(self._source.fetch, name, number)
                gently = any(model.served for model in self._models.values())  # at the start nobody waits for the CPU
                served, difference = await asyncio.to_thread(self._load, path, gently)
            await _begin(served, name, path)
        except Exception as error:  # whatever is in a version's files must not end the round for all
            failure = loading.meaning(error, f"{name} version {number}", path)
            self._note_failure(name, number, failure)
            if failure is error:
                raise
            raise failure from error
        finally:
            model.loading = None
        model.note_success(number)
        return served, difference

    def _note_failure(self, name: str, number: int, failure: ConvoyError) -> None:
        self._models[name].note_failure(number, failure, self._clock())
        self._metrics.model_load_failures.labels(model=name).inc()
        _log.error("model not loaded", model=name, version=number, error=str(failure))

    def _admit(self, model: ModelState, served: ServedModel, difference: float) -> None:
        """From the next request on this version is in service."""
        if served.number in model.served:
            self._retire(served.name, served.number)
        model.served[served.number] = served
        model.failed.pop(served.number, None)
        self._metrics.model_loaded(
            served.name,
            served.number,
            **_what_runs(served),
            load_s=served.load_seconds,
            canary_difference=difference,
        )
        _log.info(
            "model loaded",
            model=served.name,
            version=served.number,
            provider=served.engine.provider,
            variant=served.engine.variant,
            canary_difference=round(difference, 6),
            seconds=round(served.load_seconds, 3),
        )

    def _retire(self, name: str, number: int) -> None:
        """Takes a version out of service now; its memory comes back when it has answered what it began."""
        model = self._models[name]
        served = model.served.pop(number)
        self._metrics.model_gone(name, number, **_what_runs(served))
        task = asyncio.create_task(self._release(served))
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)

    async def _release(self, served: ServedModel) -> None:
        name, number = served.name, served.number
        await served.release(self._release_timeout_s)
        del served
        if number not in self._models[name].served:  # else another of this number, loaded again, goes on counting
            self._metrics.model_released(name, number)
        await asyncio.to_thread(trim_memory)
        _log.info("model released", model=name, version=number)


async def _begin(served: ServedModel, name: str, path: Path) -> None:
    """Starts its threads; from now on it could answer."""
    try:
        _check_name(served, name, path)
        served.batcher.start()
    except BaseException:
        await served.release(0)
        raise


def _check_name(served: ServedModel, name: str, path: Path) -> None:
    if served.name != name:
        raise ArtifactError(f"{path}: the manifest says model {served.name}, the directory says {name}")


def _nobody_answers(name: str, routing: Routing, numbers: list[int]) -> str:
    beside = "" if routing.shadow is None else f" beside its shadow, {routing.shadow}"
    return f"model {name}: no version fits the policy {routing.versions!r}{beside}; it has {numbers}"


def _what_runs(served: ServedModel) -> dict[str, str]:
    """Which bytes of a version run, where, and what its manifest calls them."""
    running = served.engine.variant
    named = {variant.file: variant.name for variant in served.version.manifest.variants}
    return {
        "digest": served.version.digest[:12],
        "provider": served.engine.provider,
        "variant": named.get(running, running),
    }
