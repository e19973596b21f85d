"""The command `convoy import`."""

import dataclasses

import pytest
from click.testing import CliRunner
from foreign_models import exported, hand_made, pooled

from service import artifact
from training import import_cli
from training.conventions import PRESETS, Request


def test_the_command_imports_and_says_what_comes_next(tmp_path, labels):
    exported(tmp_path / "net.onnx")

    result = CliRunner().invoke(
        import_cli.import_model,
        [str(tmp_path / "net.onnx"), "--labels", str(labels), "--repository", str(tmp_path / "r"),
         "--mean", "0.5", "--std", "0.2,0.3,0.4", "--order", "bgr", "--resize", "crop", "--shorter-side", "40",
         "--licence", "MIT"],
        catch_exceptions=False,
    )  # fmt: skip

    manifest = artifact.load(tmp_path / "r" / "net" / "1").manifest
    assert result.exit_code == 0
    assert "convoy classify IMAGE --server localhost:8500 --model net" in result.output
    assert "Images: shorter side to 40 (bilinear, antialiased), centre crop 32x24, bgr, minus 0.5" in result.output
    assert manifest.recipe["mean"] == [0.5, 0.5, 0.5]
    assert manifest.recipe["std"] == [0.2, 0.3, 0.4]
    assert manifest.recipe["channel_order"] == "bgr"
    assert manifest.input.resize.shorter_side == 40
    assert manifest.weights.licence == "MIT"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mean", "a,b"], "is not a number or a list"),
        (["--size", "0x12"], "is not a size"),
        (["--size", "12x"], "is not a size"),
        (["--preset", "imagenet"], "imagenet-torchvision"),
        ([], "Missing option '--labels'"),
    ],
)
def test_the_command_explains_wrong_flags(tmp_path, flags, message):
    given = ["--labels", "missing.txt"] if flags else []

    result = CliRunner().invoke(import_cli.import_model, ["net.onnx", *given, *flags])

    assert result.exit_code == 2
    assert message in result.output


def test_the_command_reads_sizes_of_one_number_or_two(tmp_path, labels):
    body, weights = pooled()
    path = tmp_path / "net.onnx"
    hand_made(path, shape=["n", 3, "h", "w"], body=body, output={"y": ["n", 5]}, initializers=[("weights", weights)])

    for size in ("12", "12x16"):
        flags = ["--labels", str(labels), "--size", size, "--repository", str(tmp_path / "r"), "--preset", "none"]
        CliRunner().invoke(import_cli.import_model, [str(path), *flags], catch_exceptions=False)

    shapes = [artifact.load(tmp_path / "r" / "net" / number).manifest.input.shape for number in ("1", "2")]
    assert shapes == [(12, 12, 3), (12, 16, 3)]


def test_the_command_knows_every_preset():
    choices = next(p.type.choices for p in import_cli.import_model.params if p.name == "preset")

    assert tuple(choices) == tuple(PRESETS)


def test_every_choice_of_the_command_is_a_field_of_the_request():
    fields = {field.name for field in dataclasses.fields(Request)}
    flags = {p.name for p in import_cli.import_model.params} - {"repository", "source", "licence"}

    assert flags == fields - {"weights"}
