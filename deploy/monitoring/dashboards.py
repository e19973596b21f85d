"""The two Grafana dashboards as code: what to show, from which expression, in which unit.

    python deploy/monitoring/dashboards.py            writes components/monitoring/dashboards/*.json
    python deploy/monitoring/dashboards.py --check    fails if they differ from what this writes

Panels are laid out in rows from left to right. Every expression is executed against a real Prometheus by the tests.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "components" / "monitoring" / "dashboards"

WIDTH = 24  # columns of Grafana's grid
SERVICE = 'namespace=~"$namespace", job="convoy"'
MODEL = f'{SERVICE}, model=~"$model"'
CALLS = f'{SERVICE}, grpc_service="convoy.v1.ImageClassifier"'
CLASSIFY = f'{CALLS}, grpc_method="Classify"'


@dataclass(frozen=True)
class Panel:
    """One picture.

    `queries`: legend to PromQL. `unit`: Grafana's name of it. `kind`: timeseries, stat or table.
    `width`: of 24 columns. `what`: how to read it. `red_above`, `red_below`: from where on it is drawn in red.
    """

    title: str
    queries: dict[str, str]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    what: str = ""
    red_above: float | None = None
    red_below: float | None = None
    stacked: bool = False


Row = tuple[str, list[Panel]]


def quantiles(metric: str, selector: str, by: str = "") -> dict[str, str]:
    """The median and the tail of a histogram."""
    names = f"le, {by}" if by else "le"
    legend = f" {{{{{by}}}}}" if by else ""
    return {
        f"p{round(q * 100)}{legend}": (
            f"histogram_quantile({q}, sum by ({names}) (rate({metric}_bucket{{{selector}}}[$__rate_interval])))"
        )
        for q in (0.5, 0.95, 0.99)
    }


def rate(metric: str, selector: str, by: str) -> str:
    """Events per second."""
    return f"sum by ({by}) (rate({metric}{{{selector}}}[$__rate_interval]))"


def mean(metric: str, selector: str, by: str) -> str:
    """Mean of a histogram: sum over sum."""
    return f"{rate(f'{metric}_sum', selector, by)} / {rate(f'{metric}_count', selector, by)}"


OPERATOR: list[Row] = [
    (
        "Is it well?",
        [
            Panel(
                "Calls answered without a fault, 1 h",
                {"": '1 - convoy:call_errors:ratio_rate1h{namespace=~"$namespace"}'},
                "percentunit",
                "stat",
                6,
                "The objective is 99.9% over 30 days.",
                red_below=0.999,
            ),
            Panel(
                "Calls within 500 ms, 1 h",
                {"": '1 - convoy:slow_calls:ratio_rate1h{namespace=~"$namespace"}'},
                "percentunit",
                "stat",
                6,
                "The objective is 99% over 30 days.",
                red_below=0.99,
            ),
            Panel("Replicas ready", {"": f"sum(convoy_ready{{{SERVICE}}})"}, kind="stat", width=4, red_below=1),
            Panel(
                "Fullest replica",
                {"": 'max(convoy:saturation:ratio{namespace=~"$namespace"})'},
                "percentunit",
                "stat",
                4,
                "Pending images or bytes over capacity. One model alone is refused from half on.",
                red_above=0.4,
            ),
            Panel(
                "Canaries failing",
                {"": f"count(convoy_canary_ok{{{SERVICE}}} == 0) or vector(0)"},
                kind="stat",
                width=4,
                red_above=1,
            ),
        ],
    ),
    (
        "Error budgets",
        [
            Panel(
                "Burn rate: faults",
                {
                    "1 h": 'convoy:call_errors:ratio_rate1h{namespace=~"$namespace"} / 0.001',
                    "6 h": 'convoy:call_errors:ratio_rate6h{namespace=~"$namespace"} / 0.001',
                    "3 d": 'convoy:call_errors:ratio_rate3d{namespace=~"$namespace"} / 0.001',
                },
                width=12,
                what="1 uses up the budget of 30 days in 30 days; 14.4 over an hour wakes somebody.",
            ),
            Panel(
                "Burn rate: slowness",
                {
                    "1 h": 'convoy:slow_calls:ratio_rate1h{namespace=~"$namespace"} / 0.01',
                    "6 h": 'convoy:slow_calls:ratio_rate6h{namespace=~"$namespace"} / 0.01',
                    "3 d": 'convoy:slow_calls:ratio_rate3d{namespace=~"$namespace"} / 0.01',
                },
                width=12,
                what="1 uses up the budget of 30 days in 30 days; 14.4 over an hour wakes somebody.",
            ),
        ],
    ),
    (
        "Calls",
        [
            Panel(
                "Calls by method",
                {"{{grpc_method}}": rate("grpc_server_started_total", CALLS, "grpc_method")},
                "reqps",
            ),
            Panel(
                "Ends by status",
                {"{{grpc_code}}": rate("grpc_server_handled_total", CALLS, "grpc_code")},
                "reqps",
                stacked=True,
            ),
            Panel("Time to answer a Classify", quantiles("grpc_server_handling_seconds", CLASSIFY), "s"),
        ],
    ),
    (
        "Load",
        [
            Panel(
                "Pending images",
                {
                    "{{pod}}": f"convoy_pending_images{{{SERVICE}}}",
                    "capacity": f"max(convoy_pending_images_limit{{{SERVICE}}})",
                },
                what="Admitted and not yet answered. One model may hold as many as are left free: alone, half.",
            ),
            Panel(
                "Pending bytes",
                {
                    "{{pod}}": f"convoy_pending_bytes{{{SERVICE}}}",
                    "capacity": f"max(convoy_pending_bytes_limit{{{SERVICE}}})",
                },
                "bytes",
            ),
            Panel(
                "Refused, by reason",
                {"{{reason}}": rate("convoy_shed_total", SERVICE, "reason")},
                "reqps",
                stacked=True,
            ),
            Panel(
                "Dropped from a queue",
                {"{{stage}}: {{reason}}": rate("convoy_dropped_total", SERVICE, "stage, reason")},
                "reqps",
                what="Expired or given up by the caller before they ran: work that was saved.",
            ),
            Panel(
                "Ended too late",
                {"{{stage}}": rate("convoy_late_total", SERVICE, "stage")},
                "reqps",
                what="Ran, and missed their deadline: work that was wasted.",
            ),
            Panel(
                "Waiting images",
                {
                    "{{model}}": f"sum by (model) (convoy_queue_images{{{SERVICE}}})",
                    "decoder": f"sum(convoy_decode_queue_images{{{SERVICE}}})",
                },
            ),
        ],
    ),
    (
        "Processes",
        [
            Panel(
                "CPU",
                {"{{pod}}": f"rate(process_cpu_seconds_total{{{SERVICE}}}[$__rate_interval])"},
                "none",
                what="Cores in use.",
            ),
            Panel("Memory", {"{{pod}}": f"process_resident_memory_bytes{{{SERVICE}}}"}, "bytes"),
            Panel(
                "Event loop's lag",
                {"{{pod}}": f"convoy_event_loop_lag_seconds{{{SERVICE}}}"},
                "s",
                what="The longest of 30 s. Above 50 ms something blocks the loop; liveness fails after ten seconds.",
                red_above=0.05,
            ),
            Panel(
                "Versions that cannot be loaded",
                {"{{model}}": f"max by (model) (convoy_model_versions_lacking{{{SERVICE}}})"},
                what="The most of a pod. They should serve, and do not.",
                red_above=1,
            ),
            Panel(
                "Open files",
                {"{{pod}}": f"process_open_fds{{{SERVICE}}} / process_max_fds{{{SERVICE}}}"},
                "percentunit",
                red_above=0.8,
            ),
            Panel(
                "Certificate ends in",
                {"{{pod}}": f"clamp_min(convoy_tls_certificate_expiry_timestamp_seconds{{{SERVICE}}} - time(), 0)"},
                "s",
                what="0 also where there is no TLS.",
            ),
        ],
    ),
]

MODELS: list[Row] = [
    (
        "What is served",
        [
            Panel(
                "Versions",
                {"": f"count by (model, version, digest, provider, variant) (convoy_model_info{{{MODEL}}})"},
                kind="table",
                width=12,
                what="How many replicas serve which variant of which version on which provider.",
            ),
            Panel(
                "Canary",
                {"{{model}}/{{version}}": f"min by (model, version) (convoy_canary_ok{{{MODEL}}})"},
                kind="stat",
                width=6,
                what="1: the canary images get the probabilities that were measured at export.",
                red_below=1,
            ),
            Panel(
                "Time to load",
                {"{{model}}/{{version}}": f"max by (model, version) (convoy_model_load_seconds{{{MODEL}}})"},
                "s",
                "stat",
                6,
            ),
        ],
    ),
    (
        "Traffic",
        [
            Panel(
                "Images by outcome",
                {"{{model}}: {{outcome}}": rate("convoy_images_total", MODEL, "model, outcome")},
                "ops",
            ),
            Panel(
                "Images that could not be classified",
                {"{{reason}} {{format}}": rate("convoy_image_errors_total", SERVICE, "reason, format")},
                "ops",
                what="Of all models: a bad image is found out before a model sees it.",
            ),
            Panel(
                "Images in a batch",
                {"{{model}}": mean("convoy_batch_size", MODEL, "model")},
                what="Grows with load: batches form while the executor is busy. Near 1 under load: look at the queue.",
            ),
        ],
    ),
    (
        "Time",
        [
            Panel(
                "Mean time by stage",
                {"{{model}}: {{stage}}": mean("convoy_stage_duration_seconds", MODEL, "model, stage")},
                "s",
                stacked=True,
            ),
            Panel(
                "Wait for a batch",
                quantiles("convoy_stage_duration_seconds", f'{MODEL}, stage="queue"', "model"),
                "s",
            ),
            Panel(
                "Inference of a request",
                quantiles("convoy_stage_duration_seconds", f'{MODEL}, stage="infer"', "model"),
                "s",
            ),
            Panel("A batch on its executor", quantiles("convoy_batch_duration_seconds", MODEL, "model"), "s"),
            Panel(
                "Executor's use",
                {
                    "{{model}}": rate("convoy_batch_duration_seconds_sum", MODEL, "model")
                    + f" / count by (model) (convoy_queue_images{{{MODEL}}})"
                },
                "percentunit",
                what="Executors busy for each replica. Near their number the model is at its capacity.",
            ),
            Panel(
                "Decoding",
                quantiles("convoy_stage_duration_seconds", f'{MODEL}, stage="decode"', "model"),
                "s",
            ),
        ],
    ),
    (
        "Versions compared",
        [
            Panel(
                "Time of a request by version",
                {
                    "{{model}}/{{version}} ({{role}})": mean(
                        "convoy_version_duration_seconds", MODEL, "model, version, role"
                    )
                },
                "s",
                width=12,
                what="While a new version takes part of the traffic, or shadows it.",
            ),
            Panel(
                "Canary's difference",
                {"{{model}}/{{version}}": f"max by (model, version) (convoy_canary_difference{{{MODEL}}})"},
                width=12,
                what="Largest difference of a probability between this device and the export.",
            ),
        ],
    ),
]


def panel_json(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    """A panel as Grafana stores it."""
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    if panel.red_above is not None:
        steps.append({"color": "red", "value": panel.red_above})
    if panel.red_below is not None:
        steps = [{"color": "red", "value": None}, {"color": "green", "value": panel.red_below}]
    custom = {"stacking": {"mode": "normal"}, "fillOpacity": 20} if panel.stacked else {}
    found = {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.what,
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": 4 if panel.kind == "stat" else 8},
        "fieldConfig": {
            "defaults": {"unit": panel.unit, "thresholds": {"mode": "absolute", "steps": steps}, "custom": custom},
            "overrides": [],
        },
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "expr": expression,
                "legendFormat": legend or "__auto",
                "instant": panel.kind == "table",
                "format": "table" if panel.kind == "table" else "time_series",
            }
            for index, (legend, expression) in enumerate(panel.queries.items())
        ],
    }
    if panel.kind == "table":
        found["transformations"] = [
            {
                "id": "organize",
                "options": {"excludeByName": {"Time": True}, "renameByName": {"Value": "replicas"}},
            }
        ]
    return found


def variable(name: str, query: str) -> dict[str, Any]:
    """A choice of label values at the top of the dashboard."""
    return {
        "name": name,
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": {"query": query, "refId": name},
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
        "refresh": 2,
        "sort": 1,
    }


def dashboard(uid: str, title: str, what: str, rows: list[Row], variables: list[dict[str, Any]]) -> dict[str, Any]:
    """A dashboard as Grafana imports it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for name, row in rows:
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": name,
                "collapsed": False,
                "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1},
                "panels": [],
            }
        )
        y += 1
        x = height = 0
        for panel in row:
            if x + panel.width > WIDTH:
                x, y, height = 0, y + height, 0
            panels.append(panel_json(panel, len(panels) + 1, x, y))
            x, height = x + panel.width, max(height, panels[-1]["gridPos"]["h"])
        y += height
    return {
        "uid": uid,
        "title": title,
        "description": what,
        "tags": ["convoy"],
        "schemaVersion": 39,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "links": [
            {"type": "dashboards", "title": "Convoy", "tags": ["convoy"], "asDropdown": True, "keepTime": True},
        ],
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"},
                *variables,
            ]
        },
        "annotations": {"list": []},
        "panels": panels,
    }


def dashboards() -> dict[str, str]:
    """Text of each file, by name."""
    namespace = variable("namespace", 'label_values(convoy_ready{job="convoy"}, namespace)')
    model = variable("model", 'label_values(convoy_model_info{job="convoy", namespace=~"$namespace"}, model)')
    made = (
        dashboard(
            "convoy-operator", "Convoy: operator", "Is it well, and where is it full?", OPERATOR, variables=[namespace]
        ),
        dashboard(
            "convoy-models",
            "Convoy: models",
            "What is served, to how many images, how fast.",
            MODELS,
            variables=[namespace, model],
        ),
    )
    return {f"{board['uid']}.json": json.dumps(board, indent=1, ensure_ascii=False) + "\n" for board in made}


def main() -> int:
    """Writes the files, or compares them."""
    stale = [
        name
        for name, text in dashboards().items()
        if not (FOLDER / name).is_file() or (FOLDER / name).read_text(encoding="utf-8") != text
    ]
    if "--check" in sys.argv[1:]:
        if stale:
            sys.stderr.write(f"{', '.join(stale)}: not what {Path(__file__).name} writes; run it\n")
        return 1 if stale else 0
    for name in stale:
        (FOLDER / name).write_text(dashboards()[name], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
