"""Log lines for machines and for people."""

import json
import logging

import pytest
import structlog

from service import logs


@pytest.fixture
def written(capsys):
    """Gives what was written to stderr; structlog and logging are put back afterwards."""
    before = logging.root.handlers[:], logging.root.level
    yield lambda: capsys.readouterr().err
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()
    logging.root.handlers[:], logging.root.level = before[0], before[1]


def lines(written):
    return [json.loads(line) for line in written().splitlines()]


def fail(text):
    raise ValueError(text)


def test_a_line_is_one_json_object_with_component_level_and_time(written):
    logs.configure("info", "json")
    logs.get("server").info("ready", port=8500)

    (line,) = lines(written)
    assert (line["event"], line["component"], line["level"], line["port"]) == ("ready", "server", "info", 8500)
    assert line["timestamp"].endswith("Z")


def test_what_is_below_the_level_is_not_written(written):
    logs.configure("warning", "json")
    logs.get("server").info("quiet")
    logs.get("server").warning("loud")

    assert [line["event"] for line in lines(written)] == ["loud"]


def test_the_standard_library_logs_the_same_way(written):
    logs.configure("info", "json")
    logging.getLogger("asyncio").warning("slow %s", "callback")

    (line,) = lines(written)
    assert (line["event"], line["level"]) == ("slow callback", "warning")


def test_an_answer_that_its_client_did_not_wait_for_is_no_line_of_grpc(written):
    """The wording is that of grpcio 1.85, whether or not the method is an argument of it."""
    logs.configure("info", "json")
    grpc_log = logging.getLogger("grpc._cython.cygrpc")
    grpc_log.error("ExecuteBatchError raised in core by servicer method [/a/b]")
    grpc_log.error("ExecuteBatchError raised in core by servicer method [%s]", "/a/b")
    grpc_log.error("Unexpected [ValueError] raised by servicer method [/a/b]")
    logging.getLogger("other").error("ExecuteBatchError raised in core by servicer method [/a/b]")

    assert [line["event"].partition(" ")[0] for line in lines(written)] == ["Unexpected", "ExecuteBatchError"]


def test_a_logger_made_before_the_configuration_follows_it(written):
    early = logs.get("early")
    logs.configure("info", "json")
    early.info("hello")

    assert lines(written)[0]["component"] == "early"


def test_request_fields_are_on_every_line_of_the_request(written):
    logs.configure("info", "json")
    logs.request_context(request_id="abc")
    logs.get("rpc").info("one")
    logging.getLogger("other").warning("two")

    assert [line["request_id"] for line in lines(written)] == ["abc", "abc"]


def test_an_exception_stays_on_one_line(written):
    logs.configure("info", "json")
    try:
        fail("broken\nin two")
    except ValueError:
        logs.get("rpc").exception("failed")
    try:
        fail("of a library")
    except ValueError:
        logging.getLogger("library").exception("failed too")

    first, second = lines(written)
    assert first["exception"][0]["exc_type"] == "ValueError"
    assert "of a library" in json.dumps(second)


def test_an_exception_does_not_spell_out_the_variables_of_its_frames(written):
    """They would put whole images into the log."""
    logs.configure("info", "json")
    image = b"\x89PNG" + b"pixels" * 1000

    def decode(data):
        raise ValueError("broken")

    try:
        decode(image)
    except ValueError:
        logs.get("rpc").exception("failed")

    assert "pixels" not in written()


def test_console_lines_are_for_people(written):
    logs.configure("info", "console")
    logs.get("server").info("ready", port=8500)

    text = written()
    assert "ready" in text
    assert not text.startswith("{")


def test_auto_is_json_where_nobody_watches(written):
    logs.configure("info", "auto")
    logs.get("server").info("ready")

    assert lines(written)[0]["event"] == "ready"
