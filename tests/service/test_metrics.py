"""Names that dashboards rely on, labels that stay few, gauges that read at scrape time."""

import pytest
from prometheus_client import generate_latest

from service.metrics import Metrics


@pytest.fixture
def metrics():
    return Metrics()


def test_each_process_part_has_a_registry_of_its_own(metrics):
    metrics.images.labels("grey", "classified").inc()

    assert (
        Metrics().registry.get_sample_value("convoy_images_total", {"model": "grey", "outcome": "classified"}) is None
    )


def test_the_names_that_dashboards_rely_on_are_there(metrics):
    text = generate_latest(metrics.registry).decode()

    for name in (
        "grpc_server_started_total",
        "grpc_server_handled_total",
        "grpc_server_handling_seconds",
        "convoy_stage_duration_seconds",
        "convoy_batch_size",
        "convoy_queue_images",
        "convoy_pending_images",
        "convoy_shed_total",
        "convoy_dropped_total",
        "convoy_image_errors_total",
        "convoy_model_info",
        "convoy_model_load_failures_total",
        "convoy_canary_ok",
        "convoy_repository_reachable",
        "convoy_event_loop_lag_seconds",
        "convoy_ready",
    ):
        assert f"# HELP {name} " in text, name


def test_no_label_carries_what_a_client_chooses(metrics):
    allowed = {"model", "version", "stage", "reason", "outcome", "format", "digest", "provider", "role", "variant"}
    allowed |= {"grpc_type", "grpc_service", "grpc_method", "grpc_code"}
    ours = [family for family in metrics.registry.collect() if family.name.startswith(("convoy_", "grpc_"))]

    assert ours
    for family in ours:
        for sample in family.samples:
            assert set(sample.labels) - {"le", "quantile"} <= allowed, family.name


def test_a_watched_gauge_reads_its_value_when_it_is_scraped(metrics):
    waiting = [3]
    metrics.watch(metrics.pending_images, lambda: waiting[0])
    first = metrics.registry.get_sample_value("convoy_pending_images")
    waiting[0] = 7

    assert (first, metrics.registry.get_sample_value("convoy_pending_images")) == (3, 7)


def test_what_a_batcher_drops_is_counted_by_stage_and_reason(metrics):
    for reason in ("expired", "abandoned", "shed"):
        metrics.stage("decode").dropped(reason, 2)
        metrics.model("grey").dropped(reason, 3)
    metrics.model("grey").late(4)

    value = metrics.registry.get_sample_value
    for reason in ("expired", "abandoned", "shed"):
        assert value("convoy_dropped_total", {"stage": "decode", "reason": reason}) == 2
        assert value("convoy_dropped_total", {"stage": "infer", "reason": reason}) == 3
    assert value("convoy_late_total", {"stage": "infer"}) == 4


def test_batches_are_observed_by_model(metrics):
    metrics.model("grey").batch(8, 0.02)

    value = metrics.registry.get_sample_value
    assert value("convoy_batch_size_sum", {"model": "grey"}) == 8
    assert value("convoy_batch_size_bucket", {"model": "grey", "le": "4.0"}) == 0
    assert value("convoy_batch_duration_seconds_sum", {"model": "grey"}) == 0.02


def test_every_reason_to_refuse_has_a_series_from_the_start(metrics):
    reasons = ("images", "bytes", "deadline", "codel", "draining", "not_ready")
    value = metrics.registry.get_sample_value

    assert [value("convoy_shed_total", {"reason": reason}) for reason in reasons] == [0.0] * len(reasons)


def test_what_a_version_runs_is_told_until_it_is_gone(metrics):
    runs = {"digest": "d", "provider": "CPUExecutionProvider", "variant": "int8"}
    metrics.model_loaded("grey", 2, **runs, load_s=1.0, canary_difference=0.0)
    told = metrics.registry.get_sample_value("convoy_model_info", {"model": "grey", "version": "2", **runs})
    metrics.model_gone("grey", 2, **runs)

    assert told == 1
    assert b'version="2"' not in generate_latest(metrics.registry)
