"""How calls are taken. What strangers send to the acceptor is in test_strangers.py."""

import asyncio
import gc

import grpc
import pytest
import raw_http2
import structlog
import toys
from convoy.v1 import image_classifier_pb2 as pb

from service.rpc import acceptor
from service.rpc.interceptor import Arrivals

CALLERS = acceptor.AT_A_TIME


async def test_calls_that_wait_for_the_loop_are_taken_together(tmp_path, monkeypatch):
    """One at a time, a turn of the loop would see one request, and there would be no batches where models are tiny."""
    turn, turns = 0, []
    monkeypatch.setattr(Arrivals, "came", lambda _: turns.append(turn))
    async with toys.toy_stand(tmp_path, {"grey": toys.ToyEngine(classes=256)}) as stand:
        with raw_http2.connected(stand.listener.port) as connection:
            calls = [raw_http2.call(2 * number + 1) for number in range(CALLERS)]
            connection.send(*calls, raw_http2.frame(raw_http2.PING, bytes(8)))
            # The loop stands still until the library, which needs no loop to answer that, has got the calls.
            assert connection.wait_for(raw_http2.PING)
            async with asyncio.timeout(10):
                while len(turns) < CALLERS:
                    turn += 1
                    await asyncio.sleep(0)

    assert len(set(turns)) <= 2


def lacks_a_part(monkeypatch):
    monkeypatch.setattr(acceptor, "_NEEDED", ((grpc, ("insecure_channel", "no_such_thing")),))


def wants_another_argument(monkeypatch):
    def made(loop, interceptor, options, at_a_time, one_more):
        raise AssertionError

    monkeypatch.setattr(acceptor, "_Acceptor", made)


@pytest.mark.parametrize("differs", [lacks_a_part, wants_another_argument])
async def test_another_release_of_grpc_serves_with_its_own_server(tmp_path, monkeypatch, differs):
    differs(monkeypatch)
    with structlog.testing.capture_logs() as lines:
        async with toys.toy_stand(tmp_path, {"grey": toys.ToyEngine(classes=256)}) as stand:
            reply = await stand.stub.Classify(request(7), timeout=10)

    assert reply.results[0].classification.classes[0].index == 7
    assert any("damaged path" in line["event"] for line in lines)


async def test_finished_calls_do_not_stay(tmp_path):
    """What a call brought, and what it failed with, would hang on the task that took it until the next one."""
    async with toys.toy_stand(tmp_path, {"grey": toys.ToyEngine(classes=256)}) as stand:
        for _ in range(3):
            await stand.stub.Classify(request(7), timeout=10)
        await stand.stub.ListModels(pb.ListModelsRequest())
        gc.collect()
        takers = [task.get_coro() for task in asyncio.all_tasks() if "one_by_one" in task.get_coro().__qualname__]

        assert len(takers) >= CALLERS
        assert not any("call" in taker.cr_frame.f_locals for taker in takers)


def request(level):
    return pb.ClassifyRequest(images=[toys.grey_png(level)])
