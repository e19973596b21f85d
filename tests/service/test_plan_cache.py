"""What was measured, on disk."""

import dataclasses
import json
import os
import shutil
import time

import pytest
from variants import machine, version_with

from service import artifact, plan_cache
from service.candidates import Wishes
from service.plan_cache import PlanCache, Row, Table


@pytest.fixture(scope="module")
def version(tmp_path_factory):
    return version_with(tmp_path_factory.mktemp("models"))


def row(outcome="chosen"):
    return Row(
        provider="CPUExecutionProvider", variant="fp32", file="model.onnx", precision="", executors=2, threads=1,
        outcome=outcome, images_per_second=10.0,
    )  # fmt: skip


TABLE = Table(rows=(row(),), largest_batch=8, seconds=0.5)


def test_a_table_is_read_as_it_was_written(tmp_path):
    cache = PlanCache(tmp_path / "plans")
    assert cache.read("a") is None
    assert cache.write("a", TABLE)
    assert cache.read("a") == TABLE
    assert cache.read("b") is None


def test_a_forgotten_table_is_gone(tmp_path):
    cache = PlanCache(tmp_path)
    cache.write("a", TABLE)
    cache.forget("a")
    cache.forget("a")
    assert cache.read("a") is None


def test_nothing_half_written_stays_behind(tmp_path):
    PlanCache(tmp_path).write("a", TABLE)
    (tmp_path / "b.json").mkdir()  # in the way
    assert not PlanCache(tmp_path).write("b", TABLE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]


def test_what_a_killed_server_was_writing_is_removed_a_day_later(tmp_path):
    left = tmp_path / ".b.json.writing-0"
    left.touch()
    os.utime(left, (0, time.time() - 25 * 3600))
    PlanCache(tmp_path).write("a", TABLE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"rows": []}',
        b"\xff\xfe",
        TABLE.model_dump_json().encode()[:-9],
        TABLE.model_dump_json().replace('"largest_batch":8', '"largest_batch":-1').encode(),
    ],
)
def test_a_damaged_table_is_none(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    assert PlanCache(tmp_path).read("a") is None


def test_a_table_without_a_choice_is_none(tmp_path):
    cache = PlanCache(tmp_path)
    cache.write("a", Table(rows=(row("slower"),), largest_batch=8, seconds=0.5))
    assert cache.read("a") is None


def test_a_table_that_a_budget_cut_short_is_none_for_a_larger_one(tmp_path):
    cache = PlanCache(tmp_path)
    cache.write("a", TABLE.model_copy(update={"cut_at_s": 2.0}))
    assert cache.read("a", budget_s=2.0) is not None
    assert cache.read("a", budget_s=2.1) is None


def test_a_cache_that_cannot_be_written_is_no_failure(tmp_path):
    (tmp_path / "file").write_text("in the way")
    cache = PlanCache(tmp_path / "file" / "plans")
    assert not cache.write("a", TABLE)
    assert cache.read("a") is None
    cache.forget("a")


def test_the_key_is_stable(version):
    assert plan_cache.key(version, Wishes(), machine()) == plan_cache.key(version, Wishes(), machine())


@pytest.mark.parametrize(
    ("wishes", "on"),
    [
        (Wishes(providers=("cpu",)), machine()),
        (Wishes(options={"cpu": {"a": "b"}}), machine()),
        (Wishes(variant="fp32"), machine()),
        (Wishes(executors=1), machine()),
        (Wishes(intra_op_threads=2), machine()),
        (Wishes(max_batch_size=64), machine()),
        (Wishes(batch_limit_s=0.5), machine()),
        (Wishes(), machine(cpus=4)),
        (Wishes(), machine(flags=("avx2",))),
        (Wishes(), machine(gpus=("NVIDIA L4",))),
        (Wishes(), machine(onnxruntime="1.32.0")),
        (Wishes(), machine(openvino="1.8.1")),
        (Wishes(), dataclasses.replace(machine(), cpu_name="Another CPU")),
    ],
)
def test_whatever_changes_the_outcome_changes_the_key(version, wishes, on):
    assert plan_cache.key(version, wishes, on) != plan_cache.key(version, Wishes(), machine())


def test_another_model_has_another_key(tmp_path, version):
    other = version_with(tmp_path, int8=lambda model: model)
    assert plan_cache.key(other, Wishes(), machine()) != plan_cache.key(version, Wishes(), machine())


def test_another_canary_of_the_same_model_has_another_key(tmp_path, version):
    """What it refuses may be what the other one lets run."""
    on, wishes = machine(), Wishes()
    path = tmp_path / "1"
    shutil.copytree(version.path, path)
    first = plan_cache.key(artifact.load(path), wishes, on)
    assert first == plan_cache.key(version, wishes, on)
    facts = json.loads((path / artifact.MANIFEST).read_text())
    facts["canary"]["probabilities"][0][0] += 1e-3
    (path / artifact.MANIFEST).write_text(json.dumps(facts))
    second = plan_cache.key(artifact.load(path), wishes, on)
    image = facts["canary"]["images"][0]
    (path / image).write_bytes((path / facts["canary"]["images"][1]).read_bytes())
    facts["files"][image] = artifact.file_entry(path / image).model_dump()
    (path / artifact.MANIFEST).write_text(json.dumps(facts))
    assert len({first, second, plan_cache.key(artifact.load(path), wishes, on)}) == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda facts: facts["canary"].update(tolerance=0.25),
        lambda facts: facts["input"]["resize"].update(interpolation="bicubic"),
    ],
    ids=["tolerance", "input"],
)
def test_another_manifest_of_the_same_files_has_another_key(tmp_path, version, change):
    """With another tolerance another variant passes; through another resize the canary's images are other ones."""
    path = tmp_path / "1"
    shutil.copytree(version.path, path)
    facts = json.loads((path / artifact.MANIFEST).read_text())
    change(facts)
    (path / artifact.MANIFEST).write_text(json.dumps(facts))
    changed = artifact.load(path)
    assert plan_cache.key(changed, Wishes(), machine()) != plan_cache.key(version, Wishes(), machine())


def test_the_budget_does_not_change_the_key(version):
    assert plan_cache.key(version, Wishes(budget_s=1), machine()) == plan_cache.key(version, Wishes(), machine())
