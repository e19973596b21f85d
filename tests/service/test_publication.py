"""Versions on their way into a repository: invisible until whole, never over another."""

import os
import time

import pytest
import toys

from service import artifact, publication
from service.errors import ArtifactError


def test_a_version_is_never_overwritten(tmp_path):
    version = toys.write_version(tmp_path)
    before = (version / artifact.MANIFEST).read_bytes()

    with pytest.raises(ArtifactError, match="cannot be published"):
        toys.write_version(tmp_path, classes=4)

    assert (version / artifact.MANIFEST).read_bytes() == before


def test_staging_is_invisible_and_unique(tmp_path):
    first, second = (publication.staging_dir(tmp_path, "grey", 1) for _ in range(2))

    assert first != second
    assert artifact.versions(tmp_path / "grey") == []


def test_staging_left_by_a_crash_is_removed_after_a_day_and_not_before(tmp_path):
    old, young = (publication.staging_dir(tmp_path, "grey", 1) for _ in range(2))
    (old / "half").write_text("x")
    two_days_ago = time.time() - 2 * 24 * 3600
    for path in (old / "half", old):
        os.utime(path, (two_days_ago, two_days_ago))
    publication.staging_dir(tmp_path, "grey", 2)

    assert (old.exists(), young.exists()) == (False, True)
