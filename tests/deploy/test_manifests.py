"""Every folder renders, validates in strict mode on three versions of Kubernetes, and keeps its promises."""

import io
import shutil
import subprocess
import sys
import warnings
from contextlib import ExitStack, suppress
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from cloudcoil.models.prometheus_operator import v1 as operator
from PIL import Image

from service.admission import Admission
from service.errors import OverloadedError
from service.settings import MIB, Settings

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"

# The oldest with preStop.sleep switched on, and two newer ones up to the latest whose schemas there are.
KUBERNETES = ("1.31", "1.34", "1.37")

CUSTOM = {"PodMonitor": operator.PodMonitor, "PrometheusRule": operator.PrometheusRule}


def is_quantity(text, units=("Ki", "Mi", "Gi", "m", "")):
    return str(text).rstrip("KMGim").replace(".", "").isdigit() and str(text).lstrip("0123456789.") in units


def bytes_of(quantity):
    number = quantity.rstrip("KMGi")
    return int(number) << {"Ki": 10, "Mi": 20, "Gi": 30}[quantity[len(number) :]]


@pytest.mark.parametrize("version", KUBERNETES)
def test_every_object_is_valid_in_strict_mode(rendered, target, version):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for document in rendered(target).documents:
            if document["kind"] not in CUSTOM:
                assert kubernetes_validate.validate(document, version, strict=True) == version


def test_the_validator_refuses_what_is_wrong(rendered):
    deployment = yaml.safe_load(yaml.safe_dump(rendered("base").one("Deployment")))
    deployment["spec"]["template"]["spec"]["containers"][0]["livenessProb"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, "1.34", strict=True)


def accepted_by_operator(document):
    """What the operator's schema keeps of an object: its unknown fields are gone, wrong types raise."""
    return CUSTOM[document["kind"]].model_validate(document).model_dump(by_alias=True, exclude_unset=True, mode="json")


def test_custom_resources_follow_their_schemas(rendered, target):
    for document in rendered(target).documents:
        if document["kind"] in CUSTOM:
            assert accepted_by_operator(document) == document


def test_the_operators_schema_refuses_what_is_wrong(rendered):
    monitor = yaml.safe_load(yaml.safe_dump(rendered("components/monitoring").one("PodMonitor")))
    monitor["spec"]["podMetricsEndpoints"][0]["intervall"] = "5s"
    assert accepted_by_operator(monitor) != monitor


def test_the_monitoring_component_adds_what_it_says(rendered):
    kinds = {document["kind"] for document in rendered("components/monitoring").documents}
    assert {"PodMonitor", "PrometheusRule"} <= kinds
    metrics = rendered("components/monitoring").one("HorizontalPodAutoscaler")["spec"]["metrics"]
    assert [metric["type"] for metric in metrics] == ["ContainerResource", "Pods"]


def test_the_autoscaler_adds_pods_before_one_model_alone_is_refused(rendered):
    """What one flow can fill is what the autoscaler can see of it."""
    admission = Admission(max_images=256, max_bytes=1)
    with ExitStack() as held:
        with suppress(OverloadedError):
            while True:
                held.enter_context(admission.admit("model", 1, 0, float("inf")))
        reached = admission.images / admission.max_images
    target = rendered("components/monitoring").one("HorizontalPodAutoscaler")["spec"]["metrics"][-1]["pods"]["target"]
    assert int(target["averageValue"].removesuffix("m")) / 1000 <= reached / 2


def pods(rendered_target):
    for document in rendered_target.documents:
        if document["kind"] in ("Deployment", "Job"):
            yield document["spec"]["template"]["spec"]


def test_every_pod_runs_with_the_least_rights(rendered, target):
    for pod in pods(rendered(target)):
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] >= 10000
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"] + pod.get("initContainers", []):
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] is True
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}


def test_every_container_has_requests_and_limits(rendered, target):
    for pod in pods(rendered(target)):
        for container in pod["containers"] + pod.get("initContainers", []):
            resources = container["resources"]
            for resource in ("cpu", "memory"):
                assert is_quantity(resources["requests"][resource])
                assert is_quantity(resources["limits"][resource])
            assert bytes_of(resources["requests"]["memory"]) <= bytes_of(resources["limits"]["memory"])


# Most bytes that a pixel takes while it is decoded: WebP with transparency.
BYTES_OF_A_PIXEL = 20
PEAK_OF_A_PICTURE = """
import io, re, sys
from pathlib import Path
from PIL import Image
from service.artifact import InputSpec, Resize
from service.preprocess import preprocess

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10

spec = InputSpec(height=224, width=224, channels=3, resize=Resize(mode="stretch"))
small = io.BytesIO()
Image.new("RGBA", (64, 64)).save(small, "WEBP")
preprocess(small.getvalue(), spec)
before, picture = peak(), sys.stdin.buffer.read()
preprocess(picture, spec)
print(peak() - before)
"""


def test_a_picture_takes_the_memory_that_the_limits_are_made_for():
    side = 4000
    picture = io.BytesIO()
    Image.new("RGBA", (side, side)).save(picture, "WEBP", quality=1, method=0)
    command = [sys.executable, "-c", PEAK_OF_A_PICTURE]
    done = subprocess.run(command, input=picture.getvalue(), capture_output=True, check=True, cwd=DEPLOY.parent)
    taken = int(done.stdout) / side**2
    assert 0.5 * BYTES_OF_A_PIXEL < taken < 1.05 * BYTES_OF_A_PIXEL


def assert_memory_suffices(manifests):
    """Room for the process, its models, requests that wait, and the largest picture in each decode thread."""
    settings, limits = Settings(**manifests.settings()), manifests.container()["resources"]["limits"]
    threads = settings.decode_threads or int(limits["cpu"])
    needed = (300 + 200) * MIB + settings.max_pending_bytes + threads * settings.max_image_pixels * BYTES_OF_A_PIXEL
    assert bytes_of(limits["memory"]) >= needed


def test_the_largest_pictures_on_all_threads_fit_into_memory(rendered, serving):
    assert_memory_suffices(rendered(serving))


@pytest.mark.parametrize("overlay_name", ["dev", "prod-cpu"])
def test_the_largest_pictures_fit_into_memory_beside_openvino(render, tmp_path, overlay_name):
    """As docs/deploy.md says: the component in the overlay's list, so that the overlay's own sizes come after it."""
    shutil.copytree(DEPLOY, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "overlays" / overlay_name / "kustomization.yaml"
    content = yaml.safe_load(path.read_text())
    content["components"].append("../../components/openvino")
    path.write_text(yaml.safe_dump(content))
    assert_memory_suffices(render(path.parent))


def test_a_camera_s_picture_of_24_megapixels_passes(rendered, serving):
    assert rendered(serving).settings()["max_image_pixels"] >= 6048 * 4024


def test_every_empty_directory_has_a_size(rendered, target):
    for pod in pods(rendered(target)):
        volumes = [volume for volume in pod["volumes"] if "emptyDir" in volume]
        assert volumes
        assert all(bytes_of(volume["emptyDir"]["sizeLimit"]) > 0 for volume in volumes)


def test_what_directories_may_hold_fits_into_the_limit_of_the_pod(rendered, target):
    for pod in pods(rendered(target)):
        on_disk = sum(
            bytes_of(volume["emptyDir"]["sizeLimit"])
            for volume in pod["volumes"]
            if "emptyDir" in volume and volume["emptyDir"].get("medium") != "Memory"
        )
        limit = sum(bytes_of(container["resources"]["limits"]["ephemeral-storage"]) for container in pod["containers"])
        assert on_disk <= limit


def test_every_mount_has_its_volume_and_every_volume_its_mount(rendered, target):
    for pod in pods(rendered(target)):
        mounted = {
            mount["name"]
            for container in pod["containers"] + pod.get("initContainers", [])
            for mount in container["volumeMounts"]
        }
        assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_selectors_find_the_pods(rendered, serving):
    everything = rendered(serving)
    labels = everything.one("Deployment")["spec"]["template"]["metadata"]["labels"]
    for document in everything.documents:
        spec = document.get("spec", {})
        selector = {
            "Service": lambda spec=spec: spec["selector"],
            "Deployment": lambda spec=spec: spec["selector"]["matchLabels"],
            "PodDisruptionBudget": lambda spec=spec: spec["selector"]["matchLabels"],
            "NetworkPolicy": lambda spec=spec: spec["podSelector"]["matchLabels"],
            "PodMonitor": lambda spec=spec: spec["selector"]["matchLabels"],
        }.get(document["kind"])
        if selector is not None:
            assert selector().items() <= labels.items(), document["kind"]


def test_ports_agree_between_settings_container_services_and_probes(rendered, serving):
    everything = rendered(serving)
    settings, container = everything.settings(), everything.container()
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports["grpc"] == settings["port"]
    assert ports["http"] == settings["http_port"]
    for document in everything.documents:
        if document["kind"] == "Service":
            assert all(port["targetPort"] in ports for port in document["spec"]["ports"])
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        for handler in ("grpc", "httpGet"):
            if handler in container[probe]:
                assert container[probe][handler]["port"] in {*ports, *ports.values()}


def test_the_grace_period_follows_from_the_deadline_cap(rendered, serving):
    everything = rendered(serving)
    settings = everything.settings()
    sleep_s = everything.container()["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert settings["drain_timeout_s"] >= settings["max_deadline_ms"] / 1000
    assert everything.pod()["terminationGracePeriodSeconds"] >= (
        sleep_s + settings["drain_delay_s"] + settings["drain_timeout_s"] + 5
    )


def test_startup_asks_for_readiness_and_gives_engine_builds_their_time(rendered):
    probe = rendered("overlays/prod-gpu").container()["startupProbe"]
    assert probe["grpc"]["service"] == "readiness"
    allowed_s = probe["failureThreshold"] * probe["periodSeconds"]
    assert allowed_s >= 600
    assert rendered("overlays/prod-gpu").one("Deployment")["spec"]["progressDeadlineSeconds"] > allowed_s


def test_one_service_is_headless_and_one_is_not(rendered):
    services = {d["metadata"]["name"]: d["spec"] for d in rendered("base").documents if d["kind"] == "Service"}
    assert services["convoy-headless"]["clusterIP"] == "None"
    assert "clusterIP" not in services["convoy"]


def test_the_service_reaches_nothing(rendered, serving):
    policy = rendered(serving).one("NetworkPolicy")["spec"]
    assert "Egress" in policy["policyTypes"]
    assert not policy.get("egress")


@pytest.mark.parametrize("overlay_name", ["prod-cpu", "prod-gpu"])
def test_the_autoscaler_alone_decides_on_replicas_in_production(rendered, overlay_name):
    everything = rendered(f"overlays/{overlay_name}")
    assert "replicas" not in everything.one("Deployment")["spec"]
    assert everything.one("HorizontalPodAutoscaler")["spec"]["minReplicas"] >= 2


def test_gpu_pods_take_whole_gpus_and_tolerate_the_taint(rendered):
    everything = rendered("overlays/prod-gpu")
    resources = everything.container()["resources"]
    assert resources["limits"]["nvidia.com/gpu"] == resources["requests"]["nvidia.com/gpu"] == "1"
    assert everything.pod()["tolerations"][0]["key"] == "nvidia.com/gpu"


def test_a_changed_settings_file_is_a_new_revision(rendered):
    name = rendered("base").one("ConfigMap", "convoy-settings")["metadata"]["name"]
    assert name != "convoy-settings"
    volumes = {volume["name"]: volume for volume in rendered("base").pod()["volumes"]}
    assert volumes["settings"]["configMap"]["name"] == name
