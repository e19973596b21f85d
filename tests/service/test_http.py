"""Metrics and health over HTTP, also while the rest of the process is stuck."""

import http.client
import json
import socket
import threading
from contextlib import contextmanager

import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.errors import ConfigurationError
from service.http import HttpServer
from service.metrics import Metrics

TIMEOUT_S = 10


@contextmanager
def serving(host="127.0.0.1", port=0, live=lambda: (True, "live"), ready=lambda: (True, "ready"), metrics=None):
    server = HttpServer(host, port, (metrics or Metrics()).registry, live, ready)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def get(port, path, host="127.0.0.1", method="GET"):
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.getheader("Content-Type"), response.read()
    finally:
        connection.close()


def test_metrics_parse_and_carry_their_values():
    metrics = Metrics()
    metrics.images.labels("grey", "classified").inc(3)
    metrics.ready.set(1)
    with serving(metrics=metrics) as server:
        status, kind, body = get(server.port, "/metrics")
    families = {family.name: family for family in text_string_to_metric_families(body.decode())}

    assert (status, kind.split(";")[0]) == (200, "text/plain")
    (sample,) = [s for s in families["convoy_images"].samples if s.name == "convoy_images_total"]
    assert (sample.labels, sample.value) == ({"model": "grey", "outcome": "classified"}, 3)
    assert families["convoy_ready"].samples[0].value == 1
    assert families["process_resident_memory_bytes"].samples[0].value > 0


def test_every_metric_is_documented_and_keeps_the_naming_rules():
    for family in Metrics().registry.collect():
        assert family.documentation, family.name
        if family.name.startswith("convoy_"):
            assert not family.name.endswith(("_ms", "_us", "_mb")), family.name


@pytest.mark.parametrize("path", ["/health/live", "/health/ready"])
def test_health_says_ok_with_a_word_on_it(path):
    with serving() as server:
        status, kind, body = get(server.port, path)

    assert (status, kind, json.loads(body)) == (200, "application/json", {"status": path.rpartition("/")[2]})


def test_a_stuck_loop_fails_liveness_and_says_why():
    with serving(live=lambda: (False, "the event loop is stuck for 12 s")) as server:
        status, _, body = get(server.port, "/health/live")
        assert (status, json.loads(body)["status"]) == (503, "the event loop is stuck for 12 s")
        assert get(server.port, "/health/ready")[0] == 200


def test_health_follows_the_state_of_the_moment():
    state = ["starting"]
    with serving(ready=lambda: (state[0] == "ready", state[0])) as server:
        seen = []
        for state[0] in ("starting", "ready", "draining"):
            status, _, body = get(server.port, "/health/ready")
            seen.append((status, json.loads(body)["status"]))

    assert seen == [(503, "starting"), (200, "ready"), (503, "draining")]


@pytest.mark.parametrize("path", ["/nothing", "/health", "/metrics/x", "/%2e%2e/etc/passwd"])
def test_what_is_not_there_is_404_and_says_what_is(path):
    with serving() as server:
        status, _, body = get(server.port, path)

    assert status == 404
    assert "/metrics" in json.loads(body)["see"]


def test_the_front_page_says_what_there_is():
    with serving() as server:
        status, _, body = get(server.port, "/")

    assert (status, json.loads(body)["see"]) == (200, ["/metrics", "/health/live", "/health/ready"])


def test_a_client_that_sends_nothing_does_not_hold_up_the_others():
    with serving() as server:
        silent = [socket.create_connection(("127.0.0.1", server.port), 0.9) for _ in range(20)]
        silent[0].sendall(b"GET /metrics HT")
        status, _, _ = get(server.port, "/health/live")
        for connection in silent:
            connection.close()

    assert status == 200


def test_a_client_that_does_not_read_does_not_hold_up_the_end():
    server = HttpServer("127.0.0.1", 0, Metrics().registry, lambda: (True, ""), lambda: (True, ""))
    server.start()
    with socket.create_connection(("127.0.0.1", server.port), TIMEOUT_S) as connection:
        connection.sendall(b"GET /metrics HTTP/1.1\r\n\r\n" * 200)
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        stopping.join(TIMEOUT_S)

        assert not stopping.is_alive()


@pytest.mark.parametrize("garbage", [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET\r\n\r\n", b"\r\n" * 100])
def test_garbage_harms_nobody(garbage):
    with serving() as server:
        with socket.create_connection(("127.0.0.1", server.port), TIMEOUT_S) as connection:
            connection.sendall(garbage)
        assert get(server.port, "/health/live")[0] == 200


def test_a_check_that_raises_is_an_error_to_its_client_only(capfd):
    def broken():
        raise RuntimeError("/secret/path")

    with serving(live=broken) as server:
        status, _, body = get(server.port, "/health/live")
        assert (status, b"secret" in body) == (500, False)
        assert get(server.port, "/health/ready")[0] == 200


def test_a_taken_port_says_what_to_do():
    with serving() as server, pytest.raises(ConfigurationError, match="--http-port"):
        HttpServer("127.0.0.1", server.port, Metrics().registry, lambda: (True, ""), lambda: (True, ""))


def test_stop_frees_the_port():
    with serving() as server:
        port = server.port
    with serving(port=port) as again:
        assert get(again.port, "/health/live")[0] == 200


def test_a_server_that_never_started_stops():
    HttpServer("127.0.0.1", 0, Metrics().registry, lambda: (True, ""), lambda: (True, "")).stop()


@pytest.mark.skipif(not socket.has_ipv6, reason="this machine has no IPv6")
def test_ipv6():
    with serving(host="::1") as server:
        assert get(server.port, "/health/live", host="::1")[0] == 200
