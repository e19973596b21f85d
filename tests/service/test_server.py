"""The life of a server: start, ports, health, drain, end, and every way in which a start can fail."""

import asyncio
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import grpc
import pytest
import structlog
import toys
from convoy.v1 import image_classifier_pb2 as pb
from convoy.v1 import image_classifier_pb2_grpc as pb_grpc
from google.protobuf.message import Message
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image
from ports import free_port
from variants import slowed, version_with

from service import server as server_module
from service import serving
from service.artifact import InputSpec, Resize
from service.engine import OrtEngine
from service.errors import ArtifactError, ConfigurationError, DeviceLostError
from service.repository import Repository
from service.rpc.listener import Listener
from service.rpc.servicer import ImageClassifier


def http_get(port, path, after_s=0.0):
    time.sleep(after_s)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


async def get(port, path, after_s=0.0):
    return await asyncio.to_thread(http_get, port, path, after_s)


def grey_request(*levels) -> Message:
    return pb.ClassifyRequest(images=[toys.grey_png(level) for level in levels], top_k=1)


def winners(response):
    return [result.classification.classes[0].index for result in response.results]


# --- a server in this process


async def test_a_server_is_live_before_and_after_it_is_ready(tmp_path):
    toys.write_version(tmp_path, classes=256)
    async with toys.real_server(tmp_path) as server:
        live, ready = await get(server.http_port, "/health/live"), await get(server.http_port, "/health/ready")
        _, metrics = await get(server.http_port, "/metrics")
        async with aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            health = health_pb2_grpc.HealthStub(channel)
            state = (await health.Check(health_pb2.HealthCheckRequest(service="readiness"))).status
            answer = await pb_grpc.ImageClassifierStub(channel).Classify(grey_request(3, 250))

    assert (live[0], ready[0], state) == (200, 200, health_pb2.HealthCheckResponse.SERVING)
    assert winners(answer) == [3, 250]
    assert "convoy_ready 1.0" in metrics
    assert re.search(
        r'^convoy_model_info\{digest="\w+",model="grey",provider="\w+",variant="fp32",', metrics, re.MULTILINE
    )


async def test_a_delay_of_the_event_loop_is_still_seen_when_it_is_over(tmp_path, monkeypatch):
    monkeypatch.setattr(server_module, "_BEAT_S", 0.02)
    toys.write_version(tmp_path)
    async with toys.real_server(tmp_path) as server:
        time.sleep(0.5)  # noqa: ASYNC251  # that is the delay
        await asyncio.sleep(0.3)
        lag_s = server.metrics.registry.get_sample_value("convoy_event_loop_lag_seconds")

    assert lag_s > 0.4


async def test_draining_is_reported_while_calls_are_still_taken(tmp_path):
    """Load balancers need time to notice: during the delay health says no, and calls are answered all the same."""
    toys.write_version(tmp_path, classes=256)
    async with (
        toys.real_server(tmp_path, drain_delay_s=1.0) as server,
        aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        health = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(service="readiness"))
        await watch.read()
        stopping = asyncio.create_task(server.shutdown())
        told = (await watch.read()).status
        status, _ = await get(server.http_port, "/health/ready")
        live, _ = await get(server.http_port, "/health/live")
        answer = await pb_grpc.ImageClassifierStub(channel).Classify(grey_request(9))
        assert not stopping.done()
        watch.cancel()
        await stopping

    assert told == health_pb2.HealthCheckResponse.NOT_SERVING
    assert (status, live) == (503, 200)
    assert winners(answer) == [9]


async def test_a_drain_that_takes_too_long_cancels_the_rest_and_counts_it(tmp_path):
    large = InputSpec(height=700, width=700, channels=1, resize=Resize(mode="stretch"))
    toys.write_version(tmp_path, spec=large)
    photos = pb.ClassifyRequest(images=[toys.photo_jpeg(1600, 1200, quality=40)] * 100)
    with structlog.testing.capture_logs() as lines:
        async with (
            toys.real_server(tmp_path, drain_timeout_s=0.2, decode_threads=1, max_batch_size=4) as server,
            aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
        ):
            stub = pb_grpc.ImageClassifierStub(channel)
            call = stub.Classify(photos)
            while not (server.metrics.registry.get_sample_value("convoy_pending_images") or call.done()):
                await stub.ListModels(pb.ListModelsRequest())
            await server.shutdown()
            with pytest.raises((aio.AioRpcError, asyncio.CancelledError)):
                await call

    (stopped,) = [line for line in lines if line["event"] == "stopped" and line["cancelled_images"]]
    assert (stopped["cancelled_images"], stopped["log_level"]) == (100, "error")


@pytest.mark.parametrize("delay_s", [0.0, 60.0])
async def test_who_asks_twice_does_not_wait_for_calls_in_flight(tmp_path, monkeypatch, delay_s):
    large = InputSpec(height=700, width=700, channels=1, resize=Resize(mode="stretch"))
    toys.write_version(tmp_path, spec=large)
    photos = pb.ClassifyRequest(images=[toys.photo_jpeg(1600, 1200, quality=40)] * 200)
    with structlog.testing.capture_logs() as lines:
        async with (
            toys.real_server(
                tmp_path, drain_delay_s=delay_s, drain_timeout_s=60.0, decode_threads=1, max_batch_size=4
            ) as server,
            aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
        ):
            stub = pb_grpc.ImageClassifierStub(channel)
            call = stub.Classify(photos)
            while not (server.metrics.registry.get_sample_value("convoy_pending_images") or call.done()):
                await stub.ListModels(pb.ListModelsRequest())
            server.request_stop("SIGINT")
            stopping = asyncio.create_task(server.shutdown())
            server.request_stop("SIGINT")  # the same Ctrl-C, by another way
            await asyncio.sleep(0.1)
            assert not stopping.done()
            monkeypatch.setattr(server_module, "_TWICE_S", 0.0)
            server.request_stop("SIGINT")
            await stopping
            with pytest.raises((aio.AioRpcError, asyncio.CancelledError)):
                await call

    assert next(line["cancelled_images"] for line in lines if line["event"] == "stopped") == 200
    assert len([line for line in lines if line["event"].startswith("stop requested")]) == 2


async def test_a_long_drain_is_not_taken_for_a_stuck_loop(tmp_path, monkeypatch):
    monkeypatch.setattr(server_module, "_STUCK_S", 0.5)
    monkeypatch.setattr(server_module, "_BEAT_S", 0.05)
    toys.write_version(tmp_path)
    stream = io.BytesIO()
    Image.new("L", (3000, 3000)).save(stream, "PNG")  # unlike a JPEG it has to be decoded in full
    photos = pb.ClassifyRequest(images=[stream.getvalue()] * 80)
    lives = []
    async with (
        toys.real_server(tmp_path, decode_threads=1, drain_timeout_s=60.0) as server,
        aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        stub = pb_grpc.ImageClassifierStub(channel)
        call = stub.Classify(photos)
        while not server.metrics.registry.get_sample_value("convoy_pending_images"):
            await stub.ListModels(pb.ListModelsRequest())
        stopping, began = asyncio.create_task(server.shutdown()), time.monotonic()
        while time.monotonic() - began < 1.0 and not call.done():
            lives.append((await get(server.http_port, "/health/live"))[0])
        assert not call.done(), "the drain was too short to show anything"
        await asyncio.gather(call, stopping)

    assert set(lives) == {200}


async def test_a_retired_connection_outlives_the_longest_call(tmp_path, monkeypatch):
    seen = []

    class Told(Listener):
        def __init__(self, options, *parts):
            seen.append(options)
            super().__init__(options, *parts)

    monkeypatch.setattr(server_module, "Listener", Told)
    toys.write_version(tmp_path)
    for drain_s in (1.0, 90.0):
        async with toys.real_server(tmp_path, drain_timeout_s=drain_s, max_deadline_ms=30_000):
            pass

    assert [options.grace_s for options in seen] == [30.0, 90.0]


async def test_a_taken_grpc_port_does_not_start(tmp_path):
    toys.write_version(tmp_path)
    async with toys.real_server(tmp_path) as server:
        with pytest.raises(ConfigurationError, match=rf"127\.0\.0\.1:{server.port}.*--port"):
            async with toys.real_server(tmp_path, port=server.port):
                pytest.fail("two servers on one port")
        assert (await get(server.http_port, "/health/ready"))[0] == 200


async def test_a_taken_http_port_does_not_start(tmp_path):
    toys.write_version(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(ConfigurationError, match="--http-port"):
        async with toys.real_server(tmp_path, http_port=other.getsockname()[1]):
            pytest.fail("two servers on one port")


def flip_a_byte(root):
    model = toys.write_version(root) / "model.onnx"
    data = bytearray(model.read_bytes())
    data[-20] ^= 1
    model.write_bytes(data)


@pytest.mark.parametrize(
    ("prepare", "settings", "error", "words"),
    [
        (lambda root: None, {}, ConfigurationError, "holds no model version.*convoy train"),
        (lambda root: (root / "grey" / "1").mkdir(parents=True), {}, ConfigurationError, "holds no model version"),
        (toys.write_version, {"models": ("nope",)}, ConfigurationError, "has no model nope; it has grey"),
        (flip_a_byte, {}, ArtifactError, "does not match"),
        (lambda root: toys.write_version(root, labels=("a", "b")), {}, ArtifactError, "for 2 labels"),
        (lambda root: toys.write_version(root, canary_shift=0.2), {}, ArtifactError, "canary"),
        (lambda root: toys.write_version(root, graph_options={"nan_at": 85}), {}, ArtifactError, "canary"),
        (lambda root: toys.write_version(root, graph_options={"fixed_batch": True}), {}, ArtifactError, "fixed batch"),
        (lambda root: toys.write_version(root, graph_options={"float_input": True}), {}, ArtifactError, "uint8"),
        (lambda root: toys.write_version(root, external_data=True), {}, ArtifactError, "external"),
    ],
    ids=[
        "empty",
        "half a copy",
        "unknown name",
        "damaged",
        "wrong labels",
        "other answers",
        "not finite",
        "fixed batch",
        "float input",
        "external data",
    ],
)
async def test_a_model_that_cannot_be_served_ends_the_start(tmp_path, prepare, settings, error, words):
    prepare(tmp_path)

    with pytest.raises(error, match=words) as caught:
        async with toys.real_server(tmp_path, **settings):
            pytest.fail("it was served")

    assert "\n" not in str(caught.value)


async def test_a_failed_start_frees_its_ports(tmp_path):
    port = free_port()
    with pytest.raises(ConfigurationError):
        async with toys.real_server(tmp_path, http_port=port):
            pytest.fail("an empty repository was served")
    toys.write_version(tmp_path)

    async with toys.real_server(tmp_path, http_port=port) as server:
        assert server.http_port == port


@pytest.mark.parametrize(
    ("settings", "threads"),
    [
        ({}, 0),  # a model that takes less than a hand-over runs on the loop
        ({"executors": 2}, 2),
        ({"model_settings": {"grey": {"executors": 1}}}, 1),
        ({"model_settings": {"other": {"executors": 1}}}, 0),
    ],
)
async def test_who_sets_executors_gets_threads_and_who_does_not_gets_none_for_a_tiny_model(
    tmp_path, settings, threads, monkeypatch
):
    monkeypatch.setattr(OrtEngine, "_timed", lambda *_: 50e-6)  # whatever else the machine does
    assert await infer_threads(tmp_path, settings) == threads


async def test_a_model_that_takes_longer_than_a_hand_over_gets_threads_unasked(tmp_path, monkeypatch):
    monkeypatch.setattr(OrtEngine, "_timed", lambda *_: 500e-6)
    assert await infer_threads(tmp_path, {}) > 0


async def infer_threads(folder, settings):
    """How many threads a server with the toy model computes on; it answers, too."""
    toys.write_version(folder)
    async with toys.real_server(folder, **settings) as server:
        names = [thread.name for thread in threading.enumerate() if thread.name.startswith("infer-grey")]
        async with aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            response = await pb_grpc.ImageClassifierStub(channel).Classify(grey_request(255))
    assert winners(response) == [9]
    return len(names)


async def test_who_sets_a_window_gets_threads_too(tmp_path):
    toys.write_version(tmp_path)
    async with toys.real_server(tmp_path, batch_window_ms=1.0):
        assert any(thread.name.startswith("infer-grey") for thread in threading.enumerate())


async def test_only_the_named_models_are_served(tmp_path):
    for name in ("a", "b", "c"):
        toys.write_version(tmp_path, name)
    flip_a_byte(tmp_path)  # of a model that is not asked for

    async with toys.real_server(tmp_path, models=("a", "c")) as server:
        assert [model.name for model in server.repository] == ["a", "c"]


async def test_the_latest_version_is_served_whatever_its_number_looks_like(tmp_path):
    for number in (2, 10, 9):
        toys.write_version(tmp_path, number=number)

    async with toys.real_server(tmp_path) as server:
        assert [(model.name, model.number) for model in server.repository] == [("grey", 10)]


# --- a process of its own


@pytest.mark.parametrize("which", ["--port", "--http-port"])
def test_a_port_in_use_ends_with_two_and_one_line(tmp_path, which):
    toys.write_version(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as other:
        ports = {"--port": 0, "--http-port": 0, which: other.getsockname()[1]}
        flags = [str(part) for pair in ports.items() for part in pair]
        code, error = toys.Process("serve", "--repository", tmp_path, *flags).ended()

    assert code == 2
    (line,) = error.splitlines()
    assert which in line
    assert "in use" in line


def test_a_damaged_model_ends_with_three_and_names_the_file(tmp_path):
    flip_a_byte(tmp_path)
    code, error = toys.Process("serve", "--repository", tmp_path, "--port", 0, "--http-port", 0).ended()

    assert code == 3
    assert "model.onnx does not match the manifest" in error.splitlines()[-1]
    assert "Traceback" not in error


def test_a_server_starts_small_and_says_where_it_is(tmp_path):
    toys.write_version(tmp_path)
    with toys.serve_process(tmp_path) as (_, report):
        assert report["models"] == ["grey/1"]
        assert report["rss_mib"] < 250
        assert {report["grpc"].partition(":")[0], report["http"].partition(":")[0]} == {"127.0.0.1"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_an_idle_server_with_zero(tmp_path, number):
    toys.write_version(tmp_path)
    with toys.serve_process(tmp_path) as (process, _):
        process.signal(number)
        code, log = process.ended()

    assert code == 0, log
    assert [event["event"] for event in process.events()][-1] == "stopped"


def test_a_load_that_does_not_end_holds_up_no_stop(tmp_path):
    """A file of a terabyte, whose hash takes a quarter of an hour, stands for a file system that does not answer."""
    toys.write_version(tmp_path)
    fresh = toys.write_version(tmp_path, number=2)
    aside = tmp_path / ".aside"
    fresh.rename(aside)
    manifest = json.loads((aside / "manifest.json").read_text())
    manifest["files"]["model.onnx"]["size_bytes"] = 1 << 40
    (aside / "manifest.json").write_text(json.dumps(manifest))
    os.truncate(aside / "model.onnx", 1 << 40)
    with toys.serve_process(tmp_path, "--repository-poll-s", "0.1") as (process, _):
        aside.rename(fresh)
        assert within(lambda: str(fresh / "model.onnx") in process.open_files())
        process.signal(signal.SIGTERM)
        code, log = process.ended()

    assert code == 0, log
    assert [event["event"] for event in process.events()][-2:] == ["stopped", "left a load behind that does not end"]


@pytest.mark.parametrize("log", ["nobody reads it", "its disk is full"])
def test_a_log_that_cannot_be_written_stops_nothing(tmp_path, log):
    """Neither the rounds of polling nor SIGTERM, which tell of themselves."""
    toys.write_version(tmp_path)
    port = free_port()
    reader, writer = os.pipe()
    os.close(reader)
    flags = ["--repository", tmp_path, "--port", "0", "--http-port", port, "--repository-poll-s", "0.1"]
    flags += ["--cache-dir", toys.cache(tmp_path), "--providers", "cpu", "--drain-delay-s", "0", "--log-format", "json"]
    with Path("/dev/full").open("w") as full:
        process = subprocess.Popen(
            [sys.executable, "-m", "service", "serve", *map(str, flags)],
            cwd=toys.ROOT,
            env=toys.environment(),
            stderr=writer if log == "nobody reads it" else full,
        )
    os.close(writer)
    try:
        assert within(lambda: 'version="1"' in metrics_of(port))
        toys.write_version(tmp_path, number=2)
        assert within(lambda: 'version="2"' in metrics_of(port))
        process.send_signal(signal.SIGTERM)
        assert process.wait(toys.TIMEOUT_S) == 0
    finally:
        process.kill()


def metrics_of(port):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as page:
            return page.read().decode()
    except OSError:
        return ""


def within(condition):
    """Whether it comes true in time: another process wakes nobody here."""
    end = time.monotonic() + toys.TIMEOUT_S
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def test_a_termination_under_load_loses_nothing_that_was_accepted(tmp_path):
    """Each call was sent before the signal: it is answered from its own image, or was never begun.

    On a machine that has no time for the server it may be refused, which clients try again elsewhere.
    """
    toys.write_version(tmp_path, classes=256)

    async def load(target, process):
        async with aio.insecure_channel(target) as channel:
            stub = pb_grpc.ImageClassifierStub(channel)
            levels = [[(17 * n + m) % 256 for m in range(8)] for n in range(150)]
            calls = [stub.Classify(grey_request(*each), timeout=20) for each in levels]
            await calls[5]
            process.signal(signal.SIGTERM)
            return levels, await asyncio.gather(*calls, return_exceptions=True)

    with toys.serve_process(tmp_path) as (process, report):
        levels, outcomes = asyncio.run(load(report["grpc"], process))
        code, log = process.ended()

    answered = [(each, outcome) for each, outcome in zip(levels, outcomes, strict=True) if isinstance(outcome, Message)]
    refused = [outcome for outcome in outcomes if not isinstance(outcome, Message)]
    assert code == 0, log
    assert all(winners(outcome) == each for each, outcome in answered)
    assert {outcome.code() for outcome in refused} <= {grpc.StatusCode.UNAVAILABLE}
    assert {event["code"] for event in process.events() if "code" in event} <= {"UNAVAILABLE"}
    (stopped,) = [event for event in process.events() if event["event"] == "stopped"]
    assert stopped["cancelled_images"] == 0
    assert len(answered) >= 6
    assert all(json.loads(line) for line in log.splitlines() if line.startswith("{"))


async def test_settings_reach_their_places_in_seconds(tmp_path, monkeypatch):
    seen, load = {}, serving.load

    def noting(name, kind):
        class Noting(kind):
            def __init__(self, *arguments, **named):
                seen[name] = (arguments, named)
                super().__init__(*arguments, **named)

        monkeypatch.setattr(server_module, name, Noting)

    def loading(*arguments, **named):
        seen["load"] = named
        return load(*arguments, **named)

    noting("ImageClassifier", ImageClassifier)
    noting("Repository", Repository)
    noting("Listener", Listener)
    monkeypatch.setattr(serving, "load", loading)
    toys.write_version(tmp_path)
    settings = {"default_deadline_ms": 1500, "max_deadline_ms": 4000, "batch_window_ms": 3, "codel_target_ms": 7}
    async with toys.real_server(tmp_path, **settings, max_pending_images=300):
        pass

    assert seen["ImageClassifier"][0][2:] == (1.5, 4.0)
    assert seen["Repository"][1]["release_timeout_s"] == 4.0
    assert (seen["load"]["window_s"], seen["load"]["codel_target_s"]) == (0.003, 0.007)
    assert seen["Listener"][0][0].max_unsent_calls == 300


async def test_a_lost_device_ends_liveness_and_readiness_for_good(tmp_path, monkeypatch):
    """Nothing else restarts a server whose GPU is gone."""
    toys.write_version(tmp_path)
    async with (
        toys.real_server(tmp_path) as server,
        aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        stub, health = pb_grpc.ImageClassifierStub(channel), health_pb2_grpc.HealthStub(channel)

        def lost(*_):
            raise DeviceLostError("an illegal memory access")

        monkeypatch.setattr(OrtEngine, "infer", lost)
        with pytest.raises(aio.AioRpcError):
            await stub.Classify(pb.ClassifyRequest(images=[toys.grey_png(9)]))
        for path in ("/health/live", "/health/ready"):
            assert (await get(server.http_port, path))[0] == 503
        for name in ("liveness", "readiness"):
            state = (await health.Check(health_pb2.HealthCheckRequest(service=name))).status
            assert state == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_a_loop_that_is_stuck_is_not_alive(tmp_path, monkeypatch):
    monkeypatch.setattr(server_module, "_STUCK_S", 0.3)
    monkeypatch.setattr(server_module, "_BEAT_S", 0.05)
    toys.write_version(tmp_path)
    async with toys.real_server(tmp_path) as server:
        asking = asyncio.create_task(get(server.http_port, "/health/live", after_s=0.8))
        await asyncio.sleep(0.1)  # until its thread has begun
        time.sleep(1.5)  # noqa: ASYNC251  # this is what is tested
        status, text = await asking
        later, _ = await get(server.http_port, "/health/live")

    assert (status, "stuck" in text, later) == (503, True, 200)


async def test_a_model_is_described_by_the_file_that_runs(tmp_path):
    version = version_with(tmp_path, fp32=slowed, int8=lambda model: model)
    async with (
        toys.real_server(tmp_path) as server,
        aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        told = await pb_grpc.ImageClassifierStub(channel).GetModel(pb.GetModelRequest())

    assert [variant.name for variant in told.variants if variant.active] == ["int8"]
    assert told.sha256 == version.manifest.files["model.int8.onnx"].sha256
