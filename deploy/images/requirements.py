"""What an image installs: the requirements of pyproject.toml, for one purpose, each pinned by constraints.txt.

`requirements.py [--extra NAME]... [--cpu]` prints them; `--cpu` takes the CPU build of ONNX Runtime, a tenth in size.
`requirements.py --check [--allow PREFIX]...` fails if what is installed beside this Python is not what is pinned.
"""

import argparse
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

# Beside the dependencies: the project itself, and what a new virtual environment begins with.
_UNPINNED = {"convoy", "pip", "setuptools"}
_GPU, _CPU = "onnxruntime-gpu", "onnxruntime"


def canonical(name: str) -> str:
    """One spelling of a distribution's name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(text: str) -> dict[str, str]:
    """Version by name, from constraints."""
    pairs = (line.split("==", 1) for line in text.splitlines() if "==" in line and not line.startswith("#"))
    return {canonical(name.strip()): version.strip() for name, version in pairs}


def requirements(project: dict[str, Any], pinned: dict[str, str], extras: list[str], *, cpu: bool) -> list[str]:
    """Names with exact versions, as pip reads them.

    Raises:
        SystemExit: one of them is not pinned.
    """
    wanted = list(project["dependencies"])
    for extra in extras:
        wanted += project["optional-dependencies"][extra]
    names = {canonical(re.match(r"[\w.-]+", line).group()) for line in wanted}
    names -= {_CPU}  # of macOS
    if missing := sorted(names - set(pinned)):
        sys.exit(f"constraints.txt does not pin {', '.join(missing)}")
    lines = {name: pinned[name] for name in sorted(names)}
    if cpu:
        lines[_CPU] = lines.pop(_GPU)
    return [f"{name}=={version}" for name, version in lines.items()]


def strays(pinned: dict[str, str], prefixes: tuple[str, ...]) -> list[str]:
    """What is installed here, not pinned to its version, and not of one of the prefixes."""
    # A local version (2.13.0+cpu) is another build of the same release, and satisfies the pin for pip as well.
    found = {canonical(item.name): item.version.partition("+")[0] for item in metadata.distributions()}
    allowed = {**pinned, _CPU: pinned[_GPU]}
    loose = [name for name, version in found.items() if allowed.get(name) != version and name not in _UNPINNED]
    return sorted(f"{name}=={found[name]}" for name in loose if not name.startswith(prefixes))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extra", action="append", default=[])
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--allow", action="append", default=[])
    given = parser.parse_args()
    pinned = pins(Path("constraints.txt").read_text(encoding="utf-8"))
    if given.check:
        if loose := strays(pinned, tuple(given.allow)):
            sys.exit(f"installed, and not what constraints.txt pins: {', '.join(loose)}")
        return
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    sys.stdout.write("\n".join(requirements(project, pinned, given.extra, cpu=given.cpu)) + "\n")


if __name__ == "__main__":
    main()
