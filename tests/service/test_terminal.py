"""How wide tables are."""

import io
import os
import pty
import sys

import pytest
from rich.console import Console
from rich.table import Table

from service import terminal


@pytest.fixture(autouse=True)
def no_columns(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)


def test_in_a_pipe_tables_are_as_wide_as_they_need(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())

    assert terminal.console().width == 200


def test_the_user_s_own_width_wins(monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")

    assert terminal.console().width == 70


def test_a_terminal_is_as_wide_as_it_is(monkeypatch):
    leader, follower = pty.openpty()
    os.set_blocking(leader, False)
    with os.fdopen(leader, "rb"), os.fdopen(follower, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)

        assert terminal.console().width == Console().width


def test_what_looks_like_markup_in_a_name_is_printed_as_it_is(capsys):
    table = Table("architecture")
    table.add_row("net[v2] [/x] [red]")
    terminal.console().print(table)

    assert "net[v2] [/x] [red]" in capsys.readouterr().out


def test_without_an_output_nothing_fails(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)

    terminal.console().print("nobody reads this")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("Käfer 日本 👩‍🔬", "Käfer 日本 👩‍🔬"),
        ("red\x1b[31m", r"red\x1b[31m"),
        ("two\nlines\ttab", r"two\nlines\ttab"),
        ("c1 \x9b", r"c1 \x9b"),
    ],
)
def test_names_of_others_do_nothing_to_the_terminal(name, shown):
    assert terminal.printable(name) == shown
