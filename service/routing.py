"""Who answers a model's requests, and which versions that needs."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from service.errors import InvalidRequestError

_MOST_DIGITS = 19


@dataclass(frozen=True)
class Routing:
    """Who answers a model's requests.

    `versions`: policy, see `wanted_versions`. `traffic`: weight of each version for requests that name none; empty
    gives all to the latest. `shadow`: a version that gets a copy of every request and never answers.
    """

    versions: str = "latest"
    traffic: Mapping[int, float] = field(default_factory=dict)
    shadow: int | None = None

    def check(self) -> None:
        """Raises InvalidRequestError for what makes no sense, or what leaves no version to answer.

        A policy that is none, weights that nothing can be split by, a shadow that is to answer, too.
        """
        wanted_versions(self.versions, [])
        if self.shadow in self.traffic:
            raise InvalidRequestError(
                f"version {self.shadow} cannot be the shadow and have traffic: a shadow never answers"
            )
        if self.shadow is not None and set(_numbers(self.versions) or ()) == {self.shadow} and not self.traffic:
            raise InvalidRequestError(f"version {self.shadow} is the shadow, and no other would answer")
        weights = self.traffic.values()
        if any(not weight > 0 for weight in weights):
            raise InvalidRequestError("the weights of a traffic split have to be above 0; leave a version out instead")
        if not math.isfinite(sum(weights)):
            raise InvalidRequestError("the weights of a traffic split have to be numbers with a finite sum")

    def needed(self, present: list[int]) -> list[int]:
        """Versions that have to be loaded, of those that are present."""
        shadow = {self.shadow} & set(present)
        return sorted({*self.answering(present), *(number for number in shadow if number is not None)})

    def answering(self, present: Collection[int]) -> list[int]:
        """Of those, the ones that answer: the latest, for instance, are the latest beside the shadow."""
        others = sorted(number for number in present if number != self.shadow)
        return sorted({*wanted_versions(self.versions, others), *(set(self.traffic) & set(others))})

    def missing(self, present: Collection[int]) -> list[int]:
        """Versions that it names and that are not present."""
        shadow = [] if self.shadow is None else [self.shadow]
        return sorted({*self.traffic, *shadow, *(_numbers(self.versions) or ())} - set(present))


def wanted_versions(policy: str, present: Sequence[int]) -> list[int]:
    """The versions that a policy asks for, of those that are present, ascending.

    Args:
        policy: `latest`, `latest:N`, `all`, or numbers such as `1,3`.
        present: version numbers, ascending.

    Raises:
        InvalidRequestError: the policy is none of these.
    """
    word, _, count = policy.partition(":")
    if policy == "all":
        return list(present)
    if word == "latest" and (not count or (_is_number(count) and int(count) > 0)):
        return list(present[-int(count or 1) :])
    numbers = _numbers(policy)
    if numbers is None:
        raise InvalidRequestError(f"the version policy {policy!r} is none of: latest, latest:N, all, numbers like 1,3")
    return [number for number in present if number in numbers]


def _numbers(policy: str) -> list[int] | None:
    """The numbers that a policy lists; None if it is no list of numbers."""
    parts = [part.strip() for part in policy.split(",")]
    return [int(part) for part in parts] if all(map(_is_number, parts)) else None


def _is_number(text: str) -> bool:
    """Digits, and not more of them than any version has."""
    return text.isdecimal() and len(text) <= _MOST_DIGITS
