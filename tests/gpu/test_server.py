"""A whole server on a GPU."""

import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from convoy.v1 import admin_pb2, admin_pb2_grpc
from convoy.v1 import image_classifier_pb2 as pb
from convoy.v1 import image_classifier_pb2_grpc as pb_grpc
from toys import ROOT, Followed, Process, cache, environment, grey_levels, grey_png, serve_process, write_version

CLASSES = 10
ON_CUDA = ("--providers", "cuda")

# `convoy`, and a thread that loses the GPU at a signal.
LOSES = """
import signal, sys, threading
import lost_gpu
from service.cli import main

signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # for the threads to come, too

def wait():
    signal.sigwait({signal.SIGUSR1})
    lost_gpu.lose()

threading.Thread(target=wait, daemon=True).start()
main()
"""


@pytest.fixture
def repository(tmp_path):
    write_version(tmp_path / "models", classes=CLASSES)
    return tmp_path / "models"


def classify(stub, levels):
    images = [grey_png(level) for level, _ in levels]
    answer = stub.Classify(pb.ClassifyRequest(model="grey", images=images), timeout=20)
    return [result.classification.classes[0].index for result in answer.results]


def test_it_classifies_while_it_reloads(repository):
    stop = threading.Event()

    def keep_asking(stub, seed):
        levels, asked = grey_levels(20 + seed)[seed:], 0
        while not stop.is_set():
            assert classify(stub, levels) == [index for _, index in levels]
            asked += 1
        return asked

    with (
        serve_process(repository, "--admin-port", "0", "--repository-poll-s", "0", providers="cuda") as (_, ready),
        grpc.insecure_channel(ready["grpc"]) as channel,
        grpc.insecure_channel(ready["admin"]) as admin,
        ThreadPoolExecutor(8) as pool,
    ):
        stub, loader = pb_grpc.ImageClassifierStub(channel), admin_pb2_grpc.AdminStub(admin)
        assert served(stub).provider == "CUDAExecutionProvider"
        askers = [pool.submit(keep_asking, stub, seed) for seed in range(8)]
        try:
            for number in (2, 3):
                write_version(repository, number=number, classes=CLASSES)
                loader.LoadModel(admin_pb2.LoadModelRequest(model="grey"), timeout=60)
                assert served(stub).version == number
        finally:
            stop.set()
        assert all(asker.result() for asker in askers)


def served(stub):
    return stub.GetModel(pb.GetModelRequest(model="grey"), timeout=20).summary


def test_auto_takes_the_gpu(repository):
    with serve_process(repository, providers="auto") as (process, ready):
        with grpc.insecure_channel(ready["grpc"]) as channel:
            model = served(pb_grpc.ImageClassifierStub(channel))
        assert model.provider in {"CUDAExecutionProvider", "TensorrtExecutionProvider"}
        (plan,) = [event for event in process.events() if event["event"] == "plan"]
        assert plan["nodes"]


def test_a_server_that_loses_its_gpu_fails_liveness_and_ends_by_itself_when_told(repository):
    env = environment()
    env["PYTHONPATH"] += f":{ROOT / 'tests' / 'support'}"
    flags = ["--port", "0", "--http-port", "0", "--log-format", "json", "--cache-dir", cache(repository), *ON_CUDA]
    command = [sys.executable, "-c", LOSES, "serve", "--repository", repository, *flags]
    server = Process.__new__(Process)
    Followed.__init__(server, list(map(str, command)), cwd=ROOT, env=env)
    try:
        ready = server.ready()
        assert ready, server.ended()
        live = f"http://{ready['http']}/health/live"
        with grpc.insecure_channel(ready["grpc"]) as channel:
            stub = pb_grpc.ImageClassifierStub(channel)
            levels = grey_levels(8)
            assert classify(stub, levels) == [index for _, index in levels]
            assert urllib.request.urlopen(live, timeout=5).status == 200
            server.signal(signal.SIGUSR1)
            refused = refusal(stub, levels)
            assert refused.code() == grpc.StatusCode.UNAVAILABLE
            assert "cannot compute this now" in refused.details()
        with pytest.raises(urllib.error.HTTPError) as failed:
            urllib.request.urlopen(live, timeout=5)
        assert failed.value.code == 503
        server.signal(signal.SIGTERM)
        code, log = server.ended()
        assert code == 0, log
        assert "device lost" in [event["event"] for event in server.events()]
    finally:
        server.kill()


def refusal(stub, levels):
    """The first error within some seconds."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            classify(stub, levels)
        except grpc.RpcError as error:
            return error
    raise AssertionError("the GPU was not lost")
