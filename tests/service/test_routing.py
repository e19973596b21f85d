"""What a routing asks for, and what is none."""

import math

import pytest

from service.errors import InvalidRequestError
from service.routing import Routing, wanted_versions

PRESENT = [1, 2, 3, 10]


@pytest.mark.parametrize(
    ("policy", "wanted"),
    [("latest", [10]), ("latest:2", [3, 10]), ("latest:9", PRESENT), ("all", PRESENT), ("1, 3", [1, 3]), ("4", [])],
)
def test_a_policy_chooses_among_what_is_present(policy, wanted):
    assert wanted_versions(policy, PRESENT) == wanted


MANY_DIGITS = "9" * 5000


@pytest.mark.parametrize(
    "policy", ["", "newest", "latest:0", "latest:x", "1;3", "-1", MANY_DIGITS, f"latest:{MANY_DIGITS}"]
)
def test_what_is_no_policy_is_refused(policy):
    with pytest.raises(InvalidRequestError, match="latest:N"):
        Routing(policy).check()


@pytest.mark.parametrize("weights", [(0, 1), (-1, 2), (math.nan, 1), (math.inf, 1), (1e308, 1e308)])
def test_weights_that_split_nothing_are_refused(weights):
    with pytest.raises(InvalidRequestError, match="traffic split"):
        Routing(traffic=dict(enumerate(weights, 1))).check()


def test_what_is_named_and_present_is_needed_and_what_is_not_present_is_missing():
    routing = Routing("1,4", {2: 1.0, 8: 1.0}, shadow=9)

    assert routing.needed(PRESENT) == [1, 2]
    assert routing.missing(PRESENT) == [4, 8, 9]
    assert Routing(traffic={0: 1.0}, shadow=3).missing(PRESENT) == [0]
    assert Routing().missing([]) == []


@pytest.mark.parametrize(
    ("policy", "answering"), [("latest", [3]), ("latest:2", [2, 3]), ("all", [1, 2, 3]), ("10", [])]
)
def test_a_policy_chooses_who_answers_beside_the_shadow(policy, answering):
    routing = Routing(policy, shadow=10)

    assert routing.answering(PRESENT) == answering
    assert routing.needed(PRESENT) == [*answering, 10]


@pytest.mark.parametrize("routing", [Routing(traffic={1: 1.0, 2: 1.0}, shadow=2), Routing("2", shadow=2)])
def test_a_shadow_that_would_answer_or_leave_nobody_who_does_is_refused(routing):
    with pytest.raises(InvalidRequestError, match="shadow"):
        routing.check()
