"""Mutual TLS from the command line to the service and back."""

import json
import socket
import subprocess
import sys

import pytest
import toys
import trustme


@pytest.fixture
def pem(tmp_path):
    """Files of an authority, a server for localhost and a client."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    for name in ("localhost", "client"):
        certificate = authority.issue_cert(name)
        (tmp_path / f"{name}.crt").write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
        certificate.private_key_pem.write_to_path(tmp_path / f"{name}.key")
    return tmp_path


def convoy(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "service", *map(str, arguments)],
        cwd=toys.ROOT,
        env=toys.environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_classify_over_mutual_tls(pem):
    toys.write_version(pem / "models")
    (pem / "white.png").write_bytes(toys.grey_png(255))
    server = ("--tls-certificate", pem / "localhost.crt", "--tls-key", pem / "localhost.key")
    own = ("--tls-certificate", pem / "client.crt", "--tls-key", pem / "client.key")
    with toys.serve_process(pem / "models", *server, "--tls-client-ca", pem / "ca.pem") as (_, report):
        address = f"localhost:{report['grpc'].rpartition(':')[2]}"
        request = ("classify", pem / "white.png", "--server", address, "--json")
        answered = convoy(*request, "--tls-ca", pem / "ca.pem", *own)
        assert answered.returncode == 0, answered.stderr
        assert json.loads(answered.stdout)["classes"][0]["index"] == 9
        for flags, missing in (((), "--tls-ca"), (("--tls-ca", pem / "ca.pem"), "--tls-certificate")):
            refused = convoy(*request, *flags)
            assert refused.returncode == 4
            (line,) = refused.stderr.splitlines()
            assert missing in line


def test_strangers_at_the_port_write_nothing_into_the_log(pem, monkeypatch):
    monkeypatch.delenv("GRPC_VERBOSITY", raising=False)  # who sets it, asks for more
    toys.write_version(pem / "models")
    server = ("--tls-certificate", pem / "localhost.crt", "--tls-key", pem / "localhost.key")
    with toys.serve_process(pem / "models", *server) as (process, report):
        port = int(report["grpc"].rpartition(":")[2])
        for _ in range(3):
            with socket.create_connection(("localhost", port), timeout=10) as stranger:
                stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
                while stranger.recv(1024):
                    pass
    assert process.lines
    assert [line for line in process.lines if not line.startswith("{")] == []


def test_bench_over_mutual_tls(pem):
    toys.write_version(pem / "models")
    (pem / "white.png").write_bytes(toys.grey_png(255))
    server = ("--tls-certificate", pem / "localhost.crt", "--tls-key", pem / "localhost.key")
    own = ("--tls-certificate", pem / "client.crt", "--tls-key", pem / "client.key")
    with toys.serve_process(pem / "models", *server, "--tls-client-ca", pem / "ca.pem") as (_, report):
        address = f"localhost:{report['grpc'].rpartition(':')[2]}"
        load = ("bench", pem / "white.png", "--server", address, "--concurrency", "2", "--warmup", "0")
        few = (*load, "--requests", "20", "--connections", "2", "--json", pem / "results.json")
        measured = convoy(*few, "--tls-ca", pem / "ca.pem", *own)
        assert measured.returncode == 0, measured.stderr
        results = json.loads((pem / "results.json").read_text())
        assert results["settings"]["tls"] is True
        assert (results["levels"][0]["sent"], results["levels"][0]["failures"]) == (20, {})
        refused = convoy(*load, "--tls-ca", pem / "ca.pem")
        assert refused.returncode == 4
        assert "--tls-certificate" in refused.stderr


def test_half_a_pair_is_a_usage_error(pem):
    for flags in (("--tls-certificate", pem / "client.crt"), ("--tls-ca", pem / "ca.pem", "--tls-key", pem / "x")):
        for command in (("models",), ("bench", "--synthetic", "8x8")):
            refused = convoy(*command, *flags)
            assert refused.returncode == 2
            assert "--tls-key" in refused.stderr
