"""The image files, without building them: that takes minutes, root and buildah, and is `make images`."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "deploy" / "images"
FILES = sorted(IMAGES.glob("*.Dockerfile"))


@pytest.fixture(params=FILES, ids=[path.stem for path in FILES])
def file(request):
    return request.param


def instructions(path):
    """Instruction and arguments of each line of the last stage."""
    text = path.read_text().replace("\\\n", " ")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line.strip() and not line.startswith("#")]
    last = max(index for index, (word, *_) in enumerate(lines) if word == "FROM")
    return lines[last:]


def test_hadolint_finds_nothing(tool, file):
    done = subprocess.run(
        [tool("hadolint"), "--failure-threshold", "info", str(file)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_the_base_comes_through_the_one_argument(file):
    bases = re.findall(r"^FROM (\S+)", file.read_text(), re.MULTILINE)
    assert set(bases) == {"${BASE}"}
    assert re.findall(r"^ARG (\w+)", file.read_text(), re.MULTILINE) == ["BASE"]


@pytest.mark.parametrize("name", ["service-cpu", "service-gpu", "training"])
def test_the_last_stage_installs_nothing_and_is_no_root(name):
    words = dict(instructions(IMAGES / f"{name}.Dockerfile"))
    assert "RUN" not in words
    assert re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", words["USER"])
    # In exec form, or signals would reach a shell.
    assert words["ENTRYPOINT"] == '["convoy"]'


def test_the_user_of_the_images_is_the_user_of_the_pods(rendered):
    pod = rendered("base").pod()["securityContext"]
    for name in ("service-cpu", "service-gpu", "training"):
        user = dict(instructions(IMAGES / f"{name}.Dockerfile"))["USER"]
        assert user == f"{pod['runAsUser']}:{pod['runAsGroup']}"


def requirements(*arguments, folder=ROOT):
    return subprocess.run(
        [sys.executable, str(IMAGES / "requirements.py"), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_every_requirement_is_pinned_and_the_service_has_no_torch():
    done = requirements("--cpu", "--extra", "openvino")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split()
    assert all("==" in line for line in lines)
    names = {line.split("==")[0] for line in lines}
    assert {"onnxruntime", "onnxruntime-ep-openvino", "grpcio"} <= names
    assert not {"onnxruntime-gpu", "torch", "onnx"} & names


def test_the_training_image_has_torch():
    done = requirements("--cpu", "--extra", "training", "--extra", "openvino")
    assert re.search(r"^torch==", done.stdout, re.MULTILINE), done.stderr


def test_a_requirement_without_a_pin_stops_the_build(tmp_path):
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    pins = (ROOT / "constraints.txt").read_text()
    (tmp_path / "constraints.txt").write_text(re.sub(r"(?m)^grpcio==.*\n", "", pins))
    done = requirements("--cpu", folder=tmp_path)
    assert done.returncode != 0
    assert "grpcio" in done.stderr


def test_what_is_installed_beside_the_pins_stops_the_build(tmp_path):
    (tmp_path / "constraints.txt").write_text("onnxruntime-gpu==1.0\n")
    done = requirements("--check", folder=tmp_path)
    assert done.returncode != 0
    assert "pytest==" in done.stderr
