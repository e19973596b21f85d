"""Renders the manifests and runs what they describe, on this machine and on 127.0.0.1 alone."""

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
COMPONENTS = tuple(sorted(path.name for path in (DEPLOY / "components").iterdir()))
OVERLAYS = tuple(sorted(path.name for path in (DEPLOY / "overlays").iterdir()))
TRAINING = tuple(sorted(path.parent.name for path in (DEPLOY / "training").glob("*/kustomization.yaml")))


def find_tool(name):
    """Path of a program; without it the test is skipped, or fails where CI has promised that everything is there."""
    path = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}:/usr/sbin")
    if path is None:
        reason = f"{name} is not installed; see docs/deploy.md, 'Checking without a cluster'"
        if os.environ.get("CONVOY_REQUIRE_TOOLS") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return path


@pytest.fixture(scope="session")
def tool():
    return find_tool


class Rendered:
    """What `kubectl kustomize` makes of a folder."""

    def __init__(self, text):
        self.text = text
        self.documents = [document for document in yaml.safe_load_all(text) if document]

    def one(self, kind, name="convoy"):
        """The only object of a kind whose name is `name`, or begins with it and a dash."""
        found = [
            document
            for document in self.documents
            if document["kind"] == kind
            and (document["metadata"]["name"] == name or document["metadata"]["name"].startswith(f"{name}-"))
        ]
        exact = [document for document in found if document["metadata"]["name"] == name]
        (only,) = exact or found
        return only

    def pod(self):
        """The pod specification of the Deployment."""
        return self.one("Deployment")["spec"]["template"]["spec"]

    def container(self):
        """The container of the service."""
        return next(container for container in self.pod()["containers"] if container["name"] == "convoy")

    def settings(self):
        """The settings as the service would read them: the file, then the container's environment over it."""
        settings = yaml.safe_load(self.one("ConfigMap", "convoy-settings")["data"]["convoy.yaml"])
        for variable in self.container()["env"]:
            name = variable["name"].removeprefix("CONVOY_").lower()
            if variable["name"].startswith("CONVOY_") and name != "config":
                settings[name] = yaml.safe_load(variable["value"])
        return settings


@cache
def kustomized(folder):
    done = subprocess.run(
        [find_tool("kubectl"), "kustomize", str(folder)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, f"kustomize warns: {done.stderr}"
    return Rendered(done.stdout)


@pytest.fixture(scope="session")
def render():
    """Renders a folder."""
    return kustomized


@pytest.fixture(scope="session")
def rendered(tmp_path_factory):
    """Renders `base`, an overlay, `training/<name>`, or `components/<name>` (on the base, and nothing else)."""

    def of(name):
        if not name.startswith("components/"):
            return kustomized(DEPLOY / name)
        alone = tmp_path_factory.getbasetemp() / name
        if not alone.is_dir():
            alone.mkdir(parents=True)
            content = {
                "resources": [os.path.relpath(DEPLOY / "base", alone)],
                "components": [os.path.relpath(DEPLOY / name, alone)],
            }
            (alone / "kustomization.yaml").write_text(yaml.safe_dump(content))
        return kustomized(alone)

    return of


def every_target():
    """All that can be rendered."""
    return (
        "base",
        *(f"overlays/{name}" for name in OVERLAYS),
        *(f"components/{name}" for name in COMPONENTS),
        *(f"training/{name}" for name in TRAINING),
    )


def pytest_generate_tests(metafunc):
    if "target" in metafunc.fixturenames:
        metafunc.parametrize("target", every_target())
    if "serving" in metafunc.fixturenames:
        metafunc.parametrize("serving", [name for name in every_target() if not name.startswith("training/")])
    if "overlay" in metafunc.fixturenames:
        metafunc.parametrize("overlay", [f"overlays/{name}" for name in OVERLAYS])
