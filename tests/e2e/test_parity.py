"""Training and service agree: on the pixels of every kind of file, and on the answer to every held-out image."""

import json
import time

import numpy as np
import pytest
import toys
from convoy.v1 import image_classifier_pb2 as pb
from PIL import Image
from rich.console import Console

from service.artifact import InputSpec, Resize
from service.batcher import Silent
from service.client import Client
from service.decode import Encoded, decode_pool
from service.preprocess import Limits
from training.config import load_experiment
from training.data import list_images
from training.digits import write_digits
from training.display import Display
from training.read import read_images
from training.run import run

SOFTMAX_TOLERANCE = 1e-4


# --- the same pixels


def a_photo(mode="RGB", size=(120, 90)):
    photo = Image.effect_mandelbrot(size, (-2, -1.2, 1, 1.2), 60).convert("L")
    if mode == "L":
        return photo
    colours = (photo, photo.rotate(180), photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    if mode == "RGB":
        return Image.merge("RGB", colours)
    if mode == "RGBA":
        return Image.merge("RGBA", (*colours, photo.point(lambda v: 255 - v)))
    if mode == "I;16":
        return Image.fromarray(np.asarray(photo).astype(np.uint16) * 257)
    return Image.merge("RGB", colours).convert(mode)


def rotated(orientation):
    block = Image.Exif()
    block[0x0112] = orientation
    return block


FILES = {
    "rgb.jpg": toys.encoded(a_photo(), "JPEG", quality=85),
    "gray.jpg": toys.encoded(a_photo("L"), "JPEG"),
    "cmyk.jpg": toys.encoded(a_photo("CMYK"), "JPEG"),
    "progressive.jpg": toys.encoded(a_photo(), "JPEG", progressive=True),
    "large.jpg": toys.photo_jpeg(900, 700),
    "thin.jpg": toys.encoded(a_photo(size=(600, 3)), "JPEG"),
    **{f"rotated{n}.jpg": toys.encoded(a_photo(), "JPEG", exif=rotated(n)) for n in (3, 6, 8)},
    "rgb.png": toys.encoded(a_photo(), "PNG"),
    "gray.png": toys.encoded(a_photo("L"), "PNG"),
    "alpha.png": toys.encoded(a_photo("RGBA"), "PNG"),
    "palette.png": toys.encoded(a_photo("P"), "PNG"),
    "bilevel.png": toys.encoded(a_photo("1"), "PNG"),
    "deep.png": toys.encoded(a_photo("I;16"), "PNG"),
    "one.png": toys.grey_png(200, (1, 1)),
    "rgb.webp": toys.encoded(a_photo(), "WEBP", quality=80),
    "lossless.webp": toys.encoded(a_photo("RGBA"), "WEBP", lossless=True),
    "rgb.bmp": toys.encoded(a_photo(), "BMP"),
    "palette.gif": toys.encoded(a_photo("P"), "GIF"),
    "animated.gif": toys.encoded(
        a_photo("P"), "GIF", save_all=True, append_images=[a_photo("P").rotate(90)], duration=50
    ),
}

SPECS = {
    "rgb crop": InputSpec(height=64, width=64, resize=Resize(shorter_side=72)),
    "gray stretch": InputSpec(height=28, width=40, channels=1, resize=Resize(mode="stretch")),
    "bicubic": InputSpec(height=48, width=64, resize=Resize(interpolation="bicubic")),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
async def test_every_kind_of_file_gives_training_and_service_the_same_pixels(tmp_path, spec):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for number, (name, data) in enumerate(FILES.items()):
        (tmp_path / "ab"[number % 2] / name).write_bytes(data)
    listing = list_images(tmp_path)
    dataset, faults = read_images(listing, spec)
    assert faults == []

    files = [listing.file(n) for n in range(len(listing))]
    work = Encoded([file.read_bytes() for file in files], spec, Limits(), np.zeros((len(files), *spec.shape), np.uint8))
    decoder = decode_pool(2, Silent())
    decoder.start()
    job = await decoder.submit(work, len(files), time.monotonic() + toys.TIMEOUT_S)
    await decoder.close()

    assert len(files) == len(FILES)
    assert [part for _, part in job.results if part] == []
    differing = [file.name for n, file in enumerate(files) if not np.array_equal(dataset.images[n], work.pixels[n])]
    assert differing == []
    assert all(image.std() > 0 for image, file in zip(work.pixels, files, strict=True) if file.name != "one.png")


# --- the same answers


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """LeNet-5 after a few epochs on real digits, as `convoy train` leaves it."""
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder / "images")
    overrides = {"name": "digits", "model.name": "lenet5", "loop.epochs": 3, "data.test": 0.2}
    with (folder / "log").open("w") as log:
        display = Display(Console(file=log))
        result = run(load_experiment(None, overrides), folder / "images", folder / "models", folder / "runs", display)
    return result, folder / "models"


@pytest.fixture(scope="module")
def answers(trained):
    """The service's reply to each held-out file, one request each, over gRPC."""
    result, repository = trained
    requests = [
        pb.ClassifyRequest(model="digits", images=[file.read_bytes()], top_k=10, return_logits=True)
        for file in result.holdout
    ]
    server = toys.serve_process(repository, "--variant", "fp32")
    with server as (_, report), Client(report["grpc"]) as client:
        outcomes = [outcome for outcome, _ in client.classify_all(requests, in_flight=16)]
    assert [outcome for outcome in outcomes if isinstance(outcome, Exception)] == []
    return [outcome.results[0].classification for outcome in outcomes]


def test_the_run_learned_something_to_compare(trained):
    result, _ = trained

    assert result.evaluation.accuracy > 0.7
    assert len(result.holdout) == len(result.evaluation.labels) > 300


def test_the_service_answers_every_held_out_image_as_the_evaluator_did(trained, answers):
    result, _ = trained
    labels = [answer.classes[0].label for answer in answers]

    assert labels == [result.classes[k] for k in result.evaluation.predicted]


def test_the_accuracy_over_grpc_is_the_evaluators_and_the_manifests(trained, answers):
    result, _ = trained
    right = [answer.classes[0].label == file.parent.name for answer, file in zip(answers, result.holdout, strict=True)]
    manifest = json.loads((result.version / "manifest.json").read_text())

    assert np.mean(right) == pytest.approx(result.evaluation.accuracy, abs=1e-12)
    assert manifest["metrics"]["accuracy"] == pytest.approx(result.evaluation.accuracy, abs=1e-6)


def test_the_probabilities_are_the_evaluators_after_calibration(trained, answers):
    result, _ = trained
    temperature = json.loads((result.version / "manifest.json").read_text())["temperature"]
    logits = result.evaluation.logits.astype(np.float64) / temperature
    expected = np.exp(logits - logits.max(axis=1, keepdims=True))
    expected /= expected.sum(axis=1, keepdims=True)
    found = np.zeros_like(expected)
    for row, answer in enumerate(answers):
        for entry in answer.classes:
            found[row, entry.index] = entry.score

    assert np.abs(found - expected).max() < SOFTMAX_TOLERANCE
    assert np.abs(np.asarray([answer.logits for answer in answers]) - logits).max() < 1e-3
