"""Where a study lives: an SQLite file or a PostgreSQL database that any number of workers share.

Workers take their trials one after the other under a lock of the storage's own kind, which the system releases when a
worker dies. So a budget of N trials is N trials, however many workers there are.
"""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
import sqlalchemy
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import URL
from sqlalchemy.pool import NullPool

from service import locks
from service.errors import ConfigurationError, TrainingError
from training.wording import first_line

Direction = Literal["maximize", "minimize"]

_KIND = "convoy"  # attribute of the study: what its trials have in common
_LOCK_KEY = zlib.crc32(b"convoy tune")
_BUSY_S = 60
_RETRIES = 2  # so often a trial is begun again whose worker died
_STOPPED = "convoy_stopped"  # attribute of a trial: numbers of those that were stopped in order and that it repeats


@dataclass(frozen=True)
class Heartbeat:
    """Signs of life of a running trial. After `grace_s` without one its worker counts as dead, and it is repeated."""

    interval_s: int = 15
    grace_s: int = 60


def storage_url(text: str) -> URL:
    """Checks a storage's URL.

    Raises:
        ConfigurationError: it is no URL, or one of another kind of database.
    """
    try:
        url = sqlalchemy.make_url(text)
    except (sqlalchemy.exc.ArgumentError, ValueError) as error:
        raise ConfigurationError(f"{text!r} is no storage URL; write sqlite:///study.db or postgresql://...") from error
    if url.drivername in {"postgres", "postgresql"}:
        return url.set(drivername="postgresql+psycopg")
    if url.get_backend_name() == "sqlite" and url.database not in {None, "", ":memory:"}:
        return url
    if url.get_backend_name() == "postgresql":
        return url
    raise ConfigurationError(f"{url} cannot hold a study; take an SQLite file (sqlite:///study.db) or PostgreSQL")


@contextmanager
def locked(url: URL) -> Iterator[None]:
    """No other worker on this storage is in such a block; waits for it."""
    if url.get_backend_name() == "sqlite":
        with locks.locked(Path(f"{url.database}.lock")):
            yield
        return
    engine = sqlalchemy.create_engine(url, poolclass=NullPool)
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text(f"SET lock_timeout = '{_BUSY_S}s'"))
        connection.execute(sqlalchemy.text("SELECT pg_advisory_lock(:key)"), {"key": _LOCK_KEY})
        yield  # the lock ends with the connection


class SharedStudy:
    """One study in a storage; `study` is Optuna's."""

    def __init__(
        self, url: URL, name: str, *, direction: Direction, pruner: optuna.pruners.BasePruner, heartbeat: Heartbeat
    ) -> None:
        """Opens the study, or begins it.

        Raises:
            ConfigurationError: the database cannot be reached or used.
        """
        self._url = url
        optuna.logging.set_verbosity(optuna.logging.ERROR)  # every trial is shown in our own words
        if url.get_backend_name() == "sqlite":
            _make_parent(url)
        try:
            with locked(url):
                self._storage = _open(url, heartbeat)
                self.study = optuna.create_study(
                    storage=self._storage, study_name=name, direction=direction, pruner=pruner, load_if_exists=True
                )
        except ModuleNotFoundError as error:
            raise ConfigurationError(f"{url} needs the driver {error.name}: pip install 'psycopg[binary]'") from error
        except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.OptunaError, RuntimeError, OSError) as error:
            raise ConfigurationError(f"the storage {url} cannot be used: {_words(error)}") from error

    def agree(self, kind: Mapping[str, Any]) -> dict[str, Any]:
        """Stores what all trials have in common, or compares it with what is stored.

        Args:
            kind: JSON values; those of the key "free" may differ, and the stored ones win.

        Returns:
            What is stored.

        Raises:
            ConfigurationError: the study was begun otherwise.
        """
        mine: dict[str, Any] = json.loads(json.dumps(kind))
        with self.failures_told(), locked(self._url):
            stored = self.study.user_attrs.get(_KIND)
            if stored is None and self.study.get_trials(deepcopy=False):
                raise ConfigurationError(f"study {self.study.study_name} is not one of `convoy tune`; choose another")
            if stored is None:
                self.study.set_user_attr(_KIND, mine)
                return mine
        changed = sorted(_differences(_without_free(stored), _without_free(mine)))
        if changed:
            raise ConfigurationError(
                f"study {self.study.study_name} was begun with another {', '.join(changed)}, and its trials cannot be "
                "compared with new ones; give the same settings, or begin another with --study NAME"
            )
        return dict(stored)

    @contextmanager
    def claiming(self) -> Iterator[None]:
        """In this block a worker looks whether a trial is left, and takes it; trials of dead workers are put back."""
        with locked(self._url):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                optuna.storages.fail_stale_trials(self.study)
            yield

    @contextmanager
    def failures_told(self) -> Iterator[None]:
        """Errors of the storage become a `TrainingError`."""
        try:
            yield
        except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
            raise TrainingError(
                f"the storage {self._url} failed: {_words(error)}; the same command goes on with the study"
            ) from error

    def remaining(self, budget: int) -> int:
        """Trials to begin: those that were put back, and new ones until the study has had `budget`."""
        trials = self.study.get_trials(deepcopy=False)
        waiting = sum(trial.state == TrialState.WAITING for trial in trials)
        return waiting + max(0, budget - len(effective(trials)))

    def put_back(self, number: int) -> None:
        """A trial that was cut short will be repeated with the same values, by whichever worker comes first.

        Not by Optuna's own way, which would count it as another death of a worker.
        """
        trial = next(t for t in self.study.get_trials(deepcopy=True) if t.number == number)
        stopped = [*trial.system_attrs.get(_STOPPED, ()), number]
        self.study.add_trial(
            optuna.create_trial(
                state=TrialState.WAITING,
                params=trial.params,
                distributions=trial.distributions,
                user_attrs=trial.user_attrs,
                system_attrs={**trial.system_attrs, _STOPPED: stopped},
            )
        )

    def close(self) -> None:
        """Gives connections back."""
        self._storage.engine.dispose()


def effective(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """The trials without those that have been put back: what the budget counts."""
    keys = ("retry_history", _STOPPED)
    repeated = {number for trial in trials for key in keys for number in trial.system_attrs.get(key, ())}
    return [trial for trial in trials if trial.number not in repeated]


def _open(url: URL, heartbeat: Heartbeat) -> RDBStorage:
    sqlite = {"connect_args": {"timeout": _BUSY_S}} if url.get_backend_name() == "sqlite" else {}
    with warnings.catch_warnings():
        # Heartbeats are marked as experimental since Optuna 2.9.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return RDBStorage(
            url.render_as_string(hide_password=False),
            engine_kwargs=sqlite or {"pool_pre_ping": True},
            heartbeat_interval=heartbeat.interval_s,
            grace_period=heartbeat.grace_s,
            heartbeat_stale_trial_callback=_retry_of_dead(),
        )


def _retry_of_dead() -> RetryHeartbeatStaleTrialCallback:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # as above
        return RetryHeartbeatStaleTrialCallback(max_retry=_RETRIES)


def _make_parent(url: URL) -> None:
    folder = Path(str(url.database)).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"the folder of {url} cannot be made: {error.strerror}; choose another") from error


def _without_free(kind: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in kind.items() if key != "free"}


def _differences(stored: Any, mine: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys at which two trees differ."""
    if not (isinstance(stored, dict) and isinstance(mine, dict)):
        if stored != mine:
            yield prefix
        return
    for key in {*stored, *mine}:
        yield from _differences(stored.get(key), mine.get(key), f"{prefix}.{key}" if prefix else key)


def _words(error: BaseException) -> str:
    """The database's own, without SQL."""
    return first_line(getattr(error, "orig", None) or getattr(error.__cause__, "orig", None) or error)
