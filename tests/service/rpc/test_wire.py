"""How many fields a message has: by the parser's own account, and in time that does not depend on what it says."""

import time

import pytest
from convoy.v1 import image_classifier_pb2 as pb
from hypothesis import given
from hypothesis import strategies as st

from service.errors import InvalidRequestError
from service.rpc import wire

LARGE = 100_000  # fewer bytes are not looked at


def padded(message):
    """The same with an image that makes it large enough to be looked at, and how many fields it has then."""
    return pb.ClassifyRequest(images=[bytes(LARGE)]).SerializeToString() + message.SerializeToString()


@given(
    images=st.lists(st.binary(max_size=300), max_size=20),
    model=st.text(max_size=5),
    top_k=st.integers(0, 2**32 - 1),
    score=st.floats(0, 1, width=32),
    version=st.none() | st.integers(-(2**63), 2**63 - 1),
)
def test_fields_are_counted_as_they_are_written(images, model, top_k, score, version):
    message = pb.ClassifyRequest(images=images, model=model, top_k=top_k, min_score=score, version=version)
    fields = len(images) + bool(model) + bool(top_k) + bool(score) + (version is not None) + 1

    assert wire.has_more_fields_than(padded(message), fields - 1)
    assert not wire.has_more_fields_than(padded(message), fields)


@pytest.mark.parametrize(
    "end", [b"", b"\x1a", b"\x1a\xff\xff\xff\xff\x7f", b"\x80" * 11, b"\x0b", b"\x0c", b"\x0e", b"\x1a\x80"]
)
def test_what_is_damaged_is_left_to_the_parser(end):
    assert not wire.has_more_fields_than(padded(pb.ClassifyRequest()) + end, 10)


@pytest.mark.parametrize("field", [b"\x1a\0", b"\x20\0", b"\x0a\0", b"\x7a\0"])
def test_millions_of_empty_fields_are_refused_without_being_parsed(field):
    parsed = []
    parse = wire.bounded(parsed.append, 300)
    message = field * (16 << 20)
    with pytest.raises(InvalidRequestError, match="more than 300 parts"):
        parse(message)

    assert not parsed


def test_a_group_hides_nothing():
    """A form of old that parsers still skip; what comes behind it are fields like others."""
    group = b"\x7b\x7c"  # field 15: its start, its end
    message = group + b"\x1a\0" * LARGE
    assert len(pb.ClassifyRequest.FromString(message).images) == LARGE

    assert wire.has_more_fields_than(message, 300)
    assert not wire.has_more_fields_than(padded(pb.ClassifyRequest()) + group, 3)


def test_numbers_without_an_end_take_no_time():
    message = b"\x80" * (32 << 20)
    began = time.thread_time()

    assert not wire.has_more_fields_than(message, 300)
    assert time.thread_time() - began < 1.0  # looking at all of it would take several
