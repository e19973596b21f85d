"""Metrics and health over HTTP, also while the rest of the process is stuck."""

import http.client
import json
import socket
import threading
import time
from contextlib import ExitStack, contextmanager

import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.errors import ConfigurationError
from service.http import HttpServer
from service.metrics import Metrics

TIMEOUT_S = 10


@contextmanager
def serving(
    host="127.0.0.1", port=0, live=lambda: (True, "live"), ready=lambda: (True, "ready"), metrics=None, longest_s=10.0
):
    server = HttpServer(host, port, (metrics or Metrics()).registry, live, ready, longest_s)
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


def threads_of_connections():
    """Those that the server of this process has given to connections."""
    return [thread for thread in threading.enumerate() if "process_request_thread" in thread.name]


def test_however_many_dawdle_threads_stay_few_and_the_next_is_answered_at_once():
    with serving() as server, ExitStack() as stack:
        for _ in range(150):
            slow = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), TIMEOUT_S))
            slow.sendall(b"GET /metrics HTTP/1.1\r\nX-Slow: ")
        began = time.monotonic()
        assert get(server.port, "/health/live")[0] == 200
        assert time.monotonic() - began < 5
        assert 0 < len(threads_of_connections()) <= 32


def test_the_oldest_makes_room_for_the_newest():
    with serving() as server, ExitStack() as stack:
        slow = [stack.enter_context(socket.create_connection(("127.0.0.1", server.port), TIMEOUT_S)) for _ in range(33)]

        assert slow[0].recv(1) == b""  # cut
        slow[-1].sendall(b"GET /health/live HTTP/1.1\r\n\r\n")
        assert b"200" in slow[-1].makefile("rb").readline()


def test_who_drips_its_bytes_is_cut_all_the_same():
    with serving(longest_s=0.5) as server, socket.create_connection(("127.0.0.1", server.port), TIMEOUT_S) as slow:
        slow.sendall(b"GET /metrics HTTP/1.1\r\n")
        slow.settimeout(0.05)
        began = time.monotonic()
        while time.monotonic() - began < TIMEOUT_S:
            try:
                slow.sendall(b"X")  # far more often than the wait for a single byte ends
                if slow.recv(1) == b"":
                    break
            except TimeoutError:
                continue
            except OSError:
                break
        assert time.monotonic() - began < TIMEOUT_S


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
