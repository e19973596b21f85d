"""The client of the command line: errors in its own words, order, latencies, retries."""

import socket
import threading
from concurrent import futures
from contextlib import contextmanager

import grpc
import pytest
import toys
from convoy.v1 import image_classifier_pb2 as pb
from convoy.v1 import image_classifier_pb2_grpc as pb_grpc
from ports import free_port

from service.client import Client
from service.exits import ServerRefusedError, ServerUnreachableError


class Servicer(pb_grpc.ImageClassifierServicer):
    """Answers with the number that the request carries as its model; `refusals` come first."""

    def __init__(self):
        self.refusals = []
        self.calls = 0
        self.most_at_once = 0
        self._now = 0
        self._lock = threading.Lock()

    def Classify(self, request, context):  # noqa: N802  # the name is the API's
        with self._lock:
            self.calls += 1
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
            refusal = self.refusals.pop(0) if self.refusals else None
        try:
            if refusal is not None:
                context.abort(refusal, "not now")
            if request.model == "bad":
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, "image 0: broken")
            return pb.ClassifyResponse(model=request.model)
        finally:
            with self._lock:
                self._now -= 1

    def ListModels(self, request, context):  # noqa: N802
        return pb.ListModelsResponse(models=[pb.ModelSummary(name="grey", version=1)])

    def GetModel(self, request, context):  # noqa: N802
        version = request.version if request.HasField("version") else 7
        return pb.GetModelResponse(summary=pb.ModelSummary(name=request.model, version=version))


@contextmanager
def serving(servicer):
    server = grpc.server(futures.ThreadPoolExecutor(16))
    pb_grpc.add_ImageClassifierServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


@pytest.fixture
def servicer():
    return Servicer()


@pytest.fixture
def client(servicer):
    with serving(servicer) as target, Client(target) as connected:
        yield connected


def numbered(count):
    return [pb.ClassifyRequest(model=str(n)) for n in range(count)]


def test_nobody_there_says_what_to_do():
    port = free_port()
    with pytest.raises(ServerUnreachableError, match=rf"127\.0\.0\.1:{port}.*convoy serve"):
        Client(f"127.0.0.1:{port}", connect_timeout_s=0.3).__enter__()


def test_a_server_that_speaks_something_else_is_unreachable():
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(ServerUnreachableError),
        Client(f"127.0.0.1:{silent.getsockname()[1]}", connect_timeout_s=0.3),
    ):
        pytest.fail("it never answered")


def test_an_answer_is_the_servers(client):
    assert client.classify(pb.ClassifyRequest(model="x")).model == "x"
    assert [model.name for model in client.models()] == ["grey"]
    assert client.model("grey").summary.version == 7
    assert client.model("grey", 3).summary.version == 3


def test_a_refusal_carries_status_and_text(client):
    with pytest.raises(ServerRefusedError, match="INVALID_ARGUMENT: image 0: broken"):
        client.classify(pb.ClassifyRequest(model="bad"))


def test_what_was_unavailable_is_tried_again(client, servicer):
    servicer.refusals = [grpc.StatusCode.UNAVAILABLE] * 2

    assert client.classify(pb.ClassifyRequest(model="x")).model == "x"
    assert servicer.calls == 3


def test_trying_again_ends(client, servicer):
    servicer.refusals = [grpc.StatusCode.UNAVAILABLE] * 20

    with pytest.raises(ServerRefusedError, match="UNAVAILABLE"):
        client.classify(pb.ClassifyRequest(model="x"))
    assert servicer.calls <= 5


def test_what_was_refused_for_good_is_not_tried_again(client, servicer):
    with pytest.raises(ServerRefusedError):
        client.classify(pb.ClassifyRequest(model="bad"))

    assert servicer.calls == 1


def test_many_requests_come_back_in_order_with_their_latencies(client):
    outcomes = list(client.classify_all(numbered(100), in_flight=8))

    assert [response.model for response, _ in outcomes] == [str(n) for n in range(100)]
    assert all(0 < latency_s < toys.TIMEOUT_S for _, latency_s in outcomes)


def test_no_more_than_so_many_are_in_flight(client, servicer):
    list(client.classify_all(numbered(60), in_flight=3))

    assert 1 <= servicer.most_at_once <= 3


def test_a_refusal_among_many_takes_its_place_in_the_order(client):
    requests = numbered(5)
    requests[2].model = "bad"

    outcomes = [outcome for outcome, _ in client.classify_all(requests)]

    assert isinstance(outcomes[2], ServerRefusedError)
    assert [outcomes[n].model for n in (0, 1, 3, 4)] == ["0", "1", "3", "4"]


def test_requests_are_taken_from_the_source_as_they_are_sent(client):
    taken = []

    def source():
        for n in range(1000):
            taken.append(n)
            yield pb.ClassifyRequest(model=str(n))

    outcomes = client.classify_all(source(), in_flight=4)
    for _ in range(3):
        next(outcomes)

    assert len(taken) <= 8


def test_no_requests_give_no_outcomes(client):
    assert list(client.classify_all([])) == []
