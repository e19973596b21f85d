import ast
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import service
from service.artifact import InputSpec, Resize
from service.errors import DataError
from training import cache
from training.cache import choose, read_mapped
from training.data import list_images
from training.read import DECODERS, decoder_version, read_images

SPEC = InputSpec(height=16, width=16, channels=1)


def mapped(folder, parent, spec=SPEC):
    done = []
    dataset, faults = read_mapped(list_images(folder), spec, parent, min_side_pixels=4, workers=2, advance=done.append)
    return dataset, faults, sum(done)


def test_a_mapped_file_holds_what_memory_would(digit_folder, tmp_path):
    dataset, _, _ = mapped(digit_folder, tmp_path)
    expected, _ = read_images(list_images(digit_folder), SPEC, min_side_pixels=4)
    assert isinstance(dataset.images, np.memmap)
    np.testing.assert_array_equal(dataset.images, expected.images)
    assert dataset.digest() == expected.digest()


def test_the_next_run_opens_what_is_there(digit_folder, tmp_path):
    first, _, _ = mapped(digit_folder, tmp_path)
    file = next(tmp_path.glob("*/pixels.npy"))
    written = file.stat().st_mtime_ns
    second, _, done = mapped(digit_folder, tmp_path)
    assert file.stat().st_mtime_ns == written
    assert done == 300
    np.testing.assert_array_equal(first.images, second.images)
    assert len(list(tmp_path.glob("[!.]*"))) == 1


def test_another_size_is_another_cache(digit_folder, tmp_path):
    mapped(digit_folder, tmp_path)
    dataset, _, _ = mapped(digit_folder, tmp_path, InputSpec(height=8, width=8, channels=1))
    assert dataset.images.shape == (300, 8, 8, 1)


def test_what_another_decoder_made_is_another_cache(digit_folder, tmp_path, monkeypatch):
    mapped(digit_folder, tmp_path)
    monkeypatch.setattr("training.cache.decoder_version", lambda: "another")
    mapped(digit_folder, tmp_path)
    assert len(list(tmp_path.glob("[!.]*"))) == 2


def imported_by(module, but):
    """Modules of the service that one of them needs, itself among them, `but` for some and what they need."""
    found, new = set(), {module}
    while new:
        found |= new
        trees = [ast.parse((Path(service.__file__).parent / f"{name}.py").read_text()) for name in new]
        imports = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        direct = {alias.name for node in imports if node.module == "service" for alias in node.names}
        new = direct | {node.module.partition(".")[2] for node in imports if node.module.startswith("service.")}
        new -= found | but
    return found


def test_the_version_of_the_decoder_names_what_makes_pixels():
    code, *libraries = decoder_version().split()
    assert len(code) == 64
    assert set(DECODERS) == imported_by("preprocess", but={"artifact", "errors", "threads"})
    assert [each.partition("=")[0] for each in libraries] == ["simplejpeg", "pillow", "cykooz-resizer"]
    assert all(each.partition("=")[2] for each in libraries)


def test_of_processes_that_begin_together_one_reads(digit_folder, tmp_path):
    """As the workers of a study do; each would read all images, and all but the first fail at the end."""
    script = (
        "import sys; from pathlib import Path; from training.cache import read_mapped; "
        "from training.data import list_images; from service.artifact import InputSpec; told = []; "
        "read = read_mapped(list_images(Path(sys.argv[1])), InputSpec(height=28, width=28, channels=1), "
        "Path(sys.argv[2]), min_side_pixels=1, workers=1, advance=told.append); print(len(read[0]), len(told))"
    )
    command = [sys.executable, "-c", script, str(digit_folder), str(tmp_path / "cache")]
    environment = {**os.environ, "PYTHONPATH": "."}
    pair = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    told = sorted(tuple(map(int, process.communicate()[0].split())) for process in pair)
    assert [process.returncode for process in pair] == [0, 0]
    assert [images for images, _ in told] == [300, 300]
    assert told[0][1] == 1 < told[1][1]


def test_faults_are_kept_with_the_pixels(tmp_path, digit_folder):
    images = tmp_path / "images"
    for label in "01":
        (images / label).mkdir(parents=True)
        for file in sorted((digit_folder / label).iterdir())[:3]:
            (images / label / file.name).write_bytes(file.read_bytes())
    (images / "0" / "bad.png").write_text("no image")
    _, first, _ = mapped(images, tmp_path / "cache")
    dataset, again, _ = mapped(images, tmp_path / "cache")
    assert [fault.path for fault in first] == ["0/bad.png"]
    assert again == first
    assert len(dataset) == 6


def test_a_disk_that_cannot_be_written_is_said_so(digit_folder, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot be written"):
        mapped(digit_folder, tmp_path / "file")


def test_maps_on_demand_for_several_processes_and_for_what_is_too_large(digit_folder):
    listing = list_images(digit_folder)
    huge = InputSpec(height=8192, width=8192, channels=3)
    assert choose("disk", listing, SPEC, shared=False)
    assert choose("memory", listing, SPEC, shared=True)
    assert choose("auto", listing, huge, shared=False)
    assert not choose("auto", listing, SPEC, shared=False)
    assert not choose("memory", listing, huge, shared=False)


def test_memory_is_that_of_the_container(digit_folder, monkeypatch):
    listing = list_images(digit_folder)
    monkeypatch.setattr(cache, "cgroup_memory_left", lambda: 3 * len(listing) * SPEC.nbytes)

    assert choose("auto", listing, SPEC, shared=False)


def test_what_killed_runs_left_is_removed_after_a_day(digit_folder, tmp_path):
    for name, age_s in ((".old.writing-1", 90_000), (".young.writing-2", 60)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pixels.npy").write_bytes(b"")
        for path in (tmp_path / name / "pixels.npy", tmp_path / name):
            os.utime(path, times=(time.time() - age_s,) * 2)
    mapped(digit_folder, tmp_path)
    assert sorted(folder.name for folder in tmp_path.glob(".*.writing-*")) == [".young.writing-2"]


def test_a_full_disk_is_an_error_and_not_a_killed_process(digit_folder, tmp_path):
    code = (
        "import resource, sys; from pathlib import Path; "
        "from training.cache import read_mapped; from training.data import list_images; "
        "from service.artifact import InputSpec; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)); "
        "read_mapped(list_images(Path(sys.argv[1])), InputSpec(height=16, width=16, channels=1), Path(sys.argv[2]), "
        "min_side_pixels=1, workers=1, advance=print)"
    )
    command = [sys.executable, "-c", code, str(digit_folder), str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": "."})
    assert done.returncode == 1
    assert "DataError: the image cache" in done.stderr
    assert "File too large" in done.stderr
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]


def test_two_folders_with_files_of_the_same_names_sizes_and_times_have_two_caches(tmp_path):
    bmp_folder(tmp_path / "one", 10)
    bmp_folder(tmp_path / "two", 200)
    assert cached(tmp_path / "one", tmp_path / "cache")[0].images[0].max() == 10
    assert cached(tmp_path / "two", tmp_path / "cache")[0].images[0].min() == 200


def bmp_folder(folder, value):
    for label in "ab":
        (folder / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((20, 24), value, np.uint8)).save(folder / label / "0.bmp")
        os.utime(folder / label / "0.bmp", (1, 1))


def cached(folder, cache, spec=SPEC, **options):
    return read_mapped(
        list_images(folder), spec, cache, workers=1, advance=lambda _: None, **{"min_side_pixels": 1, **options}
    )


def test_a_file_that_was_changed_is_read_anew(tmp_path):
    images, cache = tmp_path / "images", tmp_path / "cache"
    bmp_folder(images, 10)
    assert cached(images, cache)[0].images[0].max() == 10
    bmp_folder(images, 200)
    os.utime(images / "a" / "0.bmp", (2, 2))  # as large as before, but newer
    assert cached(images, cache)[0].images[0].min() == 200
    file = images / "a" / "0.bmp"
    Image.fromarray(np.full((21, 24), 77, np.uint8)).save(file)
    os.utime(file, (2, 2))  # as old as before, but larger
    assert cached(images, cache)[0].images[0].min() == 77


def test_another_resize_rule_or_least_side_is_another_cache(tmp_path):
    images, cache = tmp_path / "images", tmp_path / "cache"
    bmp_folder(images, 10)
    cached(images, cache)
    cached(images, cache, SPEC.model_copy(update={"resize": Resize(mode="crop", shorter_side=16)}))
    faults = cached(images, cache, min_side_pixels=22)[1]
    assert [fault.reason for fault in faults] == ["tiny", "tiny"]
    assert len(list(cache.glob("*/pixels.npy"))) == 3
