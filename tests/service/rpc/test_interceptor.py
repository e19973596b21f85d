"""What happens around every call: ids, counts, logs, and no secrets in answers."""

import asyncio

import grpc
import pytest
import structlog
import toys
from convoy.v1 import image_classifier_pb2 as pb
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.errors import OutOfMemoryError
from service.rpc import failures

SERVICE = "convoy.v1.ImageClassifier"


@pytest.fixture
async def stand(tmp_path):
    async with toys.toy_stand(tmp_path, {"grey": toys.ToyEngine(classes=256)}) as made:
        yield made


def request(*levels):
    return pb.ClassifyRequest(images=[toys.grey_png(level) for level in levels or (0,)])


async def trailers_of(call):
    return dict(await call.trailing_metadata())


async def settle(stand):
    """A call is logged and counted after its answer is sent: one more round trip, and that has happened."""
    await stand.stub.ListModels(pb.ListModelsRequest())


async def eventually(check, timeout_s=10.0):
    """The server learns of a cancellation when it gets to it, and of an answer's end after the client has it."""
    async with asyncio.timeout(timeout_s):
        while True:
            try:
                return check()
            except AssertionError:
                await asyncio.sleep(0.01)


def handled(stand, method="Classify", service=SERVICE, **codes):
    """Asserts how many calls ended with which code, and no others."""
    samples = [
        (sample.labels["grpc_code"], sample.value)
        for metric in stand.metrics.registry.collect()
        for sample in metric.samples
        if sample.name == "grpc_server_handled_total"
        and (sample.labels["grpc_method"], sample.labels["grpc_service"]) == (method, service)
    ]
    assert dict(samples) == codes


async def test_the_request_id_of_the_client_comes_back(stand):
    call = stand.stub.Classify(request(), metadata=(("x-request-id", "order 66/b"),))
    await call

    assert (await trailers_of(call))["x-request-id"] == "order 66/b"


@pytest.mark.parametrize("sent", [(), (("x-request-id", ""),), (("x-request-id", "x" * 129),)])
async def test_a_missing_or_useless_id_is_replaced(stand, sent):
    ids = []
    for _ in range(2):
        call = stand.stub.Classify(request(), metadata=sent)
        await call
        ids.append((await trailers_of(call))["x-request-id"])

    assert all(len(found) == 32 for found in ids)
    assert ids[0] != ids[1]


async def test_a_failed_call_carries_its_id_too(stand):
    with pytest.raises(aio.AioRpcError) as caught:
        await stand.stub.Classify(pb.ClassifyRequest(), metadata=(("x-request-id", "mine"),))

    assert dict(caught.value.trailing_metadata())["x-request-id"] == "mine"


async def test_an_internal_error_hides_its_text_and_logs_it_under_the_id(stand):
    stand.engines["grey"].fail_next(RuntimeError("/srv/secret/model.onnx exploded"))
    with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:
        with pytest.raises(aio.AioRpcError) as caught:
            await stand.stub.Classify(request(), metadata=(("x-request-id", "look-me-up"),))
        await settle(stand)

    error = caught.value
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "look-me-up" in error.details()
    assert "secret" not in error.details()
    (line,) = [line for line in lines if line["log_level"] == "error"]
    assert "/srv/secret/model.onnx exploded" in line["error"]
    assert line["request_id"] == "look-me-up"


async def test_what_the_runtime_says_of_a_shortage_is_logged_and_not_told(stand):
    """It may pass, so it is no internal error; but its cause stands nowhere else."""
    stand.engines["grey"].fail_next(OutOfMemoryError("cannot allocate 3 GiB at 0x7f00"))
    with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:
        with pytest.raises(aio.AioRpcError) as caught:
            await stand.stub.Classify(request())
        await settle(stand)

    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "0x7f00" not in caught.value.details()
    assert [line["error"] for line in lines if "cannot allocate" in line.get("error", "")] != []


async def test_a_failure_is_logged_with_its_code_and_duration_and_a_success_is_not(stand):
    with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:
        await stand.stub.Classify(request())
        assert lines == []
        with pytest.raises(aio.AioRpcError):
            await stand.stub.Classify(pb.ClassifyRequest(model="nope"))
        await settle(stand)

    (line,) = lines
    assert (line["code"], line["method"]) == ("NOT_FOUND", "Classify")
    assert line["duration_ms"] >= 0


async def test_ids_do_not_leak_from_one_call_into_another(stand):
    with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:
        calls = [
            stand.stub.Classify(pb.ClassifyRequest(model=f"no-{n}"), metadata=(("x-request-id", f"id-{n}"),))
            for n in range(failures.LINES_PER_SECOND)
        ]
        results = await asyncio.gather(*calls, return_exceptions=True)
        await settle(stand)

    assert all(f"no-{n}" in error.details() for n, error in enumerate(results))
    assert sorted(line["request_id"] for line in lines) == sorted(f"id-{n}" for n in range(failures.LINES_PER_SECOND))


async def test_calls_are_counted_by_code(stand):
    for message in (request(), request(1), pb.ClassifyRequest(), pb.ClassifyRequest(model="nope")):
        await asyncio.gather(stand.stub.Classify(message), return_exceptions=True)
    await settle(stand)

    await eventually(lambda: handled(stand, OK=2, InvalidArgument=1, NotFound=1))
    labels = {"grpc_type": "unary", "grpc_service": SERVICE, "grpc_method": "Classify"}
    assert stand.value("grpc_server_started_total", **labels) == 4
    assert stand.value("grpc_server_handling_seconds_count", **labels) == 4


async def test_methods_that_do_not_exist_make_no_metrics(stand):
    for n in range(3):
        call = stand.channel.unary_unary(f"/{SERVICE}/Nope{n}")
        with pytest.raises(aio.AioRpcError) as caught:
            await call(b"")
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED

    assert "Nope" not in str(list(stand.metrics.registry.collect()))


async def test_a_probe_for_an_unknown_service_is_not_found_and_no_internal_error(stand):
    health = health_pb2_grpc.HealthStub(stand.channel)
    with structlog.testing.capture_logs() as lines, pytest.raises(aio.AioRpcError) as caught:
        await health.Check(health_pb2.HealthCheckRequest(service="nope"))
    await settle(stand)

    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    await eventually(lambda: handled(stand, "Check", "grpc.health.v1.Health", NotFound=1))
    assert [line for line in lines if line["log_level"] == "error"] == []


async def test_a_client_that_hangs_up_is_counted_as_cancelled(stand):
    engine = stand.engines["grey"]
    engine.pause()
    call = stand.stub.Classify(request(7))
    await engine.began()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    # Only when the server has heard of it may the batch end: otherwise the answer can overtake the cancellation.
    await eventually(lambda: handled(stand, Cancelled=1))
    engine.resume()
    await stand.stub.Classify(request(8))

    await eventually(lambda: handled(stand, OK=1, Cancelled=1))


async def test_a_deadline_that_passes_in_the_batch_is_counted_as_such(stand):
    engine = stand.engines["grey"]
    engine.pause()
    with pytest.raises(aio.AioRpcError) as caught:
        await stand.stub.Classify(request(7), timeout=0.2)
    engine.resume()
    await stand.stub.Classify(request(8))

    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await eventually(lambda: handled(stand, OK=1, DeadlineExceeded=1))


async def test_of_many_failures_only_some_have_a_line_each_and_the_rest_a_number(monkeypatch):
    monkeypatch.setattr(failures, "_SECOND", 0.2)
    log = failures.FailureLog()
    with structlog.testing.capture_logs() as lines:
        for _ in range(failures.LINES_PER_SECOND + 5):
            log.failed("UNAVAILABLE", 1.0)
        log.failed("INTERNAL", 1.0)
        await eventually(lambda: summed_up(lines, 5))
        log.failed("UNAVAILABLE", 1.0)  # another second, another bound

    assert [line["code"] for line in lines if line["event"] == "rpc failed"] == [
        *["UNAVAILABLE"] * failures.LINES_PER_SECOND,
        "INTERNAL",
        "UNAVAILABLE",
    ]


async def test_causes_are_told_within_the_same_bounds():
    log = failures.FailureLog()
    with structlog.testing.capture_logs() as lines:
        for number in range(500):
            try:
                raise OutOfMemoryError("full") if number else KeyError("once")
            except (OutOfMemoryError, KeyError) as error:
                log.caused(error)
        log.close()

    told = [(line["error"], line["exc_info"]) for line in lines if line["event"] == "internal error"]
    assert told == [("KeyError: 'once'", True), *[("OutOfMemoryError: full", False)] * failures.LINES_PER_SECOND]
    more = [(line["error"], line["count"]) for line in lines if line["event"] == "more internal errors"]
    assert more == [("OutOfMemoryError", 499 - failures.LINES_PER_SECOND)]


async def test_what_was_not_told_is_told_at_the_end():
    log = failures.FailureLog()
    with structlog.testing.capture_logs() as lines:
        for _ in range(failures.LINES_PER_SECOND + 2):
            log.failed("UNAVAILABLE", 1.0)
        log.close()

    summed_up(lines, 2)


def summed_up(lines, count):
    assert [(line["code"], line["count"]) for line in lines if line["event"] == "more rpcs failed"] == [
        ("UNAVAILABLE", count)
    ]
