import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from service.errors import ConfigurationError
from training.cli import augment_preview, train
from training.config import load_experiment, setting_names
from training.options import overrides_of

ROOT = Path(__file__).parents[2]
QUICK = ["--image-size", "16", "--precision", "float32", "--threads", "1"]


def environment():
    return {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}", "OMP_NUM_THREADS": "1"}


def test_the_command_line_loads_without_torch():
    code = (
        "import sys, training.cli; "
        "print(sorted({'torch', 'numpy', 'pydantic', 'rich', 'matplotlib', 'onnx'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_without_the_extra_it_says_what_to_install(tmp_path):
    code = (
        "import sys, importlib.util as u; find = u.find_spec; "
        "u.find_spec = lambda name, *a: None if name == 'torch' else find(name, *a); "
        "from training.cli import require_extra; require_extra()"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False)
    assert "training needs torch" in done.stderr
    assert "pip install '.[training]'" in done.stderr


def test_trains_and_says_what_to_type_next(digit_folder, tmp_path):
    arguments = [str(digit_folder), "--epochs", "1", "--repository", str(tmp_path / "m"), "--runs", str(tmp_path / "r")]
    result = CliRunner().invoke(train, [*arguments, *QUICK], catch_exceptions=False)
    assert result.exit_code == 0
    assert f"Wrote {tmp_path / 'm' / 'digits' / '1'}" in result.output
    assert f"convoy serve --repository {tmp_path / 'm'}" in result.output


def test_sigterm_leaves_a_checkpoint_and_code_75_and_resume_finishes(digit_folder, tmp_path):
    arguments = [str(digit_folder), "--repository", str(tmp_path / "m"), "--runs", str(tmp_path / "r"), *QUICK]
    code = "from training.cli import train; train()"
    command = [sys.executable, "-u", "-c", code, *arguments, "--epochs", "2000", "--set", "loop.stuck_epochs=0"]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("epoch 3/"):
                process.send_signal(signal.SIGTERM)
                break
        rest = process.stdout.read()
        assert process.wait(60) == 75
    assert "--resume" in rest
    refused = CliRunner().invoke(train, [*arguments, "--epochs", "5", "--resume"])
    assert isinstance(refused.exception, ConfigurationError)
    assert "loop.epochs" in str(refused.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "0 is not in the range"),
        (["--epohcs", "3"], "Did you mean"),
        (["--optimiser", "lion"], "'lion' is not one of"),
    ],
)
def test_wrong_flags_are_usage_errors(digit_folder, arguments, message):
    result = CliRunner().invoke(train, [str(digit_folder), *arguments])
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "lenet6"], "did you mean lenet5"),
        (["--name", "a b"], "letters, digits"),
        (["--set", "loop.epochs"], "write KEY=VALUE"),
        (["--set", "loop.epohcs=3"], r"loop\.epohcs is not a setting; did you mean loop\.epochs\? .*--print-settings"),
        (
            ["--strategy", "linear-probe"],
            r"transfer\.strategy = linear-probe says how to learn from weights, and there",
        ),
        (["--freeze-norm"], r"transfer\.freeze_norm = True says how"),
        (["--config", "no-such"], "digits-lenet"),
        (["--resume"], "no run to resume"),
        (["--find-lr", "--runs", "{data}/runs"], "among the images"),
    ],
)
def test_wrong_settings_are_configuration_errors(digit_folder, tmp_path, arguments, message):
    arguments = [argument.format(data=digit_folder) for argument in arguments]
    result = CliRunner().invoke(train, [str(digit_folder), "--runs", str(tmp_path), *arguments])
    assert isinstance(result.exception, ConfigurationError)
    assert re.search(message, str(result.exception))


def test_all_settings_are_printed_as_an_experiment_file(tmp_path):
    flags = ["--model", "resnet18", "--epochs", "7", "--set", "augment.fill=reflection"]
    result = CliRunner().invoke(train, ["--print-settings", *flags], catch_exceptions=False)
    (tmp_path / "mine.yaml").write_text(result.output)
    experiment = load_experiment(tmp_path / "mine.yaml", {})
    assert (experiment.model.name, experiment.loop.epochs, experiment.augment.fill) == ("resnet18", 7, "reflection")
    assert all(re.search(rf"^ *{key.rpartition('.')[2]}:", result.output, re.MULTILINE) for key in setting_names())


def test_without_images_the_command_says_what_is_missing():
    result = CliRunner().invoke(train, ["--epochs", "1"])
    assert result.exit_code == 2
    assert "Missing argument 'DATA'" in result.output


def test_without_a_name_the_model_is_called_as_its_images(digit_folder, tmp_path):
    file = tmp_path / "experiment.yaml"
    for text, name in (("loop: {epochs: 1}", digit_folder.name), ("name: mine", "mine")):
        file.write_text(text)
        arguments = ["--runs", str(tmp_path), "--config", str(file), "--resume"]
        result = CliRunner().invoke(train, [str(digit_folder), *arguments])
        assert f"{tmp_path / name} holds no run" in str(result.exception)


def test_only_given_flags_override():
    flags = dict.fromkeys(
        [parameter.name for parameter in train.params if parameter.name not in {"data", "assignments"}], None
    )
    given = overrides_of(
        {**flags, "epochs": 3, "horizontal_flip": False},
        ["augment.fill=zeros", "optimiser.learning_rate=1e-3", "loop.patience=4"],
    )
    assert given == {
        "loop.epochs": 3,
        "augment.horizontal_flip": False,
        "augment.fill": "zeros",
        "optimiser.learning_rate": 0.001,
        "loop.patience": 4,
    }


def test_the_preview_is_a_grid(digit_folder, tmp_path):
    output = tmp_path / "grid.png"
    arguments = [str(digit_folder), "--output", str(output), "--rows", "3", "--columns", "4", "--rotation", "40"]
    result = CliRunner().invoke(augment_preview, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    with Image.open(output) as picture:
        assert picture.size == (4 * 66, 3 * 66)
        tiles = [picture.crop((66 * x, 0, 66 * x + 64, 64)).tobytes() for x in range(4)]
    assert len(set(tiles)) == 4


def test_shards_are_not_previewed(tmp_path):
    (tmp_path / "train-000.tar").touch()
    result = CliRunner().invoke(augment_preview, [str(tmp_path), "--output", str(tmp_path / "grid.png")])
    assert "holds tar shards, which cannot be previewed" in str(result.exception)
