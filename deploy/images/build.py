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
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import closing, contextmanager
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "deploy" / "images"
BUILDAH = ("buildah", "--storage-driver", "vfs")
BASE = "localhost/convoy/base"
USER = "10001:10001"
TAG = "dev"


def run(*command, **options):
    """A command that has to succeed; its output goes to ours."""
    return subprocess.run([str(part) for part in command], check=True, **options)


def output(*command):
    """What a command prints."""
    return run(*command, stdout=subprocess.PIPE, text=True).stdout.strip()


def make_base():
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
        run(*BUILDAH, "add", container, tree, "/", stdout=subprocess.DEVNULL)
        run(*BUILDAH, "commit", "--rm", container, BASE, stdout=subprocess.DEVNULL)
    return BASE


def pip_volumes():
    """This machine's own pip configuration (a mirror, its certificates, local wheels), for the build and not the image."""
    configured = output(sys.executable, "-m", "pip", "config", "list")
    places = {Path("/etc/pip.conf"), Path("/etc/ssl/certs")}
    places |= {Path(path) for path in re.findall(r"(?:file://|')(/[^\s']+)", configured)}
    # Certificates may be links into a directory of their own.
    places.add(Path("/usr/local/share/ca-certificates"))
    return [f"--volume={path}:{path}:ro" for path in sorted(places) if path.exists()]


def build(name, base):
    """Builds one image; returns seconds."""
    began = time.monotonic()
    environment = [f"--env={key}={value}" for key, value in os.environ.items() if key.startswith("PIP_")]
    run(
        *BUILDAH,
        "bud",
        "--isolation=chroot",
        "--pull-never",
        f"--build-arg=BASE={base}",
        *pip_volumes(),
        *environment,
        f"--ignorefile={ROOT / '.dockerignore'}",
        f"--file={IMAGES / f'{name}.Dockerfile'}",
        f"--tag=convoy/{name}:{TAG}",
        ROOT,
    )
    return time.monotonic() - began


@contextmanager
def container(name):
    """A working container of an image."""
    made = output(*BUILDAH, "from", "--pull-never", f"convoy/{name}:{TAG}")
    try:
        yield made
    finally:
        run(*BUILDAH, "rm", made, stdout=subprocess.DEVNULL)


def inside(made, volumes, *command):
    """The command that runs a command in a container as the image's user."""
    mounts = [f"--volume={outside}:{path}:rw" for path, outside in volumes.items()]
    return [*BUILDAH, "run", "--isolation=chroot", f"--user={USER}", *mounts, made, "--", *map(str, command)]


def check_training(folder):
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


def free_port():
    """A port that was free a moment ago."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def check_service(folder):
    """Serves the trained model from the image, and classifies from outside. Returns seconds from start to answer."""
    from convoy.v1 import image_classifier_pb2 as pb

    from service.client import Client

    image = next((folder / "digits" / "3").iterdir()).read_bytes()
    port = free_port()
    address = ("--host=127.0.0.1", f"--port={port}", "--http-port=0")
    with container("service-cpu") as made:
        for module in ("torch", "onnx", "pip"):
            missing = subprocess.run(
                inside(made, {}, "python3", "-c", f"import {module}"), capture_output=True, check=False
            )
            assert missing.returncode, f"{module} is in the image of the service"
        compiler = subprocess.run(inside(made, {}, "sh", "-c", "command -v cc gcc"), capture_output=True, check=False)
        assert compiler.returncode, "a compiler is in the image of the service"
        began = time.monotonic()
        command = ("convoy", "serve", "--repository=/models", *address)
        server = subprocess.Popen(inside(made, {"/models": folder / "models"}, *command))
        try:
            with Client(f"127.0.0.1:{port}", connect_timeout_s=60) as client:
                reply = client.classify(pb.ClassifyRequest(images=[image], top_k=1))
                seconds = time.monotonic() - began
            print("classified as", reply.results[0].classification.classes[0])
            process = service_process(server.pid)
            assert process.uids().real == int(USER.split(":")[0]), "the service runs as another user"
            process.send_signal(signal.SIGTERM)
            assert server.wait(60) == 0, "the service did not end well after SIGTERM"
        finally:
            server.kill()
            server.wait()
    return seconds


def service_process(pid):
    """The process in the container: the innermost of buildah's children."""
    return next(child for child in reversed(psutil.Process(pid).children(recursive=True)) if not child.children())


def size_mb(name):
    """Size of an image as a whole."""
    return output(*BUILDAH, "images", "--format", "{{.Size}}", name)


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="image with Python, by digest; without, Debian is bootstrapped")
    given = parser.parse_args()
    began = time.monotonic()
    base = given.base or make_base()
    rows = [("base", size_mb(base), time.monotonic() - began)]
    for name in ("service-cpu", "training"):
        seconds = build(name, base)
        rows.append((name, size_mb(f"convoy/{name}:{TAG}"), seconds))
    with tempfile.TemporaryDirectory() as folder:
        trained_s = check_training(Path(folder))
        answered_s = check_service(Path(folder))
    print("\n| image | size | seconds to build |\n|---|---|---|")
    for name, size, seconds in rows:
        print(f"| {name} | {size} | {seconds:.0f} |")
    print(f"\ndigits trained in the training image in {trained_s:.0f} s;")
    print(
        f"first answer of the service image {answered_s:.1f} s after its start, as user {USER}; SIGTERM ended it with 0"
    )


if __name__ == "__main__":
    main()
