import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from service.errors import ConfigurationError
from training.models import names
from training.zoo import zoo


def run(*args):
    return CliRunner().invoke(zoo, args, catch_exceptions=False, env={"COLUMNS": "100"})


def test_the_table_has_every_architecture_with_its_figures():
    output = run().output
    rows = {cells[0]: cells[1:] for line in output.splitlines() if len(cells := line.replace("│", " ").split()) >= 5}
    assert set(names()) <= set(rows)
    assert rows["resnet50"] == ["25,557,032", "4.09", "224x224x3", "1", "80.86"]
    assert rows["inception_v3"] == ["23,834,568", "5.71", "299x299x3", "75", "77.29"]
    assert rows["lenet5"] == ["61,706", "0.000417", "32x32x1", "16"]


def test_json_has_all_that_is_known():
    lenet, resnet = json.loads(run("--json", "lenet5", "resnet50").stdout)
    assert (lenet["name"], lenet["parameters"], lenet["classes"], lenet["weights"]) == ("lenet5", 61_706, 10, [])
    assert (resnet["name"], resnet["multiply_adds"], resnet["classes"]) == ("resnet50", 4_089_184_256, 1000)
    assert [(w["file"], w["top1"], w["shorter_side"]) for w in resnet["weights"]] == [
        ("resnet50-0676ba61.pth", 76.13, 256),
        ("resnet50-11ad3fa6.pth", 80.858, 232),
    ]
    assert resnet["weights"][0]["file"] == "resnet50-0676ba61.pth"
    assert {option["name"] for option in resnet["options"]} == {"small_images", "width", "dropout", "zero_init"}
    assert resnet["input"]["resize"] == {"mode": "crop", "shorter_side": 256, "interpolation": "bilinear"}


def test_names_show_options_and_files():
    output = run("googlenet", "lenet5").output
    for text in (
        "6,624,904",
        "option aux",
        "from 0 to 0.95",
        "googlenet-1378be20.pth",
        "option classic",
        "at least 16x16",
    ):
        assert text in output
    assert "resnet" not in output


def test_an_unknown_name_is_a_clear_error():
    with pytest.raises(ConfigurationError, match="did you mean resnet50"):
        run("resnet5")


def test_help_does_not_load_torch():
    code = "import sys, training.zoo as z; z.zoo.main(['--help'], standalone_mode=False); print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "convoy zoo --json" in answer
    assert answer.endswith("False\n")
