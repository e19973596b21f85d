"""Every error ends with its documented exit code."""

import pytest

from service import errors, exits
from service.exits import Exit


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ConfigurationError("x"), Exit.USAGE),
        (errors.ProviderError("x"), Exit.USAGE),
        (errors.ArtifactError("x"), Exit.BAD_INPUT),
        (errors.DataError("x"), Exit.BAD_INPUT),
        (errors.TrainingError("x"), Exit.BAD_INPUT),
        (exits.ServerUnreachableError("x"), Exit.UNREACHABLE),
        (exits.ServerRefusedError("INTERNAL", "x"), Exit.REFUSED),
        (exits.PartialError("x"), Exit.PARTIAL),
        (errors.ConvoyError("x"), Exit.UNEXPECTED),
    ],
    ids=lambda value: type(value).__name__,
)
def test_each_error_has_its_code(error, code):
    assert exits.code_of(error) is code


def test_the_numbers_are_a_promise():
    assert {code.name: int(code) for code in Exit} == {
        "OK": 0,
        "UNEXPECTED": 1,
        "USAGE": 2,
        "BAD_INPUT": 3,
        "UNREACHABLE": 4,
        "REFUSED": 5,
        "PARTIAL": 6,
        "INTERRUPTED": 75,
        "CTRL_C": 130,
    }


def test_the_table_lists_every_code_with_its_meaning():
    lines = exits.table().splitlines()

    assert len(lines) == len(Exit)
    assert all(str(code.value) in line and code.meaning in line for code, line in zip(Exit, lines, strict=True))
