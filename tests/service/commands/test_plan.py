"""`convoy plan`, as a person runs it."""

import json
import subprocess
import sys

import pytest
from toys import ROOT, environment
from variants import slowed, version_with

from service.exits import Exit


@pytest.fixture
def version(tmp_path):
    return version_with(tmp_path / "models", fp32=slowed, int8=lambda model: model)


@pytest.fixture
def convoy(tmp_path):
    """Runs the command with a cache of its own; gives the exit code, stdout and stderr."""

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, "-m", "service", "plan", *map(str, arguments)],
            cwd=ROOT,
            env=environment(
                {"CONVOY_CACHE_DIR": str(tmp_path / "cache"), "HOME": str(tmp_path / "home"), "COLUMNS": "100"}
            ),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        return done.returncode, done.stdout, done.stderr

    return run


def test_the_table_says_what_was_chosen_and_from_what(convoy, version):
    code, shown, said = convoy(version.path, "--providers", "cpu")
    assert (code, said) == (Exit.OK, "")
    rows = [line.split() for line in shown.splitlines()]
    assert next(row for row in rows if row[:1] == ["chosen"])[1:3] == ["int8", "cpu"]
    assert next(row for row in rows if row[:1] == ["slower"])[1:3] == ["fp32", "cpu"]
    assert "measured in" in shown


def test_onnx_runtime_reports_nothing_and_keeps_no_identifier(convoy, version, tmp_path):
    (tmp_path / "home").mkdir()
    assert convoy(version.path, "--providers", "cpu")[0] == Exit.OK
    assert not list((tmp_path / "home").rglob("*"))


def test_the_second_time_it_is_remembered(convoy, version):
    convoy(version.path, "--providers", "cpu")
    assert "remembered" in convoy(version.path, "--providers", "cpu")[1]
    assert "measured in" in convoy(version.path, "--providers", "cpu", "--refresh")[1]


def test_json_has_every_row(convoy, version):
    code, shown, _ = convoy(version.path, "--providers", "cpu", "--variant", "fp32", "--json")
    assert code == Exit.OK
    (row,) = json.loads(shown)["rows"]
    assert (row["variant"], row["outcome"], row["difference"] < 1e-4) == ("fp32", "chosen", True)


def test_the_server_s_settings_count(convoy, version, tmp_path):
    config = tmp_path / "convoy.yaml"
    config.write_text("model_settings: {grey: {variant: fp32, providers: [cpu]}}")
    shown = convoy(version.path, "--config", config)[1]
    assert "int8" not in shown


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--providers", "cuda"), "cuda: the NVIDIA driver shows no GPU to this process"),
        (("--providers", "cudo"), "no provider cudo"),
        (("--variant", "fp16"), "has no variant fp16; it has fp32, int8"),
    ],
)
def test_what_cannot_be_is_one_line(convoy, version, arguments, told):
    code, shown, said = convoy(version.path, *arguments)
    assert code == Exit.USAGE
    assert shown == ""
    assert told in said
    assert said.count("\n") == 1


def test_no_directory(convoy, tmp_path):
    code, _, said = convoy(tmp_path / "nowhere")
    assert code == Exit.USAGE
    assert "is no directory" in said
