import asyncio
import datetime as dt
import os
import ssl
import time

import grpc
import pytest
import trustme
from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from service.errors import ConfigurationError
from service.rpc.credentials import Certificates, ServerTls, check

DAY = dt.timedelta(days=1)


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


def write(folder, certificate):
    """Puts a certificate where the server looks, each file atomically, as Kubernetes does."""
    files = ServerTls(folder / "tls.crt", folder / "tls.key")
    pem = b"".join(blob.bytes() for blob in certificate.cert_chain_pems)
    for path, content in ((files.certificate, pem), (files.key, certificate.private_key_pem.bytes())):
        fresh = path.with_suffix(".new")
        fresh.write_bytes(content)
        fresh.replace(path)
    return files


@pytest.fixture
def files(tmp_path, authority):
    return write(tmp_path, authority.issue_cert("localhost"))


@pytest.fixture
async def serve():
    """Starts servers with the health service over TLS; returns their address."""
    servers = []

    async def start(certificates):
        server = aio.server()
        health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
        port = server.add_secure_port("127.0.0.1:0", certificates.credentials())
        await server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        await server.stop(None)


async def ask(address, credentials):
    """One health check on a new connection."""
    options = (("grpc.ssl_target_name_override", "localhost"), ("grpc.use_local_subchannel_pool", 1))
    async with aio.secure_channel(address, credentials, options=options) as channel:
        reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
    return reply.status == health_pb2.HealthCheckResponse.SERVING


def trusting(authority, client=None):
    key, chain = (None, None)
    if client is not None:
        key, chain = client.private_key_pem.bytes(), client.cert_chain_pems[0].bytes()
    return grpc.ssl_channel_credentials(authority.cert_pem.bytes(), key, chain)


def serial(authority, address):
    """Serial number of the certificate that a new connection is shown."""
    host, port = address.split(":")
    context = ssl.create_default_context(cadata=authority.cert_pem.bytes().decode())
    context.check_hostname = False
    context.set_alpn_protocols(["h2"])
    with ssl.create_connection((host, int(port)), timeout=10) as plain, context.wrap_socket(plain) as secure:
        return secure.getpeercert()["serialNumber"]


async def test_serves_those_who_trust_the_authority(serve, files, authority):
    address = await serve(Certificates(files, lambda _: None))
    assert await ask(address, trusting(authority))


async def test_strangers_are_refused_where_clients_have_to_prove_who_they_are(serve, files, authority, tmp_path):
    authority.cert_pem.write_to_path(tmp_path / "ca.crt")
    mutual = ServerTls(files.certificate, files.key, tmp_path / "ca.crt")
    address = await serve(Certificates(mutual, lambda _: None))
    assert await ask(address, trusting(authority, authority.issue_cert("client")))
    for client in (None, trustme.CA().issue_cert("stranger")):
        with pytest.raises(aio.AioRpcError) as caught:
            await ask(address, trusting(authority, client))
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


def test_a_renewed_certificate_is_handed_out_once(files, authority, tmp_path):
    ends = []
    certificates = Certificates(files, ends.append)
    assert certificates.renewed() is None  # nothing has changed yet
    later = dt.datetime.now(dt.UTC) + 90 * DAY
    write(tmp_path, authority.issue_cert("localhost", not_after=later))
    assert certificates.renewed() is not None
    assert certificates.renewed() is None
    assert ends[-1] == pytest.approx(later.timestamp(), abs=1)


async def test_connections_see_the_renewal_through_grpc(serve, files, authority, tmp_path):
    address = await serve(Certificates(files, lambda _: None))
    first = await asyncio.to_thread(serial, authority, address)
    assert await asyncio.to_thread(serial, authority, address) == first
    write(tmp_path, authority.issue_cert("localhost"))
    assert await asyncio.to_thread(serial, authority, address) != first
    assert await ask(address, trusting(authority))


@pytest.mark.parametrize("damage", ["other key", "no pem", "gone", "expired"])
async def test_a_renewal_that_does_not_serve_leaves_the_old_one(serve, files, authority, tmp_path, damage):
    certificates = Certificates(files, lambda _: None)
    address = await serve(certificates)
    if damage == "other key":
        files.key.write_bytes(authority.issue_cert("localhost").private_key_pem.bytes())
    elif damage == "no pem":
        files.certificate.write_bytes(b"-----BEGIN CERT")
    elif damage == "gone":
        files.certificate.unlink()
    else:
        write(tmp_path, authority.issue_cert("localhost", not_after=dt.datetime.now(dt.UTC) - DAY))
    assert certificates.renewed() is None
    assert await ask(address, trusting(authority))
    write(tmp_path, authority.issue_cert("localhost"))  # a good one afterwards is taken
    assert certificates.renewed() is not None


async def test_a_renewal_that_is_not_valid_yet_is_taken_when_it_is(files, authority, tmp_path):
    now = [0.0]
    certificates = Certificates(files, lambda _: None, clock=lambda: now[0])
    soon = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=2)
    write(tmp_path, authority.issue_cert("localhost", not_before=soon))
    assert certificates.renewed() is None
    await asyncio.sleep((soon - dt.datetime.now(dt.UTC)).total_seconds() + 1)
    assert certificates.renewed() is None  # it is not looked at again and again
    now[0] += 60
    assert certificates.renewed() is not None
    assert certificates.renewed() is None


def test_check_tells_the_end_of_validity(files):
    assert check(files) > time.time() + DAY.total_seconds()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f, ca: f.key.unlink(), "tls.key cannot be read"),
        (lambda f, ca: f.certificate.write_bytes(b""), "tls.crt does not serve"),
        (lambda f, ca: f.key.write_bytes(ca.issue_cert("x").private_key_pem.bytes()), "key of its"),
    ],
)
def test_the_start_fails_with_a_sentence(files, authority, damage, says):
    damage(files, authority)
    with pytest.raises(ConfigurationError, match=says):
        Certificates(files, lambda _: None)


def test_an_expired_certificate_does_not_start(tmp_path, authority):
    past = dt.datetime.now(dt.UTC) - DAY
    files = write(tmp_path, authority.issue_cert("localhost", not_after=past))
    with pytest.raises(ConfigurationError, match="expired"):
        Certificates(files, lambda _: None)


def test_a_client_authority_that_is_no_certificate_does_not_start(files, tmp_path):
    (tmp_path / "ca.crt").write_text("nobody")
    with pytest.raises(ConfigurationError, match=r"ca\.crt does not serve"):
        Certificates(ServerTls(files.certificate, files.key, tmp_path / "ca.crt"), lambda _: None)


def test_files_changed_in_place_are_noticed(files, authority):
    certificates = Certificates(files, lambda _: None)
    fresh = authority.issue_cert("localhost")
    before = files.certificate.stat()
    files.certificate.write_bytes(b"".join(blob.bytes() for blob in fresh.cert_chain_pems))
    files.key.write_bytes(fresh.private_key_pem.bytes())
    os.utime(files.certificate, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert certificates.renewed() is not None
