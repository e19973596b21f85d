"""What docs/guarantees.md promises and no other test shows by itself; and that every test that page names exists."""

import ast
import asyncio
import re
import resource
import socket
import subprocess
import threading
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import psutil
import pytest
import raw_http2
import toys
from convoy.v1 import image_classifier_pb2 as pb
from convoy.v1 import image_classifier_pb2_grpc as pb_grpc
from grpc import aio
from PIL import Image

from service import artifact, sessions
from service.client import Client
from service.providers import CPU, Plan

PAGE = toys.ROOT / "docs" / "guarantees.md"
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE.read_text())


def request(*levels, model="grey"):
    return pb.ClassifyRequest(model=model, images=[toys.grey_png(level) for level in levels], top_k=1)


def winners(reply):
    return [result.classification.classes[0].index for result in reply.results]


# --- the page


@pytest.mark.parametrize(("file", "name"), NAMED, ids=[f"{file}::{name}" for file, name in NAMED])
def test_every_test_that_the_page_names_exists(file, name):
    tree = ast.parse((toys.ROOT / file).read_text())
    found = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}

    assert name in found
    assert name.startswith("test_")


def test_every_row_of_the_page_names_a_test():
    rows = [line for line in PAGE.read_text().splitlines() if re.match(r"\| \d+ \|", line)]

    assert [int(re.match(r"\| (\d+)", row)[1]) for row in rows] == list(range(1, 12))
    assert all("`tests/" in row for row in rows)


# --- preprocessing never waits for the device


async def test_images_are_decoded_while_a_batch_runs(tmp_path):
    async with toys.toy_stand(tmp_path, {"grey": toys.ToyEngine(classes=256)}) as stand:
        engine_ = stand.engines["grey"]
        engine_.pause()
        calls = [stand.stub.Classify(request(level)) for level in range(9)]
        await engine_.began()
        # All the others get decoded and wait for the device, which is still busy with its first batch.
        await toys.eventually(lambda: len(engine_.batches[0]) + stand.value("convoy_queue_images", model="grey") == 9)
        assert len(engine_.batches) == 1
        engine_.resume()
        assert [winners(await call) for call in calls] == [[level] for level in range(9)]


# --- a load disturbs nobody


async def test_a_model_answers_while_another_one_loads(tmp_path):
    began, may_go = threading.Event(), threading.Event()

    def loading(path):
        if path.parent.name == "slow" and path.name == "2":
            began.set()
            assert may_go.wait(toys.TIMEOUT_S)

    engines = {"grey": toys.ToyEngine(classes=256), "slow": toys.ToyEngine()}
    async with toys.toy_stand(tmp_path, engines, loading=loading) as stand:
        toys.write_version(tmp_path, "slow", 2)
        polling = asyncio.create_task(stand.repository.poll())
        assert await asyncio.to_thread(began.wait, toys.TIMEOUT_S)
        replies = [await stand.stub.Classify(request(level), timeout=5) for level in range(20)]
        old = await stand.stub.Classify(request(255, model="slow"), timeout=5)
        assert not polling.done()
        may_go.set()
        await polling
        new = await stand.stub.Classify(request(255, model="slow"))

    assert [winners(reply) for reply in replies] == [[level] for level in range(20)]
    assert (old.version, new.version) == (1, 2)


# --- threads


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
@pytest.mark.parametrize("cpus", [1, 4])
async def test_a_session_starts_the_threads_it_is_granted_and_no_more(tmp_path, cpus):
    """Whatever the machine has: ONNX Runtime starts one fewer than it is given, for the caller works, too."""
    version = artifact.load(toys.write_version(tmp_path))
    before = threads()
    loaded = sessions.load(version, artifact.MODEL, Plan(CPU, intra_op_threads=cpus), (1,))

    # The thread that made the session may take a moment to leave.
    await toys.eventually(lambda: len(threads() - before) == cpus - 1)
    assert loaded.session


def threads():
    """Numbers of this process's threads."""
    return {path.name for path in Path("/proc/self/task").iterdir()}


# --- clients spread, and come back to be spread


async def test_a_connection_is_retired_at_its_age(tmp_path):
    bounds = {"max_connection_age_s": 0.3}
    async with toys.toy_stand(tmp_path, {"grey": toys.ToyEngine(classes=256)}, bounds=bounds) as stand:

        def retired():
            with raw_http2.connected(stand.listener.port) as connection:
                return connection.wait_for(raw_http2.GOAWAY)

        assert await asyncio.to_thread(retired) is not None
        assert winners(await stand.stub.Classify(request(9))) == [9]


async def test_the_client_spreads_its_calls_over_every_address(tmp_path):
    engines = [{"grey": toys.ToyEngine(classes=256)} for _ in range(2)]
    async with (
        toys.toy_stand(tmp_path / "a", engines[0]) as first,
        toys.toy_stand(tmp_path / "b", engines[1]) as second,
    ):

        def calls():
            with Client(f"ipv4:{first.target},{second.target}") as client:
                while not all(answered(stand) for stand in (first, second)):
                    client.classify(request(3))
                before = [answered(stand) for stand in (first, second)]
                for _ in range(20):
                    client.classify(request(3))
                return before

        before = await asyncio.wait_for(asyncio.to_thread(calls), toys.TIMEOUT_S)
        grown = [answered(stand) - count for stand, count in zip((first, second), before, strict=True)]

    assert grown == [10, 10]


def answered(stand):
    return stand.value("convoy_images_total", model="grey", outcome="classified")


# --- messages as large as photos are


async def test_requests_beyond_grpcs_four_megabytes_are_answered_with_the_default_settings(tmp_path):
    toys.write_version(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (1000, 1000), np.uint8)
    large = toys.encoded(Image.fromarray(noise), "PNG")
    sent = pb.ClassifyRequest(images=[large] * 6, top_k=1)
    assert sent.ByteSize() > 5 << 20
    async with toys.real_server(tmp_path) as server, aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        reply = await pb_grpc.ImageClassifierStub(channel).Classify(sent)

    assert [result.WhichOneof("outcome") for result in reply.results] == ["classification"] * 6


# --- where the time went


async def test_every_stage_of_a_request_is_in_a_histogram(tmp_path):
    async with toys.toy_stand(tmp_path, {"grey": toys.ToyEngine(classes=256)}) as stand:
        await stand.stub.Classify(request(1, 2, 3))
        counts = {
            stage: stand.value("convoy_stage_duration_seconds_count", model="grey", stage=stage)
            for stage in ("queue", "decode", "infer")
        }
        total = stand.value("convoy_version_duration_seconds_count", model="grey", version="1", role="answer")

    assert counts == {"queue": 1, "decode": 1, "infer": 1}
    assert total == 1


# --- without file descriptors


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="Linux alone changes limits of another process")
def test_without_file_descriptors_it_neither_spins_nor_drops_those_it_serves(tmp_path):
    toys.write_version(tmp_path)
    flags = ("--repository-poll-s", "0")
    with toys.serve_process(tmp_path, *flags) as (process, report), ExitStack() as stack:
        client = stack.enter_context(Client(report["grpc"]))
        assert winners(client.classify(request(255))) == [9]
        used = len(list(Path(f"/proc/{process.pid}/fd").iterdir()))
        _, hard = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (used + 5, hard))
        with ExitStack() as others:
            for address in [report["grpc"], report["http"]] * 10:
                others.enter_context(socket.create_connection((address.partition(":")[0], int(address.split(":")[1]))))
            began_s = sum(psutil.Process(process.pid).cpu_times()[:2])
            replies = [client.classify(request(level)) for level in (0, 255) for _ in range(20)]
            with pytest.raises(subprocess.TimeoutExpired):  # the second in which it could spin
                process.wait(1.0)
            assert sum(psutil.Process(process.pid).cpu_times()[:2]) - began_s < 0.7
        assert [winners(reply) for reply in replies] == [[0]] * 20 + [[9]] * 20
        with Client(report["grpc"], connect_timeout_s=10) as late:
            assert winners(late.classify(request(255))) == [9]
