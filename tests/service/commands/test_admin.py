"""`convoy load`, `unload` and `route` when the server takes its time."""

import threading
from concurrent import futures

import grpc
import pytest
from click.testing import CliRunner
from convoy.v1 import admin_pb2_grpc
from toys import TIMEOUT_S

from service.commands import admin
from service.exits import Exit, ServerUnreachableError, code_of


class Busy(admin_pb2_grpc.AdminServicer):
    """A server that is loading something else."""

    def __init__(self):
        self.done = threading.Event()

    def _wait(self, _request, context):
        assert self.done.wait(TIMEOUT_S)
        context.abort(grpc.StatusCode.UNAVAILABLE, "the test is over")

    LoadModel = UnloadModel = SetRouting = _wait


@pytest.fixture
def busy():
    servicer = Busy()
    server = grpc.server(futures.ThreadPoolExecutor(4))
    admin_pb2_grpc.add_AdminServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    servicer.done.set()
    server.stop(None).wait()


@pytest.mark.parametrize("command", [admin.load, admin.unload, admin.route], ids=lambda command: command.name)
def test_a_server_that_takes_longer_than_asked_for_is_not_waited_for(busy, command):
    told = CliRunner().invoke(command, ["grey", "--admin", busy, "--timeout", "0.2"])

    assert isinstance(told.exception, ServerUnreachableError)
    assert code_of(told.exception) is Exit.UNREACHABLE
    assert "did not answer in time" in str(told.exception)
    assert "--timeout" in str(told.exception)
