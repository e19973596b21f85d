"""Two replicas behind haproxy, and two that a client balances over by itself: evenly, and through a rolling restart."""

import asyncio
import json
import re
import subprocess
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
from grpc import aio
from ports import free_port
from replicas import Load, Replica
from toys import write_version

HAPROXY = Path(__file__).resolve().parents[2] / "deploy" / "haproxy" / "haproxy.cfg"

# As docs/deploy.md gives it to users.
SERVICE_CONFIG = json.dumps(
    {"loadBalancingConfig": [{"round_robin": {}}], "healthCheckConfig": {"serviceName": "readiness"}}
)


class Pair:
    """Two replicas on ports of their own, which survive a restart."""

    def __init__(self, rendered, repository, folder):
        self._make = lambda index, http_port: Replica(
            rendered("overlays/prod-cpu"), repository, folder / str(index), port=self.ports[index], http_port=http_port
        )
        self.ports = [free_port(), free_port()]
        self.http_ports = [free_port(), free_port()]
        for index in (0, 1):
            (folder / str(index)).mkdir()
        self._replicas = []
        for index in (0, 1):
            self._replicas.append(self._make(index, self.http_ports[index]))

    def ready(self):
        for one in self._replicas:
            one.ready()

    def answered(self):
        """Classify calls that each of the running replicas has answered."""
        pattern = r'^grpc_server_handled_total\{.*grpc_code="OK".*grpc_method="Classify".*\} (\S+)$'
        counts = [re.search(pattern, one.get("/metrics"), re.MULTILINE) for one in self._replicas]
        return [float(count.group(1)) if count else 0.0 for count in counts]

    async def restart(self, index, load):
        """SIGTERM, the end, a successor on the same port; returns when it has calls to answer again."""
        old = self._replicas[index]
        old.terminate()
        code, _ = await asyncio.to_thread(old.ended, 60)
        assert code == 0, old.log
        self._replicas[index] = self._make(index, self.http_ports[index])
        await asyncio.to_thread(self._replicas[index].ready)
        async with asyncio.timeout(30):
            while (await asyncio.to_thread(self.answered))[index] < 50:
                await load.answered(50)

    def kill(self):
        for one in self._replicas:
            one.kill()


@pytest.fixture
def pair(rendered, tmp_path):
    write_version(tmp_path / "models")
    both = Pair(rendered, tmp_path / "models", tmp_path)
    try:
        both.ready()
        yield both
    finally:
        both.kill()


@contextmanager
def haproxy(program, pair):
    """The balancer of deploy/haproxy before the pair; yields its address."""
    address = f"127.0.0.1:{free_port()}"
    addresses = {
        "CONVOY_BIND": address,
        "CONVOY_A": f"127.0.0.1:{pair.ports[0]}",
        "CONVOY_A_HTTP": str(pair.http_ports[0]),
        "CONVOY_B": f"127.0.0.1:{pair.ports[1]}",
        "CONVOY_B_HTTP": str(pair.http_ports[1]),
    }
    process = subprocess.Popen([program, "-db", "-f", str(HAPROXY)], env=addresses, stderr=subprocess.PIPE, text=True)
    try:
        yield address
    finally:
        process.terminate()
        _, log = process.communicate(timeout=30)
    assert "ALERT" not in log, log  # it never found itself without a replica


@asynccontextmanager
async def through(balancer, tool, pair):
    """A channel that ends at both replicas."""
    if balancer == "haproxy":
        with haproxy(tool("haproxy"), pair) as address:
            async with aio.insecure_channel(address) as channel:
                yield channel
    else:
        target = "ipv4:" + ",".join(f"127.0.0.1:{port}" for port in pair.ports)
        options = [
            ("grpc.service_config", SERVICE_CONFIG),
            # The successor of a replica is found within a second; the default grows to minutes.
            ("grpc.max_reconnect_backoff_ms", 1000),
        ]
        async with aio.insecure_channel(target, options=options) as channel:
            yield channel


@pytest.mark.parametrize("balancer", ["haproxy", "round_robin"])
async def test_load_is_even_and_a_rolling_restart_fails_no_call(tool, pair, balancer):
    async with through(balancer, tool, pair) as channel, Load(channel) as load:
        await load.answered(100)  # both connections stand
        before = await asyncio.to_thread(pair.answered)
        await load.answered(1000)
        after = await asyncio.to_thread(pair.answered)
        shares = [(b - a) / (sum(after) - sum(before)) for a, b in zip(before, after, strict=True)]
        assert shares == pytest.approx([0.5, 0.5], rel=0.1)

        for index in (0, 1):
            await pair.restart(index, load)
        await load.leave()
        assert load.outcomes.keys() == {"OK"}, load.failures
