import base64
import copy
import dataclasses
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from service import publication
from service.artifact import Canary, FileEntry, Manifest, RejectedVariant, Variant
from service.runners import Outputs
from training import calibrate, report

VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """Checks that elements are balanced, and collects text and attributes."""

    def __init__(self, html):
        super().__init__()
        self.open, self.text, self.links, self.tags = [], [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in {"src", "href", "srcset", "action", "data"}]
        if tag not in VOID and not self.get_starttag_text().endswith("/>"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style" and data.strip():
            self.text.append(" ".join(data.split()))

    def __contains__(self, words):
        return words in " ".join(self.text)


def manifest_of(trained, **changes):
    entry = FileEntry(sha256="ab" * 32, size_bytes=2_500_000)
    classes = len(trained.classes)
    fields = {
        "name": trained.name,
        "version": 3,
        "created": publication.now(),
        "architecture": trained.architecture,
        "classes": trained.classes,
        "input": trained.input,
        "temperature": trained.temperature,
        "files": {"model.onnx": entry, "canary/00.png": entry},
        "variants": (Variant(name="fp32", file="model.onnx", accuracy=0.95, images_per_second=1234.5, note="batch 8"),),
        "rejected_variants": (RejectedVariant(name="int8", reason="loses 6.30 points of accuracy"),),
        "canary": Canary(images=("canary/00.png",), probabilities=((1 / classes,) * classes,)),
        "data": trained.data,
        "recipe": {"epochs": 6, "optimiser": {"name": "adam", "betas": [0.9, 0.999], "clip_norm": None}},
        "metrics": trained.metrics,
        "weights": trained.weights,
    }
    return Manifest(**{**fields, **changes})


def answers(trained, wrong=()):
    """Logits that are right on all held-out images but those in `wrong`."""
    labels, classes = trained.holdout_labels.copy(), len(trained.classes)
    labels[list(wrong)] = (labels[list(wrong)] + 1) % classes
    logits = 4 * np.eye(classes, dtype=np.float32)[labels]
    logits += np.random.default_rng(0).normal(0, 0.3, logits.shape).astype(np.float32)
    return Outputs(logits, calibrate.softmax(logits).astype(np.float32))


def evaluated(trained):
    return copy.deepcopy(trained.model).eval()


@pytest.fixture(scope="module")
def card(digits_trained):
    return report.render_card(
        manifest_of(digits_trained), digits_trained, answers(digits_trained, wrong=(5, 9)), evaluated(digits_trained)
    )


def with_classes(trained, names):
    """The same images spread over other classes."""
    labels = np.arange(len(trained.holdout)) % len(names)
    changed = dataclasses.replace(trained, classes=tuple(names), holdout_labels=labels)
    return dataclasses.replace(changed, data={"per_class": {name: 5 + i for i, name in enumerate(names)}})


def test_everything_is_inside_the_file(card):
    page = Page(card)

    assert page.links
    assert all(link.startswith("data:image/") for link in page.links)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert "@import" not in card
    assert "url(" not in card


def test_the_summary_states_the_accuracy_with_its_interval(card):
    page = Page(card)

    assert "On 200 held-out images it is right 99.00% of the time" in page
    assert "(95% interval 96.43% to 99.73%)" in page
    assert "small-net sorts grayscale images into 10 classes" in page


@pytest.mark.parametrize(
    "words",
    [
        "shorter side to 8 (bilinear, antialiased), centre crop 8x8",
        "CC0-1.0",
        "optimiser.name adam",
        "optimiser.betas 0.9, 0.999",
        "optimiser.clip_norm none",
        "images.train 1597",
        "Loss train loss val loss",
        "Accuracy val accuracy",
        "int8 Not kept: loses 6.30 points of accuracy",
        "model.onnx 2.4 MiB 95.00% 1,234",
        "true \\ predicted",
        "Worst mistakes",
        "Filters of the first convolution",
        "layer 3 , 32 maps of 8 \u00d7 8",
        "0f0f0f0f",
    ],
)
def test_the_card_tells(card, words):
    assert words in Page(card)


def test_many_classes_of_one_size_need_no_chart(digits_trained):
    many = with_classes(digits_trained, [f"class {n}" for n in range(150)])
    even = dataclasses.replace(many, data={"per_class": dict.fromkeys(many.classes, 1234)})
    cards = [
        report.render_card(manifest_of(trained), trained, answers(trained, wrong=()), evaluated(trained))
        for trained in (many, even)
    ]

    assert ["1,234, of each of them" in Page(card) for card in cards] == [False, True]
    assert ["images per class, from" in card for card in cards] == [True, False]


def test_only_the_mistakes_are_shown_as_mistakes(card, digits_trained):
    page = Page(card)
    files = [text for text in page.text if text.endswith(".png")]

    assert len(files) == 2
    for index in (5, 9):
        path = digits_trained.holdout_paths[index]
        assert f"{path.parent.name}/{path.name}" in files


def test_nothing_tells_where_the_images_lay(card, digits_trained):
    assert str(digits_trained.holdout_paths[0].parent.parent) not in card


def test_without_mistakes_the_closest_calls_are_shown(digits_trained):
    page = Page(report.render_card(manifest_of(digits_trained), digits_trained, answers(digits_trained), None))

    assert "No mistakes, but these were the closest" in page
    assert sum(text.endswith(".png") for text in page.text) == 24
    assert "None on these images." in page


@pytest.mark.parametrize("count", [10, 120])
def test_class_and_file_names_cannot_inject_markup(digits_trained, tmp_path, count):
    evil = "<script>alert(1)</script>"
    names = [f'{evil}"{i}' for i in range(count)]
    trained = dataclasses.replace(
        with_classes(digits_trained, names),
        holdout_paths=[tmp_path / f"{evil} & {i}" for i in range(len(digits_trained.holdout))],
        architecture=evil,
    )

    html = report.render_card(manifest_of(trained), trained, answers(trained, wrong=range(30)), evaluated(trained))

    assert evil not in html
    assert "script" not in Page(html).tags
    assert f'{evil}"0' in Page(html)


def test_a_thousand_classes_stay_readable_and_small(digits_trained):
    trained = with_classes(digits_trained, [f"class {i}" for i in range(1000)])

    html = report.render_card(manifest_of(trained), trained, answers(trained, wrong=range(50)), evaluated(trained))

    page = Page(html)
    assert "The 15 weakest classes" in page
    assert "All 1000 classes" in page
    assert "Confusion matrix of 1000 classes" in html
    assert "Each cell stands for 4 neighbouring classes: blue is right or taken for one of the same cell" in page
    assert len(html) < 1_000_000


@pytest.mark.parametrize(("classes", "cells"), [(320, 320), (321, 161), (1000, 250)])
def test_a_page_shows_each_cell_of_the_confusion_matrix(digits_trained, classes, cells):
    """It is drawn up to 640 pixels wide without blending, so of more cells than pixels some would be left out."""
    trained = with_classes(digits_trained, [f"class {i}" for i in range(classes)])
    html = report.render_card(manifest_of(trained), trained, answers(trained), evaluated(trained))
    found = re.search('class="pixels matrix" src="data:image/png;base64,([^"]*)"', html)
    assert Image.open(io.BytesIO(base64.b64decode(found[1]))).size == (cells, cells)
    assert ("neighbouring classes" in html) == (cells < classes)


def test_an_imported_model_gets_a_card_without_judgement(digits_trained):
    manifest = manifest_of(
        digits_trained, data={}, recipe={}, metrics={}, variants=(Variant(name="fp32", file="model.onnx"),)
    )

    page = Page(report.render_card(manifest))

    assert "It was imported; its accuracy was not measured here." in page
    assert "Nothing is known about the data" in page
    assert "not measured" in page
    assert "Worst mistakes" not in page
