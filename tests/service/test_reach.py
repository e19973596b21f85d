"""What is said of a server that cannot be reached, over real connections."""

import socket
from concurrent import futures
from contextlib import contextmanager

import grpc
import pytest
import trustme
from ports import free_port

from service.client import Client, ClientTls
from service.exits import ServerUnreachableError
from service.reach import unreachable


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@contextmanager
def listening(credentials=None):
    """The port of a gRPC server, with TLS if there are credentials."""
    server = grpc.server(futures.ThreadPoolExecutor(1))
    add = server.add_insecure_port if credentials is None else server.add_secure_port
    port = add("127.0.0.1:0", *([] if credentials is None else [credentials]))
    server.start()
    try:
        yield port
    finally:
        server.stop(None).wait()


def of_server(authority, name, *, mutual=False):
    certificate = authority.issue_cert(name)
    pair = certificate.private_key_pem.bytes(), b"".join(blob.bytes() for blob in certificate.cert_chain_pems)
    return grpc.ssl_server_credentials([pair], authority.cert_pem.bytes() if mutual else None, mutual)


def files(folder, authority, client=None):
    """What a client is given: whom it trusts, and its own pair."""
    authority.cert_pem.write_to_path(folder / "ca.crt")
    if client is None:
        return ClientTls(folder / "ca.crt")
    client.cert_chain_pems[0].write_to_path(folder / "tls.crt")
    client.private_key_pem.write_to_path(folder / "tls.key")
    return ClientTls(folder / "ca.crt", folder / "tls.crt", folder / "tls.key")


def told(port, tls=None):
    """What a client that tried is told."""
    with (
        pytest.raises(ServerUnreachableError) as error,
        Client(f"127.0.0.1:{port}", connect_timeout_s=0.5, tls=tls),
    ):
        pytest.fail("it is connected")
    return str(error.value)


def test_a_client_without_tls_learns_that_the_server_speaks_it(authority):
    with listening(of_server(authority, "127.0.0.1")) as port:
        assert "speaks TLS; give --tls-ca" in told(port)


def test_a_client_with_tls_learns_that_the_server_speaks_none(authority, tmp_path):
    with listening() as port:
        assert "speaks no TLS that this client can use" in told(port, files(tmp_path, authority))


def test_a_server_with_another_name_is_told_apart(authority, tmp_path):
    with listening(of_server(authority, "elsewhere.example")) as port:
        words = told(port, files(tmp_path, authority))
    assert "certificate that is not accepted" in words
    assert "127.0.0.1" in words


def test_a_server_of_another_authority_is_told_apart(authority, tmp_path):
    with listening(of_server(trustme.CA(), "127.0.0.1")) as port:
        words = told(port, files(tmp_path, authority))
    assert "certificate that is not accepted" in words
    assert "--tls-ca" in words


@pytest.mark.parametrize("stranger", [False, True])
def test_a_client_that_has_to_prove_who_it_is_learns_that(authority, tmp_path, stranger):
    client = trustme.CA().issue_cert("client") if stranger else None
    with listening(of_server(authority, "127.0.0.1", mutual=True)) as port:
        assert "does not take this client; give the certificate" in told(port, files(tmp_path, authority, client))


def test_with_the_right_files_there_is_nothing_to_tell(authority, tmp_path):
    right = files(tmp_path, authority, authority.issue_cert("client"))
    with (
        listening(of_server(authority, "127.0.0.1", mutual=True)) as port,
        Client(f"127.0.0.1:{port}", connect_timeout_s=10, tls=right),
    ):
        pass


def test_a_port_on_which_nobody_listens_is_told_with_the_reason():
    port = free_port()
    assert "(Connection refused); start one with `convoy serve`" in told(port)


def test_something_that_takes_connections_and_is_silent_is_told(authority, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        assert "no gRPC server that answers" in told(port)
        assert "does not answer in time" in told(port, files(tmp_path, authority))


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("localhost", "give its port, as in localhost:8500"),
        ("unix:/run/convoy.sock", "no server answers at unix:/run/convoy.sock; start one"),
        ("dns:///no-such-host.invalid:8500", "no server answers at dns:///no-such-host.invalid:8500 ("),
        ("[::1]:1", r"no server answers at [::1]:1 ("),
        ("localhost:99999999999", "no server answers at localhost:99999999999 ("),
    ],
)
def test_any_target_gets_an_answer(target, words):
    assert words in str(unreachable(target))
