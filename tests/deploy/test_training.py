"""The commands of the rendered training jobs, at work on real digits: interrupted, resumed, on two nodes, served."""

import shutil
import signal
import sqlite3
import subprocess
import time
from contextlib import closing
from pathlib import Path

import pytest
import yaml
from convoy.v1 import image_classifier_pb2 as pb
from convoy.v1 import image_classifier_pb2_grpc as pb_grpc
from grpc import insecure_channel
from ports import free_port
from replicas import container_command, container_environment, replica

from training.digits import write_digits

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"

# In place of the experiment in the ConfigMap, which wants photos and hours.
EXPERIMENT = {
    "name": "digits",
    "model": {"name": "lenet5"},
    "optimiser": {"learning_rate": 0.004},
    "loop": {"epochs": 6, "batch_size": 64, "precision": "float32"},
}


class Volumes:
    """What the pods of a job mount."""

    def __init__(self, folder):
        self.models = folder / "models"
        self.paths = {"/models": self.models}
        for inside in ("/data", "/runs", "/tmp", "/etc/convoy"):
            self.paths[inside] = folder / inside.lstrip("/")
            self.paths[inside].mkdir(parents=True)
        write_digits(self.paths["/data"])
        (self.paths["/etc/convoy"] / "experiment.yaml").write_text(yaml.safe_dump(EXPERIMENT))

    def start(self, manifests, index=None, endpoint=None, name="convoy-train", **secrets):
        """A pod of the job, as a process; its index and the address of the first one where there are several."""
        job = manifests.one("Job", name)
        (container,) = job["spec"]["template"]["spec"]["containers"]
        fields = {"JOB_NAME": name, "POD_IP": "127.0.0.1", **secrets}
        paths = self.paths | {f"{name}-0.{name}:29400": endpoint}
        environment = container_environment(container, paths, fields) | {"OMP_NUM_THREADS": "1"}
        if index is not None:
            environment["JOB_COMPLETION_INDEX"] = str(index)
        return subprocess.Popen(
            container_command(container, paths, fields),
            env=environment,
            cwd=self.paths["/tmp"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def runs(self):
        """Numbers of the runs that were begun."""
        return sorted(path.name for path in (self.paths["/runs"] / "convoy-train" / "digits").glob("[0-9]*"))


def finished(process):
    """Exit code and output."""
    try:
        output, _ = process.communicate(timeout=110)
    finally:
        process.kill()
        process.wait()
    return process.returncode, output


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    return Volumes(tmp_path_factory.mktemp("volumes"))


@pytest.fixture(scope="module")
def evicted(rendered, volumes):
    """Exit code of a pod of the Job that was told to go while it trained."""
    process = volumes.start(rendered("training/job"))
    for line in process.stdout:
        if line.startswith("epoch 2/"):
            process.send_signal(signal.SIGTERM)
            break
    return finished(process)


@pytest.fixture(scope="module")
def published(rendered, volumes, evicted):
    """The pod that takes over, and the repository it publishes into."""
    code, output = finished(volumes.start(rendered("training/job")))
    assert code == 0, output
    return volumes.models, output


def test_an_evicted_pod_leaves_a_checkpoint_and_its_end_is_not_held_against_the_job(rendered, volumes, evicted):
    code, output = evicted
    rules = rendered("training/job").one("Job", "convoy-train")["spec"]["podFailurePolicy"]["rules"]
    ignored = [rule["onExitCodes"]["values"] for rule in rules if "onExitCodes" in rule and rule["action"] == "Ignore"]
    assert [code] in ignored, output


def test_the_pod_that_takes_over_goes_on_and_publishes(volumes, published):
    repository, output = published
    assert volumes.runs() == ["1"]
    assert "epoch 1/6" not in output
    assert (repository / "digits" / "1" / "manifest.json").is_file()


def test_wrong_settings_fail_the_job_at_once(rendered, tmp_path):
    volumes = Volumes(tmp_path)
    (volumes.paths["/etc/convoy"] / "experiment.yaml").write_text("modle: {name: lenet5}\n")
    code, output = finished(volumes.start(rendered("training/job")))
    rules = rendered("training/job").one("Job", "convoy-train")["spec"]["podFailurePolicy"]["rules"]
    assert any(code in rule["onExitCodes"]["values"] for rule in rules if rule["action"] == "FailJob"), output


def test_two_nodes_train_together_and_the_running_service_takes_what_they_publish(
    rendered, volumes, published, tmp_path
):
    repository, _ = published
    image = next((volumes.paths["/data"] / "3").iterdir()).read_bytes()
    # The pod looks every 30 s; a test does not wait that long.
    quick = {"CONVOY_REPOSITORY_POLL_S": "0.5"}
    with (
        replica(rendered("components/model-pvc"), repository, tmp_path, environment=quick) as pod,
        insecure_channel(pod.address) as channel,
    ):
        stub = pb_grpc.ImageClassifierStub(channel)
        request = pb.ClassifyRequest(model="digits", images=[image], top_k=1)
        assert stub.Classify(request, timeout=10).version == 1

        # The run of the Job is done; the same name would go on with it, and a suffix makes another.
        (volumes.paths["/runs"] / "convoy-train").rename(volumes.paths["/runs"] / "convoy-train-before")
        endpoint = f"127.0.0.1:{free_port()}"
        nodes = [volumes.start(rendered("training/indexed-job"), index, endpoint) for index in (0, 1)]
        ends = [finished(node) for node in nodes]
        assert [code for code, _ in ends] == [0, 0], ends
        assert volumes.runs() == ["1"]

        reply = served(stub, request, 2)
        (best,) = reply.results[0].classification.classes
        assert best.label == "3"

        # As docs/deploy.md rolls back.
        (repository / "digits" / "2").rename(repository / "digits" / ".withdrawn-2")
        served(stub, request, 1)


def served(stub, request, version):
    """Waits until a version answers; every call until then is answered as well."""
    deadline = time.monotonic() + 30
    while (reply := stub.Classify(request, timeout=10)).version != version:
        assert time.monotonic() < deadline, f"version {version} is not served"
    return reply


def test_a_suffix_makes_another_training_whose_pods_find_each_other(render, tmp_path):
    shutil.copytree(DEPLOY / "training", tmp_path / "training")
    folder = tmp_path / "training" / "indexed-job"
    with (folder / "kustomization.yaml").open("a") as file:
        file.write('nameSuffix: "-2"\n')  # what `kustomize edit set namesuffix -- -2` does
    manifests = render(folder)
    job = manifests.one("Job", "convoy-train-2")
    assert manifests.one("Service", "convoy-train-2")
    assert job["spec"]["template"]["spec"]["subdomain"] == "convoy-train-2"
    # The volumes are the same.
    volumes = job["spec"]["template"]["spec"]["volumes"]
    claims = [volume["persistentVolumeClaim"]["claimName"] for volume in volumes if "persistentVolumeClaim" in volume]
    assert claims == ["convoy-data", "convoy-runs", "convoy-models"]


def argument(pod, flag):
    """Values of a flag of the pod's container."""
    return [part.partition("=")[2] for part in pod["containers"][0]["args"] if part.partition("=")[0] == flag]


def test_as_many_nodes_as_pods(rendered):
    job = rendered("training/indexed-job").one("Job", "convoy-train")["spec"]
    (nodes,) = argument(job["template"]["spec"], "--nnodes")
    assert job["completions"] == job["parallelism"] == int(nodes)
    assert job["completionMode"] == "Indexed"


def test_the_checkpoint_has_its_time_before_the_pod_is_killed(rendered):
    pod = rendered("training/indexed-job").one("Job", "convoy-train")["spec"]["template"]["spec"]
    (given,) = argument(pod, "--shutdown-timeout")
    assert int(given) < pod["terminationGracePeriodSeconds"]


def test_two_workers_of_the_tuning_job_share_one_study(rendered, tmp_path):
    volumes = Volumes(tmp_path)
    space = {"optimiser.learning_rate": {"low": 0.001, "high": 0.01, "log": True}}
    experiment = {**EXPERIMENT, "loop": EXPERIMENT["loop"] | {"epochs": 1}, "tune": {"trials": 4, "space": space}}
    (volumes.paths["/etc/convoy"] / "experiment.yaml").write_text(yaml.safe_dump(experiment))
    # In place of PostgreSQL, on which training's own tests run the same.
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    manifests = rendered("training/tune")
    workers = [volumes.start(manifests, name="convoy-tune", CONVOY_TUNE_STORAGE=storage) for _ in range(2)]
    ends = [finished(worker) for worker in workers]
    assert [code for code, _ in ends] == [0, 0], ends
    with closing(sqlite3.connect(tmp_path / "study.db")) as database:
        assert database.execute("select study_name from studies").fetchall() == [("convoy-tune",)]
        assert database.execute("select count(*) from trials where state = 'COMPLETE'").fetchone()[0] >= 1
        assert database.execute("select count(*) from trials").fetchone() == (4,)
    (result,) = (volumes.paths["/runs"] / "convoy-tune").rglob("convoy-tune.yaml")
    assert yaml.safe_load(result.read_text())["model"]["name"] == "lenet5"
