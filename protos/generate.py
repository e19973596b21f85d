"""Generates the stubs beside the .proto files, or checks that they are fresh (`--check`)."""

from __future__ import annotations

import argparse
import filecmp
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent
KINDS = ("python", "grpc_python", "mypy", "mypy_grpc")


def generate(target: Path) -> None:
    """Writes the stubs of every .proto below `target`."""
    plugins = [f"--plugin=protoc-gen-{name}={BIN / f'protoc-gen-{name}'}" for name in ("mypy", "mypy_grpc")]
    outputs = [f"--{kind}_out={'quiet:' if 'mypy' in kind else ''}{target}" for kind in KINDS]
    sources = sorted(str(path) for path in ROOT.rglob("*.proto"))
    include = Path(protoc.__file__).parent / "_proto"
    if protoc.main(["protoc", f"-I{ROOT}", f"-I{include}", *plugins, *outputs, *sources]):
        sys.exit("protoc failed")


def stale() -> list[str]:
    """Stubs that differ from what the .proto files give."""
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder)
        generate(fresh)
        made = {path.relative_to(fresh) for path in fresh.rglob("*") if path.is_file()}
        found = {path.relative_to(ROOT) for path in ROOT.rglob("*_pb2*.py*") if path.suffix in {".py", ".pyi"}}
        same = {p for p in made & found if filecmp.cmp(fresh / p, ROOT / p, shallow=False)}
        return sorted(str(path) for path in (made | found) - same)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a stub is stale")
    if not parser.parse_args().check:
        generate(ROOT)
    elif names := stale():
        sys.exit(f"stale stubs: {', '.join(names)}; run `make proto`")


if __name__ == "__main__":
    main()
