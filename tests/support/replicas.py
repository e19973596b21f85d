"""Runs containers of rendered manifests as processes, on free ports of 127.0.0.1, and puts load on them."""

import asyncio
import os
import re
import signal
import sys
import time
import urllib.request
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import grpc
import toys
import yaml
from convoy.v1 import image_classifier_pb2 as pb
from convoy.v1 import image_classifier_pb2_grpc as pb_grpc
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from toys import grey_levels, grey_png

BIN = Path(sys.executable).parent
START_S = 60
SERVING = health_pb2.HealthCheckResponse.SERVING


def mapped(text, paths):
    """A string of the manifest with the container's paths replaced by this machine's: at once, the longest first."""
    known = "|".join(re.escape(inside) for inside in sorted(paths, key=len, reverse=True))
    return re.sub(known, lambda match: str(paths[match.group()]), text)


def container_environment(container, paths, fields=None):
    """Exactly what the manifest declares, and a PATH that finds the commands of the image.

    `fields`: values of what is declared as a field of the pod.
    """
    declared = {
        variable["name"]: mapped(variable["value"], paths) if "value" in variable else fields[variable["name"]]
        for variable in container["env"]
    }
    return {"PATH": f"{BIN}:{os.defpath}", **declared}


def container_command(container, paths, fields=None):
    """The container's command and arguments, with `$(NAME)` filled in as Kubernetes does."""
    parts = [*container["command"], *container.get("args", ())]
    filled = [re.sub(r"\$\((\w+)\)", lambda match: fields[match.group(1)], part) for part in parts]
    return [mapped(part, paths) for part in filled]


class Replica(toys.Followed):
    """The service's container of a rendered Deployment, as a process.

    Args:
        rendered: the manifests.
        repository: stands for /models.
        folder: for everything else the container mounts.
        port, http_port: 0 picks a free one.
        secrets: what stands for /etc/convoy-tls.
        environment: in place of the manifest's, where a test cannot wait as long.
    """

    def __init__(self, rendered, repository, folder, port=0, http_port=0, secrets=None, environment=None):
        self.container = rendered.container()
        paths = {"/models": repository, "/etc/convoy-tls": secrets or folder / "secrets"}
        for inside in ("/etc/convoy", "/var/cache/convoy", "/tmp"):
            paths[inside] = folder / inside.lstrip("/")
            paths[inside].mkdir(parents=True, exist_ok=True)
        settings = yaml.safe_load(rendered.one("ConfigMap", "convoy-settings")["data"]["convoy.yaml"])
        settings |= {"host": "127.0.0.1", "port": port, "http_port": http_port}
        settings = {name: mapped(v, paths) if isinstance(v, str) else v for name, v in settings.items()}
        (paths["/etc/convoy"] / "convoy.yaml").write_text(yaml.safe_dump(settings))
        declared = container_environment(self.container, paths) | (environment or {})
        super().__init__(container_command(self.container, paths), env=declared, cwd=folder)

    def ready(self):
        """Waits for the end of the start; its addresses are known then."""
        assert self._ready.wait(START_S), "neither ready nor ended: " + self.log
        assert self._report is not None, "the service did not start: " + self.log
        return self

    @property
    def log(self):
        return "".join(self.lines)

    @property
    def address(self):
        return self._report["grpc"]

    @property
    def port(self):
        return int(self.address.rpartition(":")[2])

    @property
    def http(self):
        return f"http://{self._report['http']}"

    def get(self, path):
        """A page of the HTTP port."""
        with urllib.request.urlopen(self.http + path, timeout=10) as reply:
            return reply.read().decode()

    def probe(self, name):
        """Does what the kubelet does for a probe of the container; True is success."""
        probe = self.container[f"{name}Probe"]
        timeout_s = probe["timeoutSeconds"]
        if "httpGet" in probe:
            with urllib.request.urlopen(self.http + probe["httpGet"]["path"], timeout=timeout_s) as reply:
                return 200 <= reply.status < 400
        with grpc.insecure_channel(self.address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            request = health_pb2.HealthCheckRequest(service=probe["grpc"]["service"])
            return health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout_s).status == SERVING

    def terminate(self):
        """What the kubelet sends after preStop."""
        self._process.send_signal(signal.SIGTERM)

    def ended(self, timeout_s):
        """Exit code and seconds waited."""
        began = time.monotonic()
        code = self._process.wait(timeout_s)
        self._reader.join(timeout_s)
        return code, time.monotonic() - began


@contextmanager
def replica(rendered, repository, folder, **options):
    """A replica that is ready; killed at the end if it has not ended."""
    process = Replica(rendered, repository, folder, **options)
    try:
        yield process.ready()
    finally:
        process.kill()


class Load:
    """Closed-loop callers of the toy model, who check that each answer belongs to their own image.

    Args:
        channel: to whom.
        callers: calls in flight.
        images: in each call.

    Attributes:
        outcomes: calls by status code; an answer for another image counts as WRONG.
        failures: what those that failed were told.
    """

    def __init__(self, channel, callers=8, images=1, timeout_s=10.0):
        self.outcomes = Counter()
        self.failures = set()
        self._stub = pb_grpc.ImageClassifierStub(channel)
        self._callers = callers
        self._images = images
        self._timeout_s = timeout_s
        self._leave = asyncio.Event()
        self._tasks = []
        self._answered = asyncio.Condition()

    async def __aenter__(self):
        self._tasks = [asyncio.create_task(self._call(index)) for index in range(self._callers)]
        return self

    async def __aexit__(self, *error):
        await self.leave()

    async def leave(self):
        """Callers end after the call that they are in."""
        self._leave.set()
        await asyncio.gather(*self._tasks)

    async def answered(self, calls):
        """Waits for this many more calls to end."""
        goal = self.outcomes.total() + calls
        async with asyncio.timeout(60), self._answered:
            await self._answered.wait_for(lambda: self.outcomes.total() >= goal)

    async def overloaded(self):
        """Waits until some calls have been answered and some refused."""
        async with asyncio.timeout(60), self._answered:
            await self._answered.wait_for(lambda: self.outcomes["OK"] and self.outcomes["UNAVAILABLE"])

    async def _call(self, index):
        levels = grey_levels(64)
        while not self._leave.is_set():
            level, expected = levels[index % len(levels)]
            index += self._callers
            request = pb.ClassifyRequest(model="grey", images=[grey_png(level)] * self._images, top_k=1)
            try:
                reply = await self._stub.Classify(request, timeout=self._timeout_s, wait_for_ready=True)
                right = all(result.classification.classes[0].index == expected for result in reply.results)
                outcome = "OK" if right else "WRONG"
            except aio.AioRpcError as error:
                outcome = error.code().name
                self.failures.add(error.details())
            async with self._answered:
                self.outcomes[outcome] += 1
                self._answered.notify_all()
