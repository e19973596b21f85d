"""What a client can send that no gRPC library would, and that it harms nobody else."""

import asyncio
import contextlib
import itertools
import time
from contextlib import ExitStack

import grpc
import pytest
import raw_http2
import toys
from convoy.v1 import image_classifier_pb2 as pb
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc


@pytest.fixture
async def stand(tmp_path):
    async with toys.toy_stand(tmp_path, {"grey": toys.ToyEngine(classes=256)}) as made:
        yield made


async def answers(stand):
    """Whether a well-behaved caller gets its answer."""
    reply = await stand.stub.Classify(pb.ClassifyRequest(images=[toys.grey_png(77)], top_k=1), timeout=10)
    return reply.results[0].classification.classes[0].index == 77


def sent(port, *frames, until=(raw_http2.RST_STREAM, raw_http2.GOAWAY)):
    """Sends frames on a connection of its own; the first frame of such a kind that comes back."""
    with raw_http2.connected(port) as connection:
        connection.send(*frames)
        return connection.wait_for(*until)


@pytest.mark.parametrize("path", [b"/\xff\xfe", b"/convoy.v1.ImageClassifier/\xc3", b"", b"/", b"no slash", b"/a/b/c"])
async def test_a_path_that_is_no_method_ends_its_call_only(stand, path):
    running = stand.engines["grey"]
    running.pause()
    waiting = asyncio.create_task(answers(stand))
    await running.began()

    kind, *_ = await asyncio.to_thread(sent, stand.listener.port, raw_http2.call(1, path))
    running.resume()

    assert kind == raw_http2.RST_STREAM
    assert await waiting
    assert await answers(stand)


async def test_who_watches_and_does_not_read_holds_up_neither_the_others_nor_the_stop(stand):
    watch = b"/grpc.health.v1.Health/Watch"
    with raw_http2.connected(stand.listener.port, window=0) as deaf:
        deaf.send(raw_http2.call(1, watch), raw_http2.message(1, b""))
        await asyncio.to_thread(deaf.wait_for, raw_http2.HEADERS)  # it is being written to
        other = health_pb2_grpc.HealthStub(stand.channel).Watch(health_pb2.HealthCheckRequest())
        assert (await other.read()).status == health_pb2.HealthCheckResponse.SERVING
        stand.listener.ready(ready=False)
        assert (await other.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        async with asyncio.timeout(15):
            await stand.listener.stop(60)


@pytest.mark.parametrize("request_id", ["é".encode(), "日本".encode(), b"\xff"])
async def test_a_request_id_that_no_trailer_can_hold_is_replaced(stand, request_id):
    request = pb.ClassifyRequest(images=[toys.grey_png(3)]).SerializeToString()
    with raw_http2.connected(stand.listener.port) as connection:
        connection.send(raw_http2.call(1, extra=((b"x-request-id", request_id),)), raw_http2.message(1, request))
        kind, *_ = await asyncio.to_thread(connection.wait_for, raw_http2.DATA, raw_http2.RST_STREAM)

    assert kind == raw_http2.DATA


async def test_millions_of_empty_images_are_refused_before_they_become_objects(tmp_path):
    engines = {"grey": toys.ToyEngine(classes=256)}
    async with toys.toy_stand(tmp_path, engines, max_message_bytes=32 << 20) as stand:
        call = stand.channel.unary_unary(raw_http2.CLASSIFY.decode())(b"\x1a\0" * (8 << 20), timeout=20)
        code, text = await ended(call)
        assert await answers(stand)

    assert (code, "more than 320 parts" in text) == (grpc.StatusCode.INVALID_ARGUMENT, True)


async def test_a_watched_name_is_no_place_to_keep_megabytes(stand):
    watch = health_pb2_grpc.HealthStub(stand.channel).Watch(health_pb2.HealthCheckRequest(service="x" * 500_000))

    assert (await ended(watch))[0] is grpc.StatusCode.NOT_FOUND


async def ended(call):
    """Status and text that a call ends with."""
    return await asyncio.wait_for(call.code(), 10), await call.details()


async def silent_calls(stand, count):
    """So many of them, once the server knows of all."""
    calls = [stand.silent_call() for _ in range(count)]
    await answers(stand)  # came later, on the same connection
    return calls


@pytest.fixture
async def strict(tmp_path):
    """A service that waits half a second for a message, for at most ten of them, and serves four connections."""
    bounds = {"message_timeout_s": 0.5, "max_unsent_calls": 10, "max_connections": 4}
    async with toys.toy_stand(tmp_path, {"grey": toys.ToyEngine(classes=256)}, bounds=bounds) as made:
        yield made


@pytest.fixture
async def stand_of_ten(tmp_path):
    """A patient one that lets ten calls wait for their message."""
    bounds = {"message_timeout_s": 60.0, "max_unsent_calls": 10}
    async with toys.toy_stand(tmp_path, {"grey": toys.ToyEngine(classes=256)}, bounds=bounds) as made:
        yield made


async def test_a_message_that_does_not_come_ends_its_call(strict):
    code, details = await ended(strict.silent_call())

    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "0.5 s" in details
    assert await answers(strict)


async def test_a_message_that_never_becomes_whole_ends_its_call(strict):
    half = raw_http2.frame(raw_http2.DATA, b"\x00" + (1000).to_bytes(4, "big") + bytes(500), stream=1)
    assert (await asyncio.to_thread(sent, strict.listener.port, raw_http2.call(1), half))[0] == raw_http2.RST_STREAM
    assert await answers(strict)


async def test_each_silent_call_has_its_own_time(strict):
    calls = []
    for _ in range(3):
        calls.append(strict.silent_call())
        await asyncio.sleep(0.2)
    codes = [(await ended(call))[0] for call in calls]

    assert codes == [grpc.StatusCode.DEADLINE_EXCEEDED] * 3


async def test_one_connection_has_a_bounded_number_of_calls_and_room_again_when_one_is_reset(tmp_path):
    bounds = {"max_calls_per_connection": 2, "message_timeout_s": 60.0}
    request = pb.ClassifyRequest(images=[toys.grey_png(1)]).SerializeToString()
    ends = (raw_http2.DATA, raw_http2.RST_STREAM)

    def in_turn(port):
        with raw_http2.connected(port) as connection:
            connection.wait_for(raw_http2.SETTINGS)
            # Before the settings are acknowledged the server counts in another way.
            connection.send(raw_http2.frame(raw_http2.SETTINGS, flags=1), *map(raw_http2.call, (1, 3, 5)))
            refused = connection.wait_for(*ends)
            connection.send(raw_http2.reset(1))
            for stream in range(7, 107, 2):  # the first ones may still meet the call that is being cleared up
                connection.send(raw_http2.call(stream), raw_http2.message(stream, request))
                if (got := connection.wait_for(*ends))[0] == raw_http2.DATA:
                    break
                time.sleep(0.05)
            return refused, got

    async with toys.toy_stand(tmp_path, {"grey": toys.ToyEngine(classes=256)}, bounds=bounds) as stand:
        refused, answered = await asyncio.to_thread(in_turn, stand.listener.port)

    assert (refused[0], refused[2]) == (raw_http2.RST_STREAM, 5)
    assert answered[0] == raw_http2.DATA


async def test_reflection_and_watch_do_not_wait_for_ever_either(strict):
    for method in (
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        "/grpc.health.v1.Health/Watch",
        "/grpc.health.v1.Health/Check",
    ):
        assert (await ended(strict.silent_call(method)))[0] is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_stream_may_pause_between_its_messages(strict):
    stub = reflection_pb2_grpc.ServerReflectionStub(strict.channel)
    call = stub.ServerReflectionInfo()
    for _ in range(2):
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        assert (await call.read()).HasField("list_services_response")
        await asyncio.sleep(1)
    await call.done_writing()

    assert (await ended(call))[0] is grpc.StatusCode.OK


async def test_of_too_many_silent_calls_the_oldest_end_and_the_next_caller_is_answered(stand_of_ten):
    calls = await silent_calls(stand_of_ten, 30)

    assert await answers(stand_of_ten)
    ends = [asyncio.create_task(ended(call)) for call in calls]
    codes = [(await end)[0] for end in itertools.islice(asyncio.as_completed(ends), 21)]
    for end in ends:
        end.cancel()
    assert set(codes) == {grpc.StatusCode.UNAVAILABLE}
    assert sum(call.done() for call in calls) == 21  # of 31 calls ten could wait; the last of them brought its message
    assert stand_of_ten.value("convoy_shed_total", reason="unsent") == 21


async def test_one_silent_call_too_many_ends_the_one_that_has_waited_longest(tmp_path):
    bounds = {"message_timeout_s": 60.0, "max_unsent_calls": 3}
    async with toys.toy_stand(tmp_path, {"grey": toys.ToyEngine(classes=256)}, bounds=bounds) as stand:
        calls = []
        for _ in range(3):
            calls += await silent_calls(stand, 1)
        assert (await ended(calls[0]))[0] is grpc.StatusCode.UNAVAILABLE  # when the last caller came
        assert not any(call.done() for call in calls[1:])


async def test_silent_calls_do_not_hold_up_the_stop(stand):
    calls = await silent_calls(stand, 5)
    async with asyncio.timeout(10):
        await stand.listener.stop(60)

    assert {(await ended(call))[0] for call in calls} == {grpc.StatusCode.UNAVAILABLE}


async def test_a_call_that_ends_without_a_message_is_answered(stand):
    async def nothing():
        return
        yield b""

    code, details = await ended(stand.channel.stream_unary(toys.CLASSIFY)(nothing()))

    assert (code, details) == (grpc.StatusCode.INVALID_ARGUMENT, "the call ended without a request")


async def test_calls_that_are_reset_are_neither_answered_nor_logged(stand):
    calls = await silent_calls(stand, 50)
    for call in calls:
        call.cancel()
    await answers(stand)
    await asyncio.to_thread(sent, stand.listener.port, raw_http2.call(1, b"/none"))

    assert not stand.value(
        "grpc_server_handled_total",
        grpc_type="unary",
        grpc_service="convoy.v1.ImageClassifier",
        grpc_method="Classify",
        grpc_code="InvalidArgument",
    )


async def test_calls_opened_and_reset_without_end_leave_the_others_alone(stand):
    def flood():
        with raw_http2.connected(stand.listener.port) as connection:
            for first in range(1, 4001, 100):
                streams = range(first, first + 100, 2)
                connection.send(*(frame for s in streams for frame in (raw_http2.call(s), raw_http2.reset(s))))

    flooding = asyncio.create_task(asyncio.to_thread(flood))
    assert all([await answers(stand) for _ in range(20)])
    await flooding


async def test_a_burst_of_calls_is_answered_and_not_cancelled_at_random(stand):
    calls = [stand.stub.ListModels(pb.ListModelsRequest()).code() for _ in range(1500)]

    assert set(await asyncio.gather(*calls)) == {grpc.StatusCode.OK}


@pytest.mark.parametrize("kind", [raw_http2.PING, raw_http2.SETTINGS])
async def test_floods_of_control_frames_leave_the_others_alone(stand, kind):
    flood = [raw_http2.frame(kind, bytes(8) if kind == raw_http2.PING else b"")] * 20_000

    def send():
        with raw_http2.connected(stand.listener.port) as connection, contextlib.suppress(OSError):
            connection.send(*flood)  # the server may close the connection

    flooding = asyncio.create_task(asyncio.to_thread(send))
    assert all([await answers(stand) for _ in range(10)])
    await flooding


async def test_metadata_that_is_no_text_harms_nobody(stand):
    odd = [(b"x-odd", b"\xff\xfe"), (b"x-request-id", b"\xff")]
    message = raw_http2.frame(raw_http2.DATA, bytes(5), flags=1, stream=1)
    frames = raw_http2.call(1, extra=odd), message
    kind, *_ = await asyncio.to_thread(sent, stand.listener.port, *frames, until=(raw_http2.HEADERS,))

    assert kind == raw_http2.HEADERS  # an answer: a request without images is refused like any other
    assert await answers(stand)


async def test_beyond_so_many_connections_the_next_is_closed_and_those_that_are_stay(strict):
    assert await answers(strict)
    with ExitStack() as stack:
        others = [
            await asyncio.to_thread(lambda: stack.enter_context(raw_http2.connected(strict.listener.port)))
            for _ in range(3)
        ]
        for other in others:
            assert (await asyncio.to_thread(other.wait_for, raw_http2.SETTINGS)) is not None
        with raw_http2.connected(strict.listener.port) as fifth:
            assert await asyncio.to_thread(closed, fifth)
        assert await answers(strict)


def closed(connection):
    """Whether the server closes a connection without a word."""
    try:
        return connection.receive() is None
    except ConnectionResetError:
        return True
