"""The port, health by name, reflection, and clients that do not know our stubs."""

import asyncio
import socket

import grpc
import pytest
import toys
from convoy.v1 import image_classifier_pb2 as pb
from google.protobuf import descriptor_pool, json_format, message_factory
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from service.errors import ConfigurationError
from service.metrics import Metrics
from service.rpc.listener import SERVICE, Listener, Options

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class Nobody:
    """A servicer that is never called."""

    def refusal(self, context): ...

    async def Classify(self, request, context): ...  # noqa: N802  # the name is the API's

    async def ListModels(self, request, context): ...  # noqa: N802

    async def GetModel(self, request, context): ...  # noqa: N802


def listener(port=0, host="127.0.0.1"):
    return Listener(Options(host, port, 1 << 20, 300.0, 1.0), Nobody(), Metrics())


async def states(channel):
    stub = health_pb2_grpc.HealthStub(channel)
    names = ("", "liveness", "readiness", SERVICE)
    return {name: (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status for name in names}


def all_of(liveness, readiness):
    return {"": readiness, "liveness": liveness, "readiness": readiness, SERVICE: readiness}


async def test_health_goes_from_starting_to_ready_to_draining_and_liveness_stays():
    server = listener()
    await server.start()
    async with aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        starting = await states(channel)
        server.ready(ready=True)
        ready = await states(channel)
        server.ready(ready=False)
        draining = await states(channel)
    await server.stop(0)

    assert starting == draining == all_of(SERVING, NOT_SERVING)
    assert ready == all_of(SERVING, SERVING)


async def test_all_states_are_listed_and_an_unknown_service_is_told_so():
    server = listener()
    await server.start()
    async with aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        listed = (await stub.List(health_pb2.HealthListRequest())).statuses
        unknown = health_pb2.HealthCheckRequest(service="nobody")
        watched = (await stub.Watch(unknown).read()).status
        with pytest.raises(aio.AioRpcError) as caught:
            await stub.Check(unknown)
    await server.stop(0)

    assert {name: one.status for name, one in listed.items()} == all_of(SERVING, NOT_SERVING)
    assert watched == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_lost_device_ends_liveness():
    server = listener()
    await server.start()
    server.ready(ready=True)
    server.lost()
    server.ready(ready=True)  # as at the end of a start, if the device was lost during it
    async with aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        assert await states(channel) == all_of(NOT_SERVING, NOT_SERVING)
    await server.stop(0)


async def test_who_watches_health_is_told_of_the_change():
    server = listener()
    await server.start()
    async with aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="readiness"))
        first = await watch.read()
        server.ready(ready=True)
        second = await watch.read()
        watch.cancel()
    await server.stop(0)

    assert (first.status, second.status) == (NOT_SERVING, SERVING)


async def test_a_taken_port_is_an_error_that_says_what_to_do():
    first = listener()
    await first.start()
    with pytest.raises(ConfigurationError, match=rf"127.0.0.1:{first.port}.*--port") as caught:
        await listener(first.port).start()
    await first.stop(0)

    assert "\n" not in str(caught.value)


async def test_a_port_taken_by_another_program_is_the_same_error():
    with (
        socket.create_server(("127.0.0.1", 0)) as other,
        pytest.raises(ConfigurationError, match="Address already in use"),
    ):
        await listener(other.getsockname()[1]).start()


async def test_an_address_of_another_machine_is_an_error():
    with pytest.raises(ConfigurationError, match=r"192\.0\.2\.1"):
        await listener(host="192.0.2.1").start()


@pytest.mark.skipif(not socket.has_ipv6, reason="this machine has no IPv6")
async def test_an_ipv6_address_gets_the_port_that_was_asked_for():
    server = listener(host="::1")
    await server.start()
    assert server.port > 0
    async with aio.insecure_channel(f"[::1]:{server.port}") as channel:
        assert (await states(channel))["liveness"] == SERVING
    await server.stop(0)


def classify_like_a_stranger(target, image):
    """Classifies over a bare channel, with message types that the server itself described."""
    with grpc.insecure_channel(target) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        services = set(database.get_services())
        pool = descriptor_pool.DescriptorPool(database)
        method = pool.FindServiceByName(SERVICE).methods_by_name["Classify"]
        request_class = message_factory.GetMessageClass(method.input_type)
        response_class = message_factory.GetMessageClass(method.output_type)
        call = channel.unary_unary(
            f"/{SERVICE}/{method.name}",
            request_serializer=request_class.SerializeToString,
            response_deserializer=response_class.FromString,
        )
        request = request_class(images=[image], top_k=1)
        return services, json_format.MessageToDict(call(request, timeout=10)), type(request)


async def test_a_client_that_knows_only_reflection_can_classify(tmp_path):
    async with toys.toy_stand(tmp_path, {"grey": toys.ToyEngine(classes=256)}) as stand:
        services, answer, request_class = await asyncio.to_thread(
            classify_like_a_stranger, stand.target, toys.grey_png(77)
        )

    assert services == {SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    assert request_class is not pb.ClassifyRequest
    assert answer["results"][0]["classification"]["classes"][0]["label"] == "level 77"


def probe(target, service):
    """What grpc_health_probe does: a bare call with the health service's messages, nothing else."""
    with grpc.insecure_channel(target) as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        sent = health_pb2.HealthCheckRequest(service=service).SerializeToString()
        return health_pb2.HealthCheckResponse.FromString(check(sent, timeout=5)).status


@pytest.mark.parametrize("service", ["", "readiness", "liveness"])
async def test_a_plain_probe_is_answered(tmp_path, service):
    async with toys.toy_stand(tmp_path, {"grey": toys.ToyEngine()}) as stand:
        assert await asyncio.to_thread(probe, stand.target, service) == SERVING


async def test_silent_streams_do_not_hold_up_the_others(tmp_path):
    """Calls that send headers and no message occupy nothing that others need."""
    async with toys.toy_stand(tmp_path, {"grey": toys.ToyEngine()}) as stand:
        call = stand.channel.stream_unary(f"/{SERVICE}/Classify")

        async def silence():
            await asyncio.Event().wait()
            yield b""

        silent = [call(silence()) for _ in range(50)]
        response = await stand.stub.Classify(pb.ClassifyRequest(images=[toys.grey_png(0)]), timeout=5)
        for each in silent:
            each.cancel()

    assert response.results[0].classification.classes[0].index == 0


async def port_closes(port):
    """Returns when nobody listens any more."""
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except (ConnectionRefusedError, ConnectionResetError):  # reset: closed while this came in
            return
        writer.close()
        await writer.wait_closed()


def black():
    return pb.ClassifyRequest(images=[toys.grey_png(0)])


async def test_stop_closes_the_port_and_waits_for_the_call_in_flight(tmp_path):
    async with toys.toy_stand(tmp_path, {"grey": toys.ToyEngine()}) as stand:
        engine = stand.engines["grey"]
        engine.pause()
        running = stand.stub.Classify(black())
        await engine.began()
        stopping = asyncio.create_task(stand.listener.stop(20))
        await port_closes(stand.listener.port)
        assert not stopping.done()
        engine.resume()
        response = await running
        await stopping

    assert response.results[0].classification.classes[0].index == 0


async def test_who_watches_does_not_hold_up_the_stop_and_is_told_to_go_elsewhere(tmp_path):
    async with toys.toy_stand(tmp_path, {"grey": toys.ToyEngine()}) as stand:
        watch = health_pb2_grpc.HealthStub(stand.channel).Watch(health_pb2.HealthCheckRequest(service="liveness"))
        await watch.read()
        async with asyncio.timeout(10):
            await stand.listener.stop(60)
            with pytest.raises(aio.AioRpcError) as caught:
                await watch.read()

    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "shutting down" in caught.value.details()


async def test_calls_sent_before_the_stop_are_all_answered(tmp_path):
    """grpc would cancel those that no handler has got yet; clients do not try a cancelled call again."""
    async with toys.toy_stand(tmp_path, {"grey": toys.ToyEngine()}) as stand:
        calls = [stand.stub.Classify(black()) for _ in range(100)]
        await calls[0]
        await stand.listener.stop(20)
        codes = [await call.code() for call in calls]

    assert set(codes) == {grpc.StatusCode.OK}


async def test_clients_that_never_pause_are_refused_and_do_not_hold_up_the_stop(tmp_path):
    async with toys.toy_stand(tmp_path, {"grey": toys.ToyEngine()}) as stand:
        codes = set()

        async def hammer():
            while grpc.StatusCode.UNAVAILABLE not in codes:
                call = stand.stub.Classify(black())
                codes.add(await call.code())

        clients = [asyncio.create_task(hammer()) for _ in range(4)]
        await stand.stub.Classify(black())
        await stand.listener.stop(0.8)
        await asyncio.gather(*clients)

    assert codes <= {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
