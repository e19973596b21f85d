"""The first command of the README, from real digits to answers over gRPC."""

import re
import subprocess
import sys

import toys


def test_the_demo_trains_serves_and_classifies(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "service", "demo"],
        cwd=tmp_path,
        env=toys.environment(),
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    (accuracy,) = re.findall(
        r"^accuracy +([\d.]+)% of 179 held-out images through the service", done.stdout, re.MULTILINE
    )
    assert float(accuracy) >= 97
    assert re.search(r"^1  real handwritten digits", done.stdout, re.MULTILINE)
    assert "[bold" not in done.stdout
    assert (tmp_path / ".demo" / "models" / "digits" / "1" / "card.html").is_file()
