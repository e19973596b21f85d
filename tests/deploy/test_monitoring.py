"""Rules, alerts, runbooks and dashboards, against promtool and a real Prometheus that scrapes a running service."""

import asyncio
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import yaml
from convoy.v1 import image_classifier_pb2 as pb
from convoy.v1 import image_classifier_pb2_grpc as pb_grpc
from grpc import aio
from ports import free_port
from replicas import Load, replica
from toys import grey_png, write_version

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MONITORED = "components/monitoring"
ALERT_TESTS = ("alerts.yaml", "alerts_of_days.yaml")


def groups_of(manifests):
    return manifests.one("PrometheusRule")["spec"]["groups"]


def alerts_of(manifests):
    return [rule for group in groups_of(manifests) for rule in group["rules"] if "alert" in rule]


@pytest.fixture(scope="module")
def rules(rendered, tmp_path_factory):
    """The rules of the rendered PrometheusRule, as Prometheus reads them."""
    path = tmp_path_factory.mktemp("rules") / "rules.yaml"
    path.write_text(yaml.safe_dump({"groups": groups_of(rendered(MONITORED))}))
    return path


def promtool(tool, *arguments, **options):
    return subprocess.run(
        [tool("promtool"), *map(str, arguments)], capture_output=True, text=True, timeout=100, check=False, **options
    )


def test_rules_are_correct(tool, rules):
    done = promtool(tool, "check", "rules", "--lint-fatal", rules)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ALERT_TESTS)
def test_alerts_fire_when_they_should_and_not_otherwise(tool, rules, name):
    cases = rules.parent / name
    shutil.copy(HERE / name, cases)
    done = promtool(tool, "test", "rules", cases)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested_both_ways(rendered):
    fires, silent = set(), set()
    for name in ALERT_TESTS:
        for case in yaml.safe_load((HERE / name).read_text())["tests"]:
            for check in case.get("alert_rule_test", ()):
                (fires if check.get("exp_alerts") else silent).add(check["alertname"])
    names = {alert["alert"] for alert in alerts_of(rendered(MONITORED))}
    assert names == fires == silent


def test_every_alert_has_a_runbook_that_names_it(rendered):
    pages = {}
    for alert in alerts_of(rendered(MONITORED)):
        pages.setdefault(alert["annotations"]["runbook"], []).append(alert["alert"])
    assert {ROOT / page for page in pages} == set((ROOT / "docs" / "runbooks").glob("*.md"))
    for page, names in pages.items():
        text = (ROOT / page).read_text()
        assert all(name in text for name in names), page
        # Somebody who was just woken needs: what it means, how to look, what to do.
        assert re.findall(r"^## (.+)$", text, re.MULTILINE) == ["Meaning", "Look", "Act"], page


def test_every_runbook_query_is_one_that_promtool_understands(tool, tmp_path):
    """Fenced `promql` blocks of the runbooks, as recording rules."""
    queries = [
        query
        for page in sorted((ROOT / "docs" / "runbooks").glob("*.md"))
        for query in re.findall(r"^```promql\n(.+?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    ]
    assert queries
    rules = [{"record": f"runbook:query:{index}", "expr": query} for index, query in enumerate(queries)]
    path = tmp_path / "queries.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "runbooks", "rules": rules}]}))
    done = promtool(tool, "check", "rules", path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_dashboards_are_what_their_code_writes():
    program = ROOT / "deploy" / "monitoring" / "dashboards.py"
    done = subprocess.run([sys.executable, program, "--check"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def dashboards(manifests):
    files = manifests.one("ConfigMap", "convoy-dashboards")["data"]
    assert len(files) == 2
    return [json.loads(text) for text in files.values()]


def panels(manifests):
    """Panels that show something."""
    return [panel for board in dashboards(manifests) for panel in board["panels"] if panel["type"] != "row"]


def test_dashboard_panels_fill_their_rows_without_overlapping(rendered):
    for board in dashboards(rendered(MONITORED)):
        taken = set()
        for panel in board["panels"]:
            at = panel["gridPos"]
            cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
            assert at["x"] + at["w"] <= 24
            assert not cells & taken, panel["title"]
            taken |= cells
        assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


class Prometheus:
    """A real one, that scrapes every second and is asked over its HTTP API."""

    def __init__(self, program, folder, configuration):
        path = folder / "prometheus.yml"
        path.write_text(yaml.safe_dump(configuration))
        self._url = f"http://127.0.0.1:{free_port()}"
        self._lines = []
        self._ready = threading.Event()
        self._process = subprocess.Popen(
            [
                program,
                f"--config.file={path}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={self._url.removeprefix('http://')}",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._follow, daemon=True)
        self._reader.start()

    def ready(self):
        assert self._ready.wait(60), "".join(self._lines)
        assert self._process.poll() is None, "".join(self._lines)
        return self

    def api(self, path, **parameters):
        with urllib.request.urlopen(
            f"{self._url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}", timeout=20
        ) as reply:
            answer = json.load(reply)
        assert answer["status"] == "success", answer
        assert not answer.get("warnings"), answer
        return answer["data"]

    def query(self, expression):
        """Samples of an instant query; a scalar counts as one."""
        data = self.api("query", query=expression)
        return [data["result"]] if data["resultType"] == "scalar" else data["result"]

    def until(self, expression, timeout_s=60):
        """Waits until an expression has a sample."""
        deadline = time.monotonic() + timeout_s
        pause = threading.Event()
        while not self.query(expression):
            assert time.monotonic() < deadline, f"never: {expression}"
            pause.wait(0.25)

    def stop(self):
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(30)
        finally:
            self._process.kill()
            self._process.wait()
            self._reader.join(30)

    def _follow(self):
        with self._process.stderr as stream:
            for line in stream:
                self._lines.append(line)
                if "Server is ready to receive web requests" in line:
                    self._ready.set()
        self._ready.set()


def scraping(manifests, rules_path, http):
    """What the operator makes of the PodMonitor, for the one pod there is. Everything happens each second."""
    monitor = manifests.one("PodMonitor")["spec"]
    labels = manifests.one("Deployment")["spec"]["template"]["metadata"]["labels"]
    (endpoint,) = monitor["podMetricsEndpoints"]
    assert endpoint["port"] in {port["name"] for port in manifests.container()["ports"]}
    copied = {re.sub(r"\W", "_", name): labels[name] for name in monitor["podTargetLabels"]}
    return {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(rules_path)],
        "scrape_configs": [
            {
                "job_name": labels[monitor["jobLabel"]],
                "metrics_path": endpoint["path"],
                "static_configs": [
                    {
                        "targets": [http.removeprefix("http://")],
                        "labels": {"namespace": "shop", "pod": "convoy-0", **copied},
                    }
                ],
            }
        ],
    }


async def traffic(address):
    """Good calls, refused ones, a bad image; and then more of it while Prometheus looks."""
    async with aio.insecure_channel(address) as channel:
        stub = pb_grpc.ImageClassifierStub(channel)
        async with Load(channel, callers=32, images=64) as load:
            await load.overloaded()
        request = pb.ClassifyRequest(model="grey", images=[grey_png(0), b"no image"])
        reply = await stub.Classify(request, timeout=10)
        assert reply.results[1].WhichOneof("outcome") == "error"


@pytest.fixture(scope="module")
def watched(rendered, rules, tool, tmp_path_factory):
    """A service with traffic, and the Prometheus that scrapes it."""
    program = tool("prometheus")
    folder = tmp_path_factory.mktemp("watched")
    write_version(folder / "models")
    manifests = rendered(MONITORED)
    eager = yaml.safe_load(rules.read_text())
    for group in eager["groups"]:
        group["interval"] = "1s"
    rules_path = folder / "rules.yaml"
    rules_path.write_text(yaml.safe_dump(eager))
    with replica(manifests, folder / "models", folder) as pod:
        prometheus = Prometheus(program, folder, scraping(manifests, rules_path, pod.http))
        try:
            prometheus.ready().until('convoy_ready{job="convoy"} == 1')
            # Rates need a sample before the traffic and two after it.
            for _ in range(2):
                asyncio.run(traffic(pod.address))
                scrapes = prometheus.query("count_over_time(convoy_ready[1h])")[0]["value"][1]
                prometheus.until(f"count_over_time(convoy_ready[1h]) >= {scrapes} + 3")
            yield prometheus, pod
        finally:
            prometheus.stop()


def test_metrics_are_named_as_prometheus_wants_them(tool, watched):
    _, pod = watched
    done = promtool(tool, "check", "metrics", input=pod.get("/metrics"))
    assert done.returncode == 0, done.stderr


def test_prometheus_evaluates_every_rule(rendered, watched):
    prometheus, _ = watched
    found = [rule for group in prometheus.api("rules")["groups"] for rule in group["rules"]]
    assert len(found) == sum(len(group["rules"]) for group in groups_of(rendered(MONITORED)))
    assert {(rule["health"], rule.get("lastError", "")) for rule in found} == {("ok", "")}


def test_every_recorded_series_exists(rendered, watched):
    prometheus, _ = watched
    for group in groups_of(rendered(MONITORED)):
        for rule in group["rules"]:
            if "record" in rule:
                assert prometheus.query(rule["record"]), rule["record"]


def selectors(expression):
    """Every metric of an expression with its matchers, without those that ask for the abnormal."""
    for name, matchers in re.findall(r"([a-zA-Z_:][\w:]*)\{([^}]*)\}", expression):
        kept = [m for m in re.split(r",\s*(?=\w+[!=])", matchers) if re.match(r"(job|stage|grpc_service|le)\W", m)]
        yield f"{name}{{{', '.join(kept)}}}"


def test_alerts_ask_for_metrics_that_the_service_has(rendered, watched):
    prometheus, _ = watched
    for alert in alerts_of(rendered(MONITORED)):
        asked = [*selectors(alert["expr"]), *re.findall(r"convoy:[\w:]+", alert["expr"])]
        assert asked, alert["alert"]
        for selector in asked:
            assert prometheus.query(selector), f"{alert['alert']}: {selector}"


def test_alerts_about_causes_are_silent_on_a_healthy_service(rendered, watched):
    prometheus, _ = watched
    quiet = {
        "ConvoyCanaryFailing",
        "ConvoyWrongProvider",
        "ConvoyReloadFailed",
        "ConvoyRepositoryOutOfReach",
        "ConvoyCertificateExpiring",
        "ConvoyAbsent",
    }
    for alert in alerts_of(rendered(MONITORED)):
        if alert["alert"] in quiet:
            assert not prometheus.query(alert["expr"]), alert["alert"]


def substituted(expression):
    """An expression of a dashboard with Grafana's variables filled in."""
    for name, value in {"$__rate_interval": "1m", "$namespace": ".*", "$model": ".*"}.items():
        expression = expression.replace(name, value)
    assert "$" not in expression
    return expression


def test_every_expression_of_the_dashboards_has_data(rendered, watched):
    prometheus, _ = watched
    for panel in panels(rendered(MONITORED)):
        for target in panel["targets"]:
            found = prometheus.query(substituted(target["expr"]))
            assert found, f"{panel['title']}: {target['expr']}"
            for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
                assert all(label in sample["metric"] for sample in found), f"{panel['title']}: no label {label}"


def test_dashboard_variables_have_values(rendered, watched):
    prometheus, _ = watched
    for board in dashboards(rendered(MONITORED)):
        for variable in board["templating"]["list"]:
            if variable["type"] == "query":
                selector, label = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"]).groups()
                assert all(sample["metric"][label] for sample in prometheus.query(substituted(selector)))
                assert prometheus.query(substituted(selector))


def test_the_adapter_offers_the_metric_that_the_autoscaler_wants(rendered, watched):
    prometheus, _ = watched
    values = yaml.safe_load((ROOT / "deploy" / "monitoring" / "prometheus-adapter.yaml").read_text())
    (rule,) = values["rules"]["custom"]
    wanted = rendered(MONITORED).one("HorizontalPodAutoscaler")["spec"]["metrics"][-1]["pods"]["metric"]["name"]
    assert rule["name"]["as"] == wanted
    assert prometheus.query(rule["seriesQuery"])
    fillings = {"Series": "convoy:saturation:ratio", "LabelMatchers": 'namespace="shop"', "GroupBy": "pod"}
    query = re.sub(r"<<\.(\w+)>>", lambda match: fillings[match.group(1)], rule["metricsQuery"])
    assert [sample["metric"] for sample in prometheus.query(query)] == [{"pod": "convoy-0"}]
