"""The API over a real server: answers, and the status code of every fault that a client can cause or meet."""

import asyncio
import gc
import math
import os
import sys
from collections import Counter

import grpc
import pytest
import toys
from convoy.v1 import image_classifier_pb2 as pb
from convoy.v1 import image_classifier_pb2_grpc as pb_grpc
from google.rpc.error_details_pb2 import ErrorInfo
from grpc import aio
from grpc_status import rpc_status
from PIL import Image

from service.batcher import Job
from service.errors import DeviceLostError, OutOfMemoryError
from service.resources import rss_bytes

BROKEN = b"\x89PNG\r\n\x1a\nnot really"
BOMB = toys.encoded(Image.new("1", (5000, 5000)), "PNG")  # 25 million pixels in 3 KB; the stand allows 4 million


@pytest.fixture
async def stand(tmp_path):
    async with toys.toy_stand(tmp_path, {"grey": toys.ToyEngine(classes=256)}) as made:
        yield made


def request(*levels, **fields):
    return pb.ClassifyRequest(images=[toys.grey_png(level) for level in levels], **fields)


def winners(response):
    return [result.classification.classes[0].index for result in response.results]


async def refused(call):
    with pytest.raises(aio.AioRpcError) as caught:
        await call
    return caught.value


async def test_an_answer_says_who_gave_it_and_how_long_it_took(stand):
    response = await stand.stub.Classify(request(17, 3, top_k=2))

    assert (response.model, response.version) == ("grey", 1)
    assert winners(response) == [17, 3]
    best, second = response.results[0].classification.classes
    assert (best.label, second.index) == ("level 17", 16)
    assert best.score > second.score > 0
    timing = response.timing
    assert timing.total_us >= timing.inference_us > 0
    assert timing.decode_us > 0


async def test_scores_of_all_classes_add_up_to_one_and_logits_come_in_label_order(stand):
    response = await stand.stub.Classify(request(200, top_k=256, return_logits=True))

    found = response.results[0].classification
    assert math.fsum(entry.score for entry in found.classes) == pytest.approx(1, abs=1e-5)
    assert len(found.logits) == 256
    assert max(range(256), key=found.logits.__getitem__) == 200


@pytest.mark.parametrize(("top_k", "count"), [(0, 5), (1, 1), (2**32 - 1, 256)])
async def test_top_k_defaults_to_five_and_ends_at_the_classes(stand, top_k, count):
    response = await stand.stub.Classify(request(1, top_k=top_k))

    assert len(response.results[0].classification.classes) == count
    assert len(response.results[0].classification.logits) == 0


async def test_a_minimum_score_may_leave_no_class(stand):
    response = await stand.stub.Classify(request(1, min_score=0.99))

    assert response.results[0].WhichOneof("outcome") == "classification"
    assert len(response.results[0].classification.classes) == 0


async def test_a_bad_image_does_not_fail_its_neighbours(stand):
    message = pb.ClassifyRequest(images=[toys.grey_png(1), BROKEN, toys.grey_png(2), b"text", b"", BOMB])

    response = await stand.stub.Classify(message)

    assert [result.classification.classes[0].index for result in response.results[0:3:2]] == [1, 2]
    faults = [response.results[n].error for n in (1, 3, 4, 5)]
    assert [fault.reason for fault in faults] == [
        pb.ImageError.CORRUPT,
        pb.ImageError.UNSUPPORTED_FORMAT,
        pb.ImageError.EMPTY,
        pb.ImageError.TOO_LARGE,
    ]
    assert all(fault.message for fault in faults)


async def test_when_every_image_is_bad_the_call_says_which_and_why(stand):
    error = await refused(stand.stub.Classify(pb.ClassifyRequest(images=[BROKEN, b"", BOMB])))

    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "image 0 (CORRUPT): The PNG" in error.details()
    assert "image 1 (EMPTY): The image is empty" in error.details()
    assert "image 2 (TOO_LARGE): The image of 5000x5000" in error.details()


def detail_of(error, kind):
    """What a client reads of a call that failed, with gRPC's own helper."""
    (packed,) = rpc_status.from_call(error).details
    detail = kind()
    assert packed.Unpack(detail)
    return detail


async def test_when_every_image_is_bad_programs_are_told_why(stand):
    error = await refused(stand.stub.Classify(pb.ClassifyRequest(images=[BROKEN, b"", BOMB])))

    reasons = [pb.ImageError.CORRUPT, pb.ImageError.EMPTY, pb.ImageError.TOO_LARGE]
    told = detail_of(error, pb.ImageErrors).errors
    assert [each.reason for each in told] == reasons
    assert told[1].message == "The image is empty: it has no bytes."


async def test_programs_are_told_how_many_images_there_may_be(stand):
    error = await refused(stand.stub.Classify(request(*[0] * 257)))

    told = detail_of(error, ErrorInfo)
    assert (told.reason, told.domain, told.metadata) == ("TOO_MANY_IMAGES", "convoy.v1", {"max_images": "256"})


async def test_other_refusals_have_no_details(stand):
    assert rpc_status.from_call(await refused(stand.stub.Classify(request(0, model="nope")))) is None


@pytest.mark.parametrize("bad", [BROKEN, BOMB])
async def test_two_hundred_bad_images_are_still_an_invalid_argument(stand, bad):
    """Trailers are limited to 8 KB: a longer text would reach the client as something else."""
    error = await refused(stand.stub.Classify(pb.ClassifyRequest(images=[bad] * 256)))

    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "image 0 (" in error.details()
    assert "256" in error.details()
    assert len(detail_of(error, pb.ImageErrors).errors) == 8
    assert sum(len(key) + len(value) + 32 for key, value in error.trailing_metadata()) < 6000


@pytest.mark.parametrize(
    ("message", "code", "words"),
    [
        (pb.ClassifyRequest(), grpc.StatusCode.INVALID_ARGUMENT, "no image"),
        (request(*[0] * 257), grpc.StatusCode.INVALID_ARGUMENT, "at most 256"),
        (request(0, min_score=1.5), grpc.StatusCode.INVALID_ARGUMENT, "min_score"),
        (request(0, min_score=math.nan), grpc.StatusCode.INVALID_ARGUMENT, "min_score"),
        (request(0, model="nope"), grpc.StatusCode.NOT_FOUND, "served are: grey"),
        (request(0, version=7), grpc.StatusCode.NOT_FOUND, "served are: 1"),
        (request(0, version=-1), grpc.StatusCode.NOT_FOUND, "served are: 1"),
        (request(0, version=0), grpc.StatusCode.NOT_FOUND, "served are: 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_wrong_request_says_what_is_wrong(stand, message, code, words):
    error = await refused(stand.stub.Classify(message))

    assert error.code() is code
    assert words in error.details()


@pytest.mark.parametrize("name", ["x" * 100_000, "猫" * 10_000])
async def test_a_very_long_name_is_not_found_all_the_same(stand, name):
    error = await refused(stand.stub.Classify(request(0, model=name)))

    assert error.code() is grpc.StatusCode.NOT_FOUND


async def test_an_unknown_method_is_unimplemented(stand):
    error = await refused(stand.channel.unary_unary("/convoy.v1.ImageClassifier/Guess")(b""))

    assert error.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("garbage", [b"\xff\xff\xff", b"\x1a\xff\xff\xff\xff\x0fx", b"\x0a\x02\xc3\x28"])
async def test_bytes_that_are_no_message_leave_the_server_unharmed(stand, garbage):
    error = await refused(stand.channel.unary_unary(toys.CLASSIFY)(garbage))

    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "damaged" in error.details()
    assert "x-request-id" in dict(error.trailing_metadata())
    assert winners(await stand.stub.Classify(request(5))) == [5]


async def test_a_stream_with_damaged_messages_is_refused_as_a_call_is(stand):
    reflect = stand.channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
    call = reflect(iter([b"\xff\xff\xff"]))
    with pytest.raises(aio.AioRpcError) as caught:
        await call.read()

    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "damaged" in caught.value.details()


async def test_a_message_that_is_too_large_is_refused(stand):
    error = await refused(stand.stub.Classify(pb.ClassifyRequest(images=[bytes(1 << 21)])))

    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert winners(await stand.stub.Classify(request(5))) == [5]


async def test_a_message_that_is_too_large_once_unpacked_is_refused(stand):
    zeros = pb.ClassifyRequest(images=[bytes(64 << 20)])

    error = await refused(stand.stub.Classify(zeros, compression=grpc.Compression.Gzip))

    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert winners(await stand.stub.Classify(request(5), compression=grpc.Compression.Gzip)) == [5]


async def test_twenty_kilobytes_of_metadata_are_refused(stand):
    error = await refused(stand.stub.Classify(request(5), metadata=(("x-junk", "x" * 20_000),)))

    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert winners(await stand.stub.Classify(request(5))) == [5]


async def test_what_expires_in_the_queue_is_never_batched(stand):
    engine = stand.engines["grey"]
    engine.pause()
    running = stand.stub.Classify(request(1))
    await engine.began()
    error = await refused(stand.stub.Classify(request(2), timeout=0.1))
    engine.resume()

    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert winners(await running) == [1]
    assert winners(await stand.stub.Classify(request(3))) == [3]
    assert [2] not in engine.batches


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (pb.ClassifyRequest(images=[toys.grey_png(1)]).SerializeToString(), grpc.StatusCode.OK),
        (pb.ClassifyRequest(images=[b"no image"]).SerializeToString(), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.ClassifyRequest(images=[toys.grey_png(1)], model="no").SerializeToString(), grpc.StatusCode.NOT_FOUND),
        (b"\xff" * 1000, grpc.StatusCode.INVALID_ARGUMENT),
    ],
    ids=["answered", "no image", "no model", "damaged"],
)
async def test_requests_leave_memory_with_their_answers(stand, sent, code):
    """Not when Python next looks for circles: by then there are hundreds of megabytes of images."""
    classify = stand.channel.unary_unary(toys.CLASSIFY)  # bytes: the messages are the server's
    gc.collect()
    before = requests_in_memory()
    gc.disable()
    try:
        calls = [classify(sent) for _ in range(5)]
        codes = [await call.code() for call in calls]
        await asyncio.sleep(0.3)  # the client has its answer before the server's call has ended
        after = requests_in_memory()
    finally:
        gc.enable()

    assert codes == [code] * 5
    assert after == before


def requests_in_memory():
    """How many requests and jobs there are, those of the tests' own tables included."""
    # Not isinstance: it asks each object for its class, and there are some that warn when asked.
    return Counter(type(each).__name__ for each in gc.get_objects() if type(each) in (pb.ClassifyRequest, Job))


async def test_what_is_cancelled_in_the_queue_is_never_batched(stand):
    engine = stand.engines["grey"]
    engine.pause()
    running = stand.stub.Classify(request(1))
    await engine.began()
    gone = stand.stub.Classify(request(2))
    await stand.stub.ListModels(pb.ListModelsRequest())
    gone.cancel()
    await stand.stub.ListModels(pb.ListModelsRequest())
    engine.resume()

    assert await gone.code() is grpc.StatusCode.CANCELLED
    assert winners(await running) == [1]
    assert winners(await stand.stub.Classify(request(3))) == [3]
    assert engine.batches == [[1], [3]]


async def test_a_call_without_a_deadline_gets_the_default(tmp_path):
    async with toys.toy_stand(tmp_path, {"grey": toys.ToyEngine()}, default_s=0.1) as stand:
        stand.engines["grey"].pause()
        error = await refused(stand.stub.Classify(request(0)))

    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_full_house_is_unavailable_at_once_and_says_when_to_come_back(tmp_path):
    async with toys.toy_stand(tmp_path, {"grey": toys.ToyEngine()}, max_images=8, max_pending=8) as stand:
        engine = stand.engines["grey"]
        engine.pause()
        running = stand.stub.Classify(request(*[0] * 6))
        await engine.began()
        error = await refused(stand.stub.Classify(request(*[0] * 6)))
        engine.resume()
        await running

        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert int(dict(error.trailing_metadata())["grpc-retry-pushback-ms"]) > 0
        assert stand.value("convoy_shed_total", reason="images") == 1
        assert len((await stand.stub.Classify(request(*[0] * 6))).results) == 6


async def test_an_answer_may_be_larger_than_a_request(tmp_path):
    async with toys.toy_stand(tmp_path, {"grey": toys.ToyEngine(classes=256)}, max_message_bytes=4096) as stand:
        reply = await stand.stub.Classify(request(7, 8, top_k=256))

    assert reply.ByteSize() > 4096
    assert [len(result.classification.classes) for result in reply.results] == [256, 256]


async def test_a_full_house_refuses_calls_before_their_message_is_there(tmp_path):
    async with toys.toy_stand(tmp_path, {"grey": toys.ToyEngine()}, max_images=8, max_pending=8) as stand:
        stand.engines["grey"].pause()
        running = stand.stub.Classify(request(*[0] * 8))
        await stand.engines["grey"].began()
        error = await refused(stand.silent_call(timeout=20))
        wrong = await refused(stand.stub.Classify(request(0, model="nope")))
        stand.engines["grey"].resume()
        await running
        wrong_again = await refused(stand.stub.Classify(request(0, model="nope")))

    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert (wrong.code(), wrong_again.code()) == (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.NOT_FOUND)
    assert "images are pending" in error.details()
    assert int(dict(error.trailing_metadata())["grpc-retry-pushback-ms"]) > 0


async def test_a_model_that_is_busy_has_no_calls_refused_that_may_be_for_another(tmp_path):
    engines = {"grey": toys.ToyEngine(), "other": toys.ToyEngine()}
    async with toys.toy_stand(tmp_path, engines, max_images=8, max_pending=8) as stand:
        engines["grey"].pause()
        running = stand.stub.Classify(request(*[0] * 4, model="grey"))
        await engines["grey"].began()
        sent = await refused(stand.stub.Classify(request(0, model="grey")))
        unsent = await refused(stand.silent_call(timeout=0.5))
        answered = await stand.stub.Classify(request(0, model="other"))
        engines["grey"].resume()
        await running

    assert (sent.code(), unsent.code()) == (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
    assert winners(answered) == [0]


async def test_a_draining_server_is_unavailable(stand):
    stand.admission.drain()

    error = await refused(stand.stub.Classify(request(0)))

    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert "another replica" in error.details()


async def test_an_output_that_is_not_finite_fails_its_image_or_the_whole_call(tmp_path):
    async with toys.toy_stand(tmp_path, {"grey": toys.ToyEngine(classes=256, nan_at=77)}) as stand:
        response = await stand.stub.Classify(request(76, 77))
        error = await refused(stand.stub.Classify(request(77, 77)))

        assert response.results[0].classification.classes[0].index == 76
        assert response.results[1].error.reason == pb.ImageError.NON_FINITE_OUTPUT
        assert error.code() is grpc.StatusCode.INTERNAL


@pytest.mark.parametrize("fault", [OutOfMemoryError("/opt/ort.cc:12 no memory"), DeviceLostError("/dev/nvidia0 gone")])
async def test_a_device_that_fails_is_unavailable_without_its_own_words(stand, fault):
    stand.engines["grey"].fail_next(fault)

    error = await refused(stand.stub.Classify(request(0)))

    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert "/" not in error.details()


async def test_after_everything_the_gauges_are_back_at_zero(stand):
    engine = stand.engines["grey"]
    engine.pause()
    first = stand.stub.Classify(request(1, 2, 3))
    await engine.began()
    assert stand.value("convoy_pending_images") == 3
    calls = [stand.stub.Classify(request(n), timeout=0.1 if n % 3 else 10) for n in range(20)]
    calls += [stand.stub.Classify(pb.ClassifyRequest(images=[BROKEN])) for _ in range(3)]
    await stand.stub.ListModels(pb.ListModelsRequest())
    calls[0].cancel()
    engine.resume()
    await asyncio.gather(first, *calls, return_exceptions=True)
    await stand.stub.Classify(request(1))
    await stand.stub.ListModels(pb.ListModelsRequest())

    assert stand.value("convoy_pending_images") == 0
    assert stand.value("convoy_queue_images", model="grey") == 0
    assert (stand.admission.images, stand.admission.bytes) == (0, 0)


async def test_images_and_batches_are_counted(stand):
    await stand.stub.Classify(pb.ClassifyRequest(images=[toys.grey_png(1), BROKEN, toys.grey_png(2)]))

    assert stand.value("convoy_images_total", model="grey", outcome="classified") == 2
    assert stand.value("convoy_images_total", model="grey", outcome="failed") == 1
    assert stand.value("convoy_image_errors_total", reason="corrupt", format="PNG") == 1
    assert stand.value("convoy_batch_size_sum", model="grey") == 2


async def test_models_are_listed_and_described(tmp_path):
    engines = {"grey": toys.ToyEngine(), "other": toys.ToyEngine(classes=4)}
    async with toys.toy_stand(tmp_path, engines) as stand:
        listed = (await stand.stub.ListModels(pb.ListModelsRequest())).models
        described = await stand.stub.GetModel(pb.GetModelRequest(model="other"))
        nameless = await refused(stand.stub.GetModel(pb.GetModelRequest()))
        unknown = await refused(stand.stub.GetModel(pb.GetModelRequest(model="other", version=3)))

    assert [(m.name, m.version, m.num_classes, m.provider, m.is_default) for m in listed] == [
        ("grey", 1, 10, "ToyProvider", True),
        ("other", 1, 4, "ToyProvider", True),
    ]
    assert list(described.labels) == [f"level {k}" for k in range(4)]
    assert (described.input.height, described.input.width, described.input.channels) == (8, 8, 1)
    assert "stretched to 8x8" in described.input.resize
    assert len(described.sha256) == 64
    assert dict(described.metrics) == {"accuracy": 1.0}
    assert [(v.name, v.active, v.precision) for v in described.variants] == [("fp32", True, "toy")]
    assert described.max_batch_size == 8
    assert (nameless.code(), unknown.code()) == (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.NOT_FOUND)


async def test_two_models_do_not_mix(tmp_path):
    engines = {"grey": toys.ToyEngine(classes=256), "coarse": toys.ToyEngine(classes=2)}
    async with toys.toy_stand(tmp_path, engines) as stand:
        answers = await asyncio.gather(
            *(stand.stub.Classify(request(200, model=name)) for name in ["grey", "coarse"] * 20)
        )

    assert [winners(answer) for answer in answers] == [[200], [1]] * 20


async def test_one_connection_carries_many_calls_at_once(stand):
    async with aio.insecure_channel(stand.target) as channel:
        stub = pb_grpc.ImageClassifierStub(channel)
        answers = await asyncio.gather(*(stub.Classify(request(n)) for n in range(100)))

    assert [winners(answer) for answer in answers] == [[n] for n in range(100)]


CROWD = """
import asyncio, sys
import toys
from grpc import aio
from convoy.v1 import image_classifier_pb2 as pb, image_classifier_pb2_grpc as pb_grpc

async def main(target, calls, size):
    image = toys.grey_png(7) + bytes(size)
    async with aio.insecure_channel(target) as channel:
        stub = pb_grpc.ImageClassifierStub(channel)
        waiting = (stub.Classify(pb.ClassifyRequest(images=[image]), timeout=60) for _ in range(calls))
        await asyncio.gather(*waiting, return_exceptions=True)

asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
"""


async def test_what_waits_takes_the_memory_that_is_counted(tmp_path):
    """Message, request and images are three copies: one of them is to stay."""
    calls, size = 20, 4 << 20
    engine = toys.ToyEngine(classes=256)
    async with toys.toy_stand(tmp_path, {"grey": engine}, max_message_bytes=8 << 20) as stand:
        engine.pause()
        gc.collect()
        before = rss_bytes()
        paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
        client = await asyncio.create_subprocess_exec(
            sys.executable, "-c", CROWD, stand.target, str(calls), str(size), env={**os.environ, **paths}
        )
        try:
            await toys.eventually(lambda: stand.admission.images == calls)
            await asyncio.sleep(0.5)
            grown = rss_bytes() - before
        finally:
            engine.resume()
            await client.wait()

    assert grown < 2 * calls * size


async def test_urgent_calls_go_first_and_background_work_last(stand):
    engine = stand.engines["grey"]
    engine.pause()
    calls = [stand.stub.Classify(request(50))]
    await engine.began()
    for level, priority in ((1, pb.PRIORITY_LOW), (2, pb.PRIORITY_NORMAL), (3, pb.PRIORITY_HIGH)):
        calls.append(stand.stub.Classify(request(level, priority=priority)))
        await toys.eventually(lambda: stand.admission.images == len(calls))
    await toys.eventually(lambda: stand.repository.get("grey").batcher.queued_images == 3)
    engine.resume()
    for call in calls:
        await call

    assert [level for batch in engine.batches for level in batch] == [50, 3, 2, 1]


async def test_no_call_is_worked_on_for_longer_than_the_server_allows(tmp_path):
    async with toys.toy_stand(tmp_path, {"grey": toys.ToyEngine()}, longest_s=0.2) as stand:
        stand.engines["grey"].pause()
        error = await refused(stand.stub.Classify(request(0), timeout=60))

    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_answers_may_be_larger_than_four_mebibytes(tmp_path):
    """gRPC's usual bound on messages is for those that come in; who asks for so much has to raise his own."""
    engines = {"grey": toys.ToyEngine(classes=1000)}
    unbounded = [("grpc.max_receive_message_length", -1)]
    async with toys.toy_stand(tmp_path, engines) as stand, aio.insecure_channel(stand.target, unbounded) as channel:
        reply = await pb_grpc.ImageClassifierStub(channel).Classify(request(*[7] * 256, top_k=1000, return_logits=True))

    assert reply.ByteSize() > 4 << 20
    assert {len(result.classification.classes) for result in reply.results} == {1000}
