"""The table from domain errors to gRPC statuses."""

import urllib.parse

import grpc
import pytest

from service import errors
from service.errors import ImageFault
from service.rpc import status

EXPECTED = {
    errors.InvalidRequestError("text"): grpc.StatusCode.INVALID_ARGUMENT,
    errors.InvalidImageError(ImageFault.CORRUPT, "text"): grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFoundError("text"): grpc.StatusCode.NOT_FOUND,
    errors.UnavailableError("text"): grpc.StatusCode.UNAVAILABLE,
    errors.OverloadedError("text", "images", 5): grpc.StatusCode.UNAVAILABLE,
    errors.DrainingError(): grpc.StatusCode.UNAVAILABLE,
    errors.ModelNotReadyError("text"): grpc.StatusCode.UNAVAILABLE,
    errors.ExpiredError("text"): grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.OutOfMemoryError("text"): grpc.StatusCode.UNAVAILABLE,
    errors.DeviceLostError("text"): grpc.StatusCode.UNAVAILABLE,
    errors.EngineError("text"): grpc.StatusCode.INTERNAL,
    ValueError("text"): grpc.StatusCode.INTERNAL,
}


@pytest.mark.parametrize(("error", "code"), EXPECTED.items(), ids=lambda value: getattr(value, "name", repr(value)))
def test_every_error_has_its_status(error, code):
    assert status.code_of(error) is code


@pytest.mark.parametrize("error", EXPECTED, ids=repr)
def test_faults_of_the_server_keep_their_text_to_themselves(error):
    message = status.message_of(error, "the-id")

    if isinstance(error, errors.EngineError | ValueError):
        assert "text" not in message
        assert "the-id" in message
    else:
        assert message == str(error)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (errors.OverloadedError("full", "images", 100), (("grpc-retry-pushback-ms", "100"),)),
        (errors.DrainingError(), (("grpc-retry-pushback-ms", "0"),)),
        (errors.ModelNotReadyError("loading"), ()),
        (errors.ExpiredError("late"), ()),
        (ValueError("x"), ()),
    ],
    ids=repr,
)
def test_only_what_may_be_tried_again_says_when(error, expected):
    assert status.retry_pushback(error) == expected


@pytest.mark.parametrize("letter", ["a", "é", "日", "😀"])
def test_a_long_text_fits_into_the_trailers_in_any_script(letter):
    text = status.shortened(letter * 10_000)

    assert text.startswith(letter)
    assert len(urllib.parse.quote(text)) < 6000  # as gRPC writes it
    assert status.shortened(letter * 100) == letter * 100
