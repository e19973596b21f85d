"""Builds the images with buildah, without a registry and without a container runtime, and tries them out.

    python deploy/images/build.py [--base IMAGE@sha256:...]

Without a base one is made by debootstrap: Debian with Python and nothing else. Then `service-cpu` and `training` are
built, digits are trained in the one, and the other serves the model to a client outside. Needs root, buildah and
debootstrap. Prints sizes and times as a table.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "deploy" / "images"
BUILDAH = ("buildah", "--storage-driver", "vfs")
BASE = "localhost/convoy/base"
USER = "10001:10001"
TAG = "dev"


def run(*command: object, quiet: bool = False) -> None:
    """A command that has to succeed; its output goes to ours, unless it is to be quiet."""
    # A list of our own words, and no shell.
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL if quiet else None)  # noqa: S603


def output(*command: object) -> str:
    """What a command prints."""
    words = [str(part) for part in command]
    return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()  # noqa: S603  # as above


def fails(*command: object) -> bool:
    """Whether a command ends with an error."""
    words = [str(part) for part in command]
    return subprocess.run(words, capture_output=True, check=False).returncode != 0  # noqa: S603  # as above


def require(condition: object, otherwise: str) -> None:
    """Ends everything with a sentence if a promise is not kept."""
    if not condition:
        sys.exit(f"images: {otherwise}")


def make_base() -> str:
    """Debian of this machine's release, with Python, as an image."""
    sources = "\n".join(path.read_text() for path in Path("/etc/apt").glob("sources.list*/*.sources"))
    mirror = re.search(r"^URIs:\s*(\S+)", sources, re.MULTILINE)
    release = re.search(r"^VERSION_CODENAME=(\w+)", Path("/etc/os-release").read_text(), re.MULTILINE).group(1)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "root"
        packages = "--include=python3,ca-certificates"
        run("debootstrap", "--variant=minbase", packages, release, tree, *([mirror.group(1)] if mirror else []))
        for cache in ("var/cache/apt/archives", "var/lib/apt/lists"):
            shutil.rmtree(tree / cache)
            (tree / cache / "partial").mkdir(parents=True)
        container = output(*BUILDAH, "from", "scratch")
        run(*BUILDAH, "add", container, tree, "/", quiet=True)
        run(*BUILDAH, "commit", "--rm", container, BASE, quiet=True)
    return BASE


def pip_volumes() -> list[str]:
    """This machine's pip configuration (a mirror, its certificates, local wheels), for the build and not the image."""
    configured = output(sys.executable, "-m", "pip", "config", "list")
    places = {Path("/etc/pip.conf"), Path.home() / ".config" / "pip" / "pip.conf"}
    places |= {Path("/etc/ssl/certs"), Path("/usr/local/share/ca-certificates")}
    places |= {Path(path) for path in re.findall(r"'(/[^\s']+)", configured)}
    # An index in a directory links to files that lie beside it.
    places |= {Path(path).parent for path in re.findall(r"file://(/[^\s']+)", configured)}
    return [f"--volume={path}:{path}:ro" for path in sorted(places) if path.exists()]


def build(name: str, base: str) -> float:
    """Builds one image; returns seconds."""
    began = time.monotonic()
    run(
        *BUILDAH,
        "bud",
        "--isolation=chroot",
        "--pull-never",
        f"--build-arg=BASE={base}",
        *pip_volumes(),
        f"--ignorefile={ROOT / '.dockerignore'}",
        f"--file={IMAGES / f'{name}.Dockerfile'}",
        f"--tag=convoy/{name}:{TAG}",
        ROOT,
    )
    return time.monotonic() - began


@contextmanager
def container(name: str) -> Iterator[str]:
    """A working container of an image."""
    made = output(*BUILDAH, "from", "--pull-never", f"convoy/{name}:{TAG}")
    try:
        yield made
    finally:
        run(*BUILDAH, "rm", made, quiet=True)


def inside(made: str, volumes: Mapping[str, Path], *command: object) -> list[str]:
    """The command that runs a command in a container as the image's user."""
    mounts = [f"--volume={outside}:{path}:rw" for path, outside in volumes.items()]
    return [*BUILDAH, "run", "--isolation=chroot", f"--user={USER}", *mounts, made, "--", *map(str, command)]


def check_training(folder: Path) -> float:
    """Trains digits in the image; the version appears in <folder>/models. Returns seconds."""
    from training.digits import write_digits

    write_digits(folder / "digits")
    volumes = {"/data": folder / "digits", "/runs": folder / "runs", "/models": folder / "models"}
    for path in volumes.values():
        path.mkdir(exist_ok=True)
        os.chown(path, *map(int, USER.split(":")))
    began = time.monotonic()
    with container("training") as made:
        arguments = ("train", "/data", "--config=digits-lenet", "--epochs=5", "--repository=/models", "--runs=/runs")
        run(*inside(made, volumes, "convoy", *arguments))
    return time.monotonic() - began


def check_service(folder: Path) -> float:
    """Serves the trained model from the image, and classifies from outside. Returns seconds from start to answer."""
    sys.path.append(str(ROOT / "tests" / "support"))
    from convoy.v1 import image_classifier_pb2 as pb
    from ports import free_port

    from service.client import Client

    image = next((folder / "digits" / "3").iterdir()).read_bytes()
    port = free_port()
    address = ("--host=127.0.0.1", f"--port={port}", "--http-port=0")
    with container("service-cpu") as made:
        for module in ("torch", "onnx", "pip"):
            require(
                fails(*inside(made, {}, "python3", "-c", f"import {module}")), f"{module} is in the service's image"
            )
        require(fails(*inside(made, {}, "sh", "-c", "command -v cc gcc")), "a compiler is in the service's image")
        began = time.monotonic()
        command = ("convoy", "serve", "--repository=/models", *address)
        server = subprocess.Popen(inside(made, {"/models": folder / "models"}, *command))  # noqa: S603  # as above
        try:
            with Client(f"127.0.0.1:{port}", connect_timeout_s=60) as client:
                reply = client.classify(pb.ClassifyRequest(images=[image], top_k=1))
                seconds = time.monotonic() - began
            require(reply.results[0].classification.classes, "the service did not classify")
            process = service_process(server.pid)
            require(process.uids().real == int(USER.split(":", maxsplit=1)[0]), "the service runs as another user")
            process.send_signal(signal.SIGTERM)
            require(server.wait(60) == 0, "the service did not end well after SIGTERM")
        finally:
            server.kill()
            server.wait()
    return seconds


def service_process(pid: int) -> psutil.Process:
    """The process in the container: the innermost of buildah's children."""
    return next(child for child in reversed(psutil.Process(pid).children(recursive=True)) if not child.children())


def size(name: str) -> str:
    """Size of an image as a whole, its base included."""
    return output(*BUILDAH, "images", "--format", "{{.Size}}", name)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="image with Python, by digest; without, Debian is bootstrapped")
    given = parser.parse_args()
    began = time.monotonic()
    base = given.base or make_base()
    rows = [("base", size(base), time.monotonic() - began)]
    for name in ("service-cpu", "training"):
        seconds = build(name, base)
        rows.append((name, size(f"convoy/{name}:{TAG}"), seconds))
    with tempfile.TemporaryDirectory() as folder:
        trained_s = check_training(Path(folder))
        answered_s = check_service(Path(folder))
    lines = [f"| {name} | {whole} | {seconds:.0f} |" for name, whole, seconds in rows]
    report = [
        "\n| image | size | seconds to build |",
        "|---|---|---|",
        *lines,
        f"\nThe training image trained the digits in {trained_s:.0f} s. The service's image gave its first answer",
        f"{answered_s:.1f} s after its start, as user {USER}, and ended with 0 after SIGTERM.",
    ]
    sys.stdout.write("\n".join(report) + "\n")


if __name__ == "__main__":
    main()
