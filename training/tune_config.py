"""The `tune:` section of an experiment file: how `convoy tune` searches, and what.

    tune:
      trials: 40
      objective: accuracy
      pruner: {name: median, startup_trials: 5, warmup_epochs: 2}
      space:
        optimiser.learning_rate: {low: 0.0001, high: 0.01, log: true}
        loop.batch_size: {choices: [32, 64, 128]}
        model.options.dropout: {low: 0, high: 0.5}
        augment_strength: {low: 0, high: 2}

The keys of `space` are settings of the experiment, and `augment_strength`, which multiplies all its augmentation.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, FiniteFloat, Tag, ValidationError, model_validator

from service import validation
from service.errors import ConfigurationError
from training.config import Count, Positive, Section, read_yaml

Value = bool | int | float | str | None


class Range(Section):
    """Numbers between two bounds, both included. `log`: evenly by ratio. `step`: only low, low + step ..."""

    low: FiniteFloat
    high: FiniteFloat
    log: bool = False
    step: Positive | None = None

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low {self.low:g} has to be less than high {self.high:g}")
        if self.log and (self.low <= 0 or self.step):
            raise ValueError("log needs low above 0, and goes without a step")
        if not self._on_step(self.high):
            raise ValueError("high has to be low plus a whole number of steps")
        return self

    def holds(self, value: Any) -> bool:
        """Whether the search could come upon this number."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not self.low <= value <= self.high:
            return False
        return self._on_step(value)

    def _on_step(self, value: float) -> bool:
        steps = (value - self.low) / self.step if self.step else 0.0
        return abs(steps - round(steps)) < 1e-6  # noqa: PLR2004 - rounding of sums of steps


class Choices(Section):
    """One of several values."""

    choices: Annotated[tuple[Value, ...], Field(min_length=2)]

    @model_validator(mode="after")
    def _different(self) -> Self:
        if len({(type(choice), choice) for choice in self.choices}) < len(self.choices):
            raise ValueError("a choice is listed twice")
        return self

    def holds(self, value: Any) -> bool:
        """Whether it is one of them."""
        return value in self.choices


def _kind(value: Any) -> str:
    chosen = "choices" in value if isinstance(value, Mapping) else isinstance(value, Choices)
    return "Choices" if chosen else "Range"


def _told_apart(value: Any) -> Any:
    """A list could be the ends of a range or the values of a choice."""
    if isinstance(value, list | tuple):
        # Pydantic makes a message of ValueError, and lets TypeError through.
        raise ValueError("write {low: ..., high: ...} for a range, or {choices: [...]} for some values")  # noqa: TRY004
    return value


Dimension = Annotated[
    Annotated[Range, Tag("Range")] | Annotated[Choices, Tag("Choices")],
    Discriminator(_kind),
    BeforeValidator(_told_apart),
]


class MedianConfig(Section):
    """Stops a trial whose best figure so far is below the median of the earlier trials after as many epochs.

    `startup_trials`: finish before any is stopped. `warmup_epochs`: nothing is stopped within these.
    """

    name: Literal["median"] = "median"
    startup_trials: Annotated[int, Field(ge=1)] = 5
    warmup_epochs: Annotated[int, Field(ge=0)] = 1


class HyperbandConfig(Section):
    """Successive halving with several least budgets (Li et al., arXiv:1603.06560).

    `min_epochs`: every trial may run. `reduction_factor`: one in so many goes on.
    """

    name: Literal["hyperband"]
    min_epochs: Count = 1
    reduction_factor: Annotated[int, Field(ge=2)] = 3


class NoPruning(Section):
    """Every trial runs to its end."""

    name: Literal["none"]


Pruner = Annotated[MedianConfig | HyperbandConfig | NoPruning, Field(discriminator="name")]


class TuneConfig(Section):
    """A study.

    `trials`: of the study, over all workers and resumptions. `timeout_s`: of one worker. `objective`: validation
    accuracy or validation loss of a trial's best epoch. `space`: empty takes `default_space`.
    """

    trials: Count = 30
    timeout_s: Positive | None = None
    objective: Literal["accuracy", "loss"] = "accuracy"
    pruner: Pruner = MedianConfig()
    space: Mapping[str, Dimension] = {}


def load_tuning(experiment_file: Path | None, space_file: Path | None, overrides: Mapping[str, Any]) -> TuneConfig:
    """The `tune:` section of an experiment file, or a file of its own with the same content.

    Args:
        experiment_file: may lack the section.
        space_file: goes before the section.
        overrides: values by key, such as {"trials": 5}.

    Raises:
        ConfigurationError: a file cannot be read, or a value is unknown or out of its range.
    """
    file = space_file or experiment_file
    tree: Any = read_yaml(file) if file else {}
    if space_file is None or set(tree) == {"tune"}:
        tree = tree.get("tune") or {}
    try:
        return TuneConfig.model_validate({**tree, **overrides} if isinstance(tree, dict) else tree)
    except ValidationError as error:
        where = f"{file}: " if file else ""
        raise ConfigurationError(where + "; ".join(_fault(dict(e)) for e in error.errors())) from error


def _fault(error: Mapping[str, Any]) -> str:
    key = ".".join(("tune", *(str(part) for part in error["loc"] if part not in {"Range", "Choices"})))
    if error["type"] == "extra_forbidden":
        return f"{key} is not a setting of tuning"
    message = validation.message(error)
    if error["type"] == "missing":
        return f"{key} is missing"
    return f"{key}: {message[0].lower()}{message[1:]}"
