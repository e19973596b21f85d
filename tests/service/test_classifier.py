"""One request from bytes to answers: neighbours, chunks, deadlines, and nothing left behind."""

import asyncio
import threading
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
import toys

from service import classifier, serving
from service.admission import Admission
from service.artifact import InputSpec, Resize
from service.classifier import Classifier, Query
from service.decode import decode_pool
from service.errors import (
    DrainingError,
    EngineError,
    ExpiredError,
    ImageFault,
    InvalidImageError,
    InvalidRequestError,
    OverloadedError,
)
from service.metrics import Metrics
from service.preprocess import Limits
from service.providers import CPU, CUDA, TENSORRT

BROKEN = b"\x89PNG\r\n\x1a\nnot really"
NO_THUMBNAIL = toys.grey_png(9, (90, 90))


@dataclass
class Bench:
    classifier: Classifier
    admission: Admission
    engine: toys.ToyEngine
    model: serving.ServedModel
    decoder: object
    metrics: Metrics

    def ask(self, images, query=None, seconds=20.0):
        return self.classifier.classify(self.model, images, query or Query(), time.monotonic() + seconds)


@asynccontextmanager
async def classifying(root, engine, max_images=256, max_pending=512, in_turn_s=0.0, size=8):
    metrics, admission = Metrics(), Admission(max_pending, 1 << 20)
    spec = InputSpec(height=size, width=size, channels=1, resize=Resize(mode="stretch"))
    version = toys.write_version(root, classes=engine.classes, spec=spec)
    model, _ = serving.load(
        version,
        lambda _: [engine],
        metrics.model,
        window_s=0.0,
        codel_target_s=0.0,
        in_turn_s=in_turn_s,
        gently=False,
        on_device_lost=pytest.fail,
    )
    decoder = decode_pool(2, metrics.stage("decode"))
    decoder.start()
    model.batcher.start()
    classifier = Classifier(decoder, admission, Limits(max_pixels=10_000), max_images, metrics)
    try:
        yield Bench(classifier, admission, engine, model, decoder, metrics)
        assert (admission.images, admission.bytes) == (0, 0)
    finally:
        engine.resume()
        await classifier.close()
        await model.release(1.0)
        await decoder.close()


@pytest.fixture
async def bench(tmp_path):
    async with classifying(tmp_path, toys.ToyEngine(classes=256)) as made:
        yield made


def winners(result):
    return [
        outcome.reason if isinstance(outcome, InvalidImageError) else outcome.classes[0][0]
        for outcome in result.outcomes
    ]


async def test_each_image_gets_its_own_answer_in_order(bench):
    assert winners(await bench.ask([toys.grey_png(level) for level in (9, 250, 0, 9)])) == [9, 250, 0, 9]


@pytest.mark.parametrize("count", [1, 15, 16, 17, 32, 33, 256])
async def test_chunk_boundaries_lose_and_swap_nothing(bench, count):
    levels = [(7 * n) % 256 for n in range(count)]

    assert winners(await bench.ask([toys.grey_png(level) for level in levels])) == levels


async def test_a_bad_image_has_its_error_in_its_place_and_its_neighbours_their_answers(bench):
    images = [toys.grey_png(1), BROKEN, toys.grey_png(2), b"", b"text", toys.grey_png(3, (200, 200))]

    found = winners(await bench.ask(images))

    assert found == [1, ImageFault.CORRUPT, 2, ImageFault.EMPTY, ImageFault.UNSUPPORTED_FORMAT, ImageFault.TOO_LARGE]


@pytest.mark.parametrize("bad", [0, 15, 16, 39])
async def test_a_bad_image_at_a_chunk_boundary_shifts_nobody(bench, bad):
    images = [toys.grey_png(n) for n in range(40)]
    images[bad] = BROKEN

    found = winners(await bench.ask(images))

    assert found == [ImageFault.CORRUPT if n == bad else n for n in range(40)]


async def test_when_every_image_is_bad_the_engine_is_left_alone(bench):
    bench.engine.batches.clear()

    assert winners(await bench.ask([BROKEN] * 20)) == [ImageFault.CORRUPT] * 20
    assert bench.engine.batches == []


async def test_an_output_that_is_not_finite_fails_only_its_own_image(tmp_path):
    async with classifying(tmp_path, toys.ToyEngine(classes=256, nan_at=77)) as bench:
        found = winners(await bench.ask([toys.grey_png(level) for level in (76, 77, 78)]))

    assert found == [76, ImageFault.NON_FINITE_OUTPUT, 78]


async def test_an_answer_has_a_bounded_number_of_classes(tmp_path):
    """It is made on the event loop, where all others wait meanwhile."""
    async with classifying(tmp_path, toys.ToyEngine(classes=2000)) as bench:
        images = [toys.grey_png(level) for level in range(200)]
        with pytest.raises(InvalidRequestError, match=r"2000 classes of 200 images .* at most 262144 in all"):
            await bench.ask(images, Query(top_k=5000))

        assert len(winners(await bench.ask(images[:100], Query(top_k=5000)))) == 100


async def test_an_empty_request_is_refused(bench):
    with pytest.raises(InvalidRequestError, match="no image"):
        await bench.ask([])


async def test_too_many_images_are_refused_with_the_limit(tmp_path):
    async with classifying(tmp_path, toys.ToyEngine(), max_images=3) as bench:
        with pytest.raises(InvalidRequestError, match="4 images, at most 3"):
            await bench.ask([toys.grey_png(0)] * 4)


@pytest.mark.parametrize("min_score", [-0.1, 1.5, float("nan"), float("inf")])
async def test_a_minimum_score_that_is_no_probability_is_refused(bench, min_score):
    with pytest.raises(InvalidRequestError, match="min_score"):
        await bench.ask([toys.grey_png(0)], Query(min_score=min_score))


async def test_a_deadline_that_has_passed_expires_without_a_batch(bench):
    bench.engine.batches.clear()
    with pytest.raises(ExpiredError):
        await bench.ask([toys.grey_png(0)], seconds=-0.001)

    assert bench.engine.batches == []


async def test_a_deadline_that_passes_in_the_queue_expires_without_a_batch(bench):
    bench.engine.pause()
    running = asyncio.create_task(bench.ask([toys.grey_png(1)]))
    await bench.engine.began()
    with pytest.raises(ExpiredError):
        await bench.ask([toys.grey_png(2)], seconds=0.05)
    bench.engine.resume()

    assert winners(await running) == [1]
    assert winners(await bench.ask([toys.grey_png(3)])) == [3]
    assert bench.engine.batches == [[1], [3]]


async def test_a_deadline_that_passes_in_the_batch_ends_the_wait(bench):
    bench.engine.pause()
    with pytest.raises(ExpiredError):
        await bench.ask([toys.grey_png(1)], seconds=0.05)


async def test_a_tiny_model_runs_in_turn_what_one_turn_brings(tmp_path):
    async with classifying(tmp_path, toys.ToyEngine(classes=256), in_turn_s=60.0) as bench:
        png = toys.grey_png(2)
        pixels = png.index(b"IDAT") + 4
        damaged = png[:pixels] + b"\xff" + png[pixels + 1 :]
        requests = [bench.ask([toys.grey_png(1), damaged, toys.grey_png(3)]), bench.ask([toys.grey_png(4)])]

        assert [winners(each) for each in await asyncio.gather(*requests)] == [[1, ImageFault.CORRUPT, 3], [4]]
        assert bench.engine.batches[-1] == [1, 3, 4]
        value = bench.metrics.registry.get_sample_value
        assert value("convoy_images_total", {"model": "grey", "outcome": "classified"}) == 3
        assert winners(await bench.ask([toys.grey_png(n) for n in range(40)])) == list(range(40))


@pytest.mark.parametrize(("provider", "on_loop"), [(CPU, True), (CUDA, False), (TENSORRT, False)])
async def test_no_batch_on_a_gpu_runs_on_the_event_loop(tmp_path, provider, on_loop):
    """It may have to wait while the graph of another model is captured."""
    ran_on = []

    class Somewhere(toys.ToyEngine):
        def infer(self, chunks):
            ran_on.append(threading.get_ident())
            return super().infer(chunks)

    engine = Somewhere(classes=256)
    engine.provider = provider
    async with classifying(tmp_path, engine, in_turn_s=60.0) as bench:
        ran_on.clear()
        await bench.ask([toys.grey_png(1)])

    assert [thread == threading.get_ident() for thread in ran_on] == [on_loop]


async def test_an_engine_failure_reaches_its_callers_and_not_the_next(bench):
    bench.engine.fail_next(KeyError("x"))
    with pytest.raises(EngineError, match="KeyError"):
        await bench.ask([toys.grey_png(1)])

    assert winners(await bench.ask([toys.grey_png(2)])) == [2]


async def test_a_failure_in_one_chunk_ends_the_others(bench):
    """The first of many chunks fails: the request fails then, and what waits of it is not run."""
    bench.engine.pause()
    request = asyncio.create_task(bench.ask([toys.grey_png(n) for n in range(256)]))
    await bench.engine.began()
    bench.engine.fail_next(EngineError("broken"))
    bench.engine.let_go()
    with pytest.raises(EngineError, match="broken"):
        await request
    bench.engine.resume()

    assert winners(await bench.ask([toys.grey_png(5)])) == [5]
    assert sum(map(len, bench.engine.batches)) < 64
    assert bench.model.batcher.queued_images == 0


async def test_a_caller_that_goes_away_releases_everything(bench):
    bench.engine.pause()
    other = asyncio.create_task(bench.ask([toys.grey_png(1)]))
    await bench.engine.began()
    gone = asyncio.create_task(bench.ask([toys.grey_png(n) for n in range(2, 100)]))
    await asyncio.sleep(0)
    assert bench.admission.images == 99
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    assert bench.admission.images == 1
    bench.engine.resume()

    assert winners(await other) == [1]
    assert winners(await bench.ask([toys.grey_png(200)])) == [200]
    assert bench.engine.batches[0] == [1]
    assert (bench.model.batcher.queued_images, bench.decoder.queued_images) == (0, 0)


async def test_a_full_house_refuses_at_once(tmp_path):
    async with classifying(tmp_path, toys.ToyEngine(), max_pending=8) as bench:
        bench.engine.pause()
        first = asyncio.create_task(bench.ask([toys.grey_png(0)] * 6))
        await bench.engine.began()
        with pytest.raises(OverloadedError) as caught:
            await bench.ask([toys.grey_png(0)] * 6)
        bench.engine.resume()
        await first

    assert caught.value.reason == "images"


async def test_bytes_are_counted_as_encoded(bench):
    bench.engine.pause()
    image = toys.grey_png(0)
    first = asyncio.create_task(bench.ask([image] * 3))
    await bench.engine.began()
    assert (bench.admission.images, bench.admission.bytes) == (3, 3 * len(image))
    bench.engine.resume()
    await first


async def test_draining_refuses(bench):
    bench.admission.drain()
    with pytest.raises(DrainingError):
        await bench.ask([toys.grey_png(0)])


async def test_timing_and_outcomes_are_measured(bench):
    result = await bench.ask([toys.grey_png(1), BROKEN, toys.grey_png(2)])

    value = bench.metrics.registry.get_sample_value
    assert result.timing.decode_s > 0
    assert result.timing.inference_s > 0
    assert value("convoy_images_total", {"model": "grey", "outcome": "classified"}) == 2
    assert value("convoy_images_total", {"model": "grey", "outcome": "failed"}) == 1
    assert value("convoy_image_errors_total", {"reason": "corrupt", "format": "PNG"}) == 1
    for stage in ("decode", "queue", "infer"):
        assert value("convoy_stage_duration_seconds_count", {"model": "grey", "stage": stage}) == 1
    await bench.ask([BROKEN])
    counts = [
        value("convoy_stage_duration_seconds_count", {"model": "grey", "stage": stage}) for stage in ("decode", "infer")
    ]
    assert counts == [2, 1]  # of a request without a usable image nothing was inferred


async def test_thumbnails_of_a_large_request_leave_others_their_turns(tmp_path, monkeypatch):
    """They are decoded on the event loop: all at once, nobody else would be answered meanwhile."""
    turn, turns = 0, []
    decode = classifier.decode_here

    def decode_here(work, headers):
        turns.append(turn)
        return decode(work, headers)

    monkeypatch.setattr(classifier, "decode_here", decode_here)
    async with classifying(tmp_path, toys.ToyEngine()) as bench:
        asking = asyncio.create_task(bench.ask([toys.grey_png(0)] * 64))
        while not asking.done():
            turn += 1
            await asyncio.sleep(0)

    assert len(asking.result().outcomes) == 64
    assert len(turns) == len(set(turns)) == 4


async def test_thumbnails_for_a_large_input_are_enlarged_by_a_thread(tmp_path, monkeypatch):
    """To enlarge 256 of them on the event loop would hold it for a fifth of a second."""
    monkeypatch.setattr(classifier, "decode_here", pytest.fail)
    async with classifying(tmp_path, toys.ToyEngine(classes=256), size=600) as bench:
        assert winners(await bench.ask([toys.grey_png(9)])) == [9]


async def test_a_shadow_is_compared_whatever_score_the_caller_asks_for(bench):
    deadline = time.monotonic() + 20
    images = (toys.grey_png(9), toys.grey_png(250))
    result = await bench.classifier.classify(bench.model, images, Query(min_score=1.0), deadline, bench.model)
    assert [outcome.classes for outcome in result.outcomes] == [[], []]

    def counted(outcome):
        labels = {"model": "grey", "version": "1", "outcome": outcome}
        return bench.metrics.registry.get_sample_value("convoy_shadow_images_total", labels)

    await toys.eventually(lambda: counted("agree"))
    assert (counted("agree"), counted("disagree")) == (2, 0)


@pytest.mark.parametrize(("images", "answered"), [([BROKEN, b""], 0), ([BROKEN, toys.grey_png(1)], 1)])
async def test_images_that_cannot_be_used_are_not_taken_for_answers(bench, monkeypatch, images, answered):
    left = []

    def leave(*args):
        left.append(args[3])
        Admission.leave(bench.admission, *args)

    monkeypatch.setattr(bench.admission, "leave", leave)
    await bench.ask(images)

    assert left == [answered]


def recording(submit, seen):
    def record(*arguments, **named):
        seen.append((named.get("flow"), named["priority"]))
        return submit(*arguments, **named)

    return record


async def test_model_and_priority_go_with_a_request_into_each_queue(bench, monkeypatch):
    admitted, decoding, inferring = [], [], []
    admit = bench.admission.admit
    monkeypatch.setattr(bench.admission, "admit", lambda *place: admitted.append((place[0], place[4])) or admit(*place))
    monkeypatch.setattr(bench.decoder, "submit", recording(bench.decoder.submit, decoding))
    monkeypatch.setattr(bench.model.batcher, "submit", recording(bench.model.batcher.submit, inferring))
    await bench.ask([NO_THUMBNAIL], Query(priority=-1))

    name = bench.model.name
    assert (admitted, decoding) == ([(name, -1)], [(name, -1)])
    assert [priority for _, priority in inferring] == [-1]


async def test_a_shadow_waits_for_all_others(bench, monkeypatch):
    inferring = []
    monkeypatch.setattr(bench.model.batcher, "submit", recording(bench.model.batcher.submit, inferring))
    deadline = time.monotonic() + 20
    await bench.classifier.classify(bench.model, [toys.grey_png(9)], Query(priority=1), deadline, bench.model)
    await toys.eventually(lambda: len(inferring) == 2)

    (_, mine), (_, shadows) = inferring
    assert mine == 1 < shadows


async def test_a_shadow_is_in_use_before_its_copy_begins(bench):
    held = []

    class Used:
        def __enter__(self):
            held.append(True)

        def __exit__(self, *_):
            held.pop()

    class Retired:
        name, number, version, batcher = "grey", 2, bench.model.version, bench.model.batcher
        in_use = staticmethod(Used)

    bench.engine.pause()
    deadline = time.monotonic() + 20
    asking = asyncio.create_task(
        bench.classifier.classify(bench.model, [toys.grey_png(1)], Query(), deadline, Retired())
    )
    await bench.engine.began()
    assert held  # or it would be released while the answer is made, and its copy fail
    bench.engine.resume()
    await asking
    await toys.eventually(lambda: not held)


async def test_waiting_for_a_decoder_counts_as_waiting(bench, monkeypatch):
    submit = bench.decoder.submit

    async def waited(*args, **options):
        done = await submit(*args, **options)
        done.queue_s = 100.0
        return done

    monkeypatch.setattr(
        bench.decoder, "submit", lambda *args, **options: asyncio.ensure_future(waited(*args, **options))
    )
    assert (await bench.ask([NO_THUMBNAIL])).timing.queue_s >= 100
