"""The command, arguments, environment and settings file of the rendered Deployment, at work."""

import asyncio
import re
import shutil
import subprocess
from pathlib import Path

import grpc
import pytest
import raw_http2
import trustme
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from replicas import SERVING, Load, Replica, container_command, container_environment, replica
from toys import write_version


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    write_version(root)
    return root


@pytest.fixture
def secrets(tmp_path):
    """The Secret of components/tls."""
    folder = tmp_path / "secrets"
    folder.mkdir()
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost", "127.0.0.1")
    authority.cert_pem.write_to_path(folder / "ca.crt")
    certificate.private_key_pem.write_to_path(folder / "tls.key")
    certificate.cert_chain_pems[0].write_to_path(folder / "tls.crt")
    return folder


@pytest.mark.parametrize("target_name", ["overlays/dev", "overlays/prod-cpu", "components/tls"])
def test_the_rendered_deployment_starts_answers_its_probes_and_stops(
    rendered, repository, tmp_path, secrets, target_name
):
    with replica(rendered(target_name), repository, tmp_path, secrets=secrets) as pod:
        assert all(pod.probe(name) for name in ("startup", "readiness", "liveness"))
        pod.terminate()
        grace_s = rendered(target_name).pod()["terminationGracePeriodSeconds"]
        code, seconds = pod.ended(grace_s)
        assert code == 0
        assert seconds < grace_s - pod.container["lifecycle"]["preStop"]["sleep"]["seconds"]


def provider(pod):
    """The one that the model runs on, by its metrics."""
    return re.search(r'^convoy_model_info\{.*provider="(\w+)"', pod.get("/metrics"), re.MULTILINE).group(1)


def test_openvino_is_what_the_component_promises_or_nothing(rendered, repository, tmp_path):
    manifests = rendered("components/openvino")
    if "GenuineIntel" in Path("/proc/cpuinfo").read_text():
        with replica(manifests, repository, tmp_path) as pod:
            assert provider(pod) == "OpenVINOExecutionProvider"
    else:
        refuses(manifests, repository, tmp_path, "openvino")


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="this machine has a GPU, on which the pod would start")
def test_a_gpu_pod_without_a_gpu_does_not_start(rendered, repository, tmp_path):
    refuses(rendered("overlays/prod-gpu"), repository, tmp_path, "tensorrt")


def refuses(manifests, repository, folder, reason):
    """The pod ends at once, and its last line says why."""
    pod = Replica(manifests, repository, folder)
    try:
        code, _ = pod.ended(60)
    finally:
        pod.kill()
    assert code not in (0, 1)
    assert reason in pod.lines[-1]


async def watch(address, service):
    """Follows a health service until it is not serving any more."""
    async with aio.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        async for reply in health_pb2_grpc.HealthStub(channel).Watch(request, timeout=60):
            if reply.status != SERVING:
                return


async def test_sigterm_under_load_loses_nothing_and_only_readiness_falls(rendered, repository, tmp_path):
    manifests = rendered("overlays/prod-cpu")
    with replica(manifests, repository, tmp_path) as pod:
        async with aio.insecure_channel(pod.address) as channel, Load(channel) as load:
            not_ready = asyncio.create_task(watch(pod.address, "readiness"))
            await load.answered(200)
            pod.terminate()
            await not_ready
            # Callers that have not heard of it yet go on; the delay of the drain is for them.
            await load.answered(200)
            assert await asyncio.to_thread(pod.probe, "liveness")
            assert not await asyncio.to_thread(pod.probe, "readiness")
            await load.leave()
        grace_s = manifests.pod()["terminationGracePeriodSeconds"]
        sleep_s = pod.container["lifecycle"]["preStop"]["sleep"]["seconds"]
        code, _ = await asyncio.to_thread(pod.ended, grace_s - sleep_s)
        assert code == 0
        assert load.outcomes.keys() == {"OK"}, load.failures
        assert '"cancelled_images": 0' in pod.log


async def test_overload_flips_neither_readiness_nor_liveness(rendered, repository, tmp_path):
    with replica(rendered("overlays/prod-cpu"), repository, tmp_path) as pod:
        # 2048 images at once, where max_pending_images is 256: some have to be refused.
        async with aio.insecure_channel(pod.address) as channel, Load(channel, callers=32, images=64) as load:
            await load.overloaded()
            for _ in range(3):
                assert await asyncio.to_thread(pod.probe, "readiness")
                assert await asyncio.to_thread(pod.probe, "liveness")
                await load.answered(100)
        assert load.outcomes.keys() == {"OK", "UNAVAILABLE"}


def test_clients_that_hold_every_connection_get_nothing_restarted(rendered, repository, tmp_path):
    with (
        replica(rendered("base"), repository, tmp_path, environment={"CONVOY_MAX_CONNECTIONS": "2"}) as pod,
        raw_http2.connected(pod.port),
        raw_http2.connected(pod.port),
    ):
        with pytest.raises(grpc.RpcError):
            pod.probe("readiness")
        assert pod.probe("liveness")


def run_init(rendered, image, models):
    """Runs the init container of components/model-init: `image` is what its image holds."""
    container = rendered("components/model-init").pod()["initContainers"][0]
    paths = {"/repository": image, "/models": models, "/tmp": models.parent}
    return subprocess.run(
        container_command(container, paths),
        env=container_environment(container, paths),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_init_container_copies_and_verifies_what_the_service_then_serves(rendered, repository, tmp_path):
    models = tmp_path / "models"
    models.mkdir()
    done = run_init(rendered, repository, models)
    assert done.returncode == 0, done.stderr
    with replica(rendered("components/model-init"), models, tmp_path) as pod:
        assert pod.probe("readiness")


def test_the_init_container_refuses_a_damaged_model(rendered, repository, tmp_path):
    image, models = tmp_path / "image", tmp_path / "models"
    shutil.copytree(repository, image)
    models.mkdir()
    model = image / "grey" / "1" / "model.onnx"
    model.write_bytes(model.read_bytes()[:-1])
    done = run_init(rendered, image, models)
    assert done.returncode != 0
    assert "model.onnx" in done.stderr
