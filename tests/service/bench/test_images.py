"""What is sent: images from disk, made-up ones, and the requests that hold them."""

import io

import pytest
from convoy.v1 import image_classifier_pb2 as pb
from PIL import Image

from service.bench import images
from service.errors import DataError


def folder(tmp_path, *names):
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return tmp_path


def test_folders_are_searched_and_files_taken_as_they_are(tmp_path):
    root = folder(tmp_path, "a/1.jpg", "a/b/2.PNG", "a/notes.txt", "c.bin")

    assert images.from_disk([root / "a", root / "c.bin"]) == [b"a/1.jpg", b"a/b/2.PNG", b"c.bin"]


def test_no_more_is_read_than_memory_is_meant_for(tmp_path):
    root = folder(tmp_path, "1.jpg", "2.jpg", "3.jpg")

    assert images.from_disk([root], max_bytes=10) == [b"1.jpg", b"2.jpg"]
    assert images.from_disk([root], max_bytes=1) == [b"1.jpg"]


def test_missing_paths_and_empty_folders_are_told(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        images.from_disk([tmp_path / "nowhere"])
    with pytest.raises(DataError, match="holds no image"):
        images.from_disk([tmp_path])


def test_made_up_images_are_jpegs_of_that_size_and_as_heavy_as_photos():
    made = images.synthetic(500, 375, seed=1)

    assert made == images.synthetic(500, 375, seed=1)
    assert made != images.synthetic(500, 375, seed=2)
    assert len(set(made)) == 16
    for data in made:
        assert Image.open(io.BytesIO(data)).size == (500, 375)
        assert 40_000 < len(data) < 150_000


def test_tiny_images_can_be_made_up():
    assert Image.open(io.BytesIO(images.synthetic(1, 1)[0])).size == (1, 1)


def test_requests_hold_every_image():
    packed = images.requests([b"1", b"2", b"3"], 2, "m", None, 5)

    requests = [pb.ClassifyRequest.FromString(data) for data in packed]
    assert [list(request.images) for request in requests] == [[b"1", b"2"], [b"3", b"1"]]
    assert not requests[0].HasField("version")


def test_more_images_for_each_request_than_there_are_repeat():
    (packed,) = images.requests([b"1"], 3, "m", 4, 5)

    request = pb.ClassifyRequest.FromString(packed)
    assert list(request.images) == [b"1"] * 3
    assert request.version == 4
