"""Versions coming and going while requests are answered."""

import asyncio
import math
import shutil
import threading
from itertools import count

import grpc
import pytest
import structlog
from click.testing import CliRunner
from convoy.v1 import admin_pb2, admin_pb2_grpc
from convoy.v1 import image_classifier_pb2 as pb
from convoy.v1 import image_classifier_pb2_grpc as pb_grpc
from grpc import aio
from toys import eventually, grey_png, real_server, write_version

from service import serving
from service.commands.admin import status

WHITE = grey_png(255)


@pytest.fixture
def repository(tmp_path):
    write_version(tmp_path / "models", "grey", 1)
    return tmp_path / "models"


class Ends:
    """Both ends of a server: the API and the admin API."""

    def __init__(self, server, api, admin):
        self.server = server
        self.api = pb_grpc.ImageClassifierStub(api)
        self.admin = admin_pb2_grpc.AdminStub(admin)

    async def classify(self, image=WHITE, **request):
        return await self.api.Classify(pb.ClassifyRequest(model="grey", images=[image], top_k=1, **request))

    async def served(self):
        reply = await self.api.ListModels(pb.ListModelsRequest())
        return [model.version for model in reply.models]

    def sample(self, name, **labels):
        return self.server.metrics.registry.get_sample_value(name, labels)


class Around:
    """A real server with its admin port open, as an async context manager."""

    def __init__(self, repository, **settings):
        self._context = real_server(str(repository), admin_port=0, repository_poll_s=0, **settings)
        self._channels = []

    async def __aenter__(self):
        server = await self._context.__aenter__()
        self._channels = [aio.insecure_channel(f"127.0.0.1:{port}") for port in (server.port, server.admin_port)]
        return Ends(server, *self._channels)

    async def __aexit__(self, *error):
        for channel in self._channels:
            await channel.close()
        return await self._context.__aexit__(*error)


async def test_a_new_version_takes_over_and_the_old_one_is_released(repository):
    async with Around(repository) as ends:
        assert (await ends.classify()).version == 1
        write_version(repository, "grey", 2)
        await ends.server.repository.poll()
        assert (await ends.classify()).version == 2
        assert await ends.served() == [2]
        with pytest.raises(aio.AioRpcError) as refused:
            await ends.classify(version=1)
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
        assert "served are: 2" in refused.value.details()


async def test_swaps_under_load_fail_no_request(repository):
    async with Around(repository) as ends:
        stop = asyncio.Event()

        async def caller():
            answers = []
            while not stop.is_set():
                reply = await ends.classify()
                answers.append((reply.version, reply.results[0].classification.classes[0].index))
            return answers

        callers = [asyncio.create_task(caller()) for _ in range(8)]
        for number in range(2, 8):
            write_version(repository, "grey", number)
            await ends.server.repository.poll()
            await ends.classify()
        stop.set()
        for answers in await asyncio.gather(*callers):
            assert {index for _, index in answers} == {9}
            # A caller that waits for each answer never meets an older version after a newer one.
            assert [version for version, _ in answers] == sorted(version for version, _ in answers)
        assert (await ends.classify()).version == 7


async def test_a_version_that_fails_its_canary_changes_nothing(repository):
    async with Around(repository) as ends:
        write_version(repository, "grey", 2, canary_shift=0.5)
        await ends.server.repository.poll()
        assert (await ends.classify()).version == 1
        assert ends.sample("convoy_model_load_failures_total", model="grey") == 1
        status = await ends.admin.GetStatus(admin_pb2.GetStatusRequest())
        assert "canary" in status.models[0].failures[0].reason


async def test_of_a_model_that_cannot_be_served_the_status_has_reason_and_routing(repository):
    async with Around(repository) as ends:
        write_version(repository, "new", canary_shift=0.5)
        await ends.server.repository.poll()
        status = await ends.admin.GetStatus(admin_pb2.GetStatusRequest())
        (new,) = (model for model in status.models if model.model == "new")

        assert not new.versions
        assert "canary" in new.failures[0].reason
        assert new.routing.versions == "latest"


async def test_a_failed_version_is_tried_again_only_when_its_files_change(repository):
    async with Around(repository) as ends:
        path = write_version(repository, "grey", 2, canary_shift=0.5)
        await ends.server.repository.poll()
        await ends.server.repository.poll()
        assert ends.sample("convoy_model_load_failures_total", model="grey") == 1
        shutil.rmtree(path)
        write_version(repository, "grey", 2)
        await ends.server.repository.poll()
        assert (await ends.classify()).version == 2


async def test_a_half_copied_version_is_not_loaded_until_it_is_whole(repository, tmp_path):
    whole = write_version(tmp_path / "elsewhere", "grey", 2)
    target = repository / "grey" / "2"
    async with Around(repository) as ends:
        target.mkdir()
        shutil.copy(whole / "manifest.json", target)
        await ends.server.repository.poll()
        assert (await ends.classify()).version == 1
        shutil.copytree(whole, target, dirs_exist_ok=True)
        await ends.server.repository.poll()
        assert (await ends.classify()).version == 2


async def test_admin_load_reports_why_and_keeps_the_old(repository):
    async with Around(repository) as ends:
        (repository / "grey" / "1" / "model.onnx").write_bytes(b"rot")
        with pytest.raises(aio.AioRpcError) as refused:
            await ends.admin.LoadModel(admin_pb2.LoadModelRequest(model="grey"))
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "does not match the manifest" in refused.value.details()
        assert (await ends.classify()).results[0].classification.classes[0].index == 9


async def test_a_removed_version_is_served_on(repository):
    async with Around(repository) as ends:
        shutil.rmtree(repository / "grey" / "1")
        await ends.server.repository.poll()
        assert (await ends.classify()).version == 1


async def test_rollback_by_removing_the_latest(repository):
    path = write_version(repository, "grey", 2)
    async with Around(repository) as ends:
        assert (await ends.classify()).version == 2
        shutil.rmtree(path)
        await ends.server.repository.poll()
        assert (await ends.classify()).version == 1


async def test_unload_and_load_by_hand(repository):
    async with Around(repository) as ends:
        await ends.admin.UnloadModel(admin_pb2.UnloadModelRequest(model="grey"))
        await ends.server.repository.poll()
        with pytest.raises(aio.AioRpcError) as refused:
            await ends.classify()
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
        reply = await ends.admin.LoadModel(admin_pb2.LoadModelRequest(model="grey"))
        assert [model.version for model in reply.versions] == [1]
        assert (await ends.classify()).version == 1
        for request, call in (
            (admin_pb2.UnloadModelRequest(model="nix"), ends.admin.UnloadModel),
            (admin_pb2.LoadModelRequest(model="nix"), ends.admin.LoadModel),
            (admin_pb2.LoadModelRequest(model="grey", version=7), ends.admin.LoadModel),
        ):
            with pytest.raises(aio.AioRpcError) as refused:
                await call(request)
            assert refused.value.code() is grpc.StatusCode.NOT_FOUND


async def test_versions_loaded_and_unloaded_by_hand_survive_polling(repository):
    write_version(repository, "grey", 2)
    async with Around(repository) as ends:
        poll = ends.server.repository.poll
        await ends.admin.LoadModel(admin_pb2.LoadModelRequest(model="grey", version=1))
        await poll()
        assert await ends.served() == [1, 2]
        await ends.admin.UnloadModel(admin_pb2.UnloadModelRequest(model="grey", version=2))
        await poll()
        assert await ends.served() == [1]
        assert (await ends.classify()).version == 1
        await ends.admin.LoadModel(admin_pb2.LoadModelRequest(model="grey"))
        await poll()
        assert await ends.served() == [2]


async def test_an_unloaded_version_finishes_what_it_began(repository):
    async with Around(repository) as ends:
        calls = [asyncio.create_task(ends.classify(grey_png(level % 256))) for level in range(64)]
        await asyncio.sleep(0)
        await ends.admin.UnloadModel(admin_pb2.UnloadModelRequest(model="grey"))
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        codes = {outcome.code() for outcome in outcomes if isinstance(outcome, aio.AioRpcError)}
        # A call that came after the unloading is told so; none is lost or answered with anything else.
        assert codes <= {grpc.StatusCode.NOT_FOUND}


async def test_traffic_is_split_by_weight(repository):
    write_version(repository, "grey", 2)
    async with Around(repository) as ends:
        routing = admin_pb2.Routing(versions="all", traffic={1: 3, 2: 1})
        await ends.admin.SetRouting(admin_pb2.SetRoutingRequest(model="grey", routing=routing))
        assert await ends.served() == [1, 2]
        versions = [(await ends.classify()).version for _ in range(400)]
        # 100 expected, standard deviation 8.7: seven of them away would be one in 10^11.
        assert 40 < versions.count(2) < 160
        assert (await ends.classify(version=1)).version == 1


async def told_by_status(ends):
    """What `convoy status` prints, without the lines of the server's log."""
    arguments = ["--admin", f"127.0.0.1:{ends.server.admin_port}"]
    shown = (await asyncio.to_thread(CliRunner().invoke, status, arguments)).output
    return [line for line in shown.splitlines() if line.startswith(("grey", "  version", "nothing"))]


async def test_status_tells_every_version_that_answers(repository):
    for number in (2, 3):
        write_version(repository, "grey", number)
    async with Around(repository) as ends:
        routing = admin_pb2.Routing(versions="all", traffic={1: 1, 2: 1})
        await ends.admin.SetRouting(admin_pb2.SetRoutingRequest(model="grey", routing=routing))
        assert [line.endswith("answers") for line in await told_by_status(ends)] == [False, True, True, False]


async def test_status_divides_among_what_is_in_service(repository):
    write_version(repository, "grey", 2)
    async with Around(repository) as ends:
        routing = admin_pb2.Routing(versions="all", traffic={1: 3, 2: 1})
        await ends.admin.SetRouting(admin_pb2.SetRoutingRequest(model="grey", routing=routing))
        told = []
        for unloaded in ({}, {"version": 2}, {"version": 1}):
            if unloaded:
                await ends.admin.UnloadModel(admin_pb2.UnloadModelRequest(model="grey", **unloaded))
            told.append((await told_by_status(ends))[0])

    assert told == [
        "grey  serves all; 75% to version 1, 25% to version 2",
        "grey  serves all; 100% to version 1 (version 2 is not in service)",
        "grey  unloaded",
    ]


async def test_status_tells_of_a_load_while_it_lasts(repository, monkeypatch):
    held, load = threading.Event(), serving.load
    async with Around(repository) as ends:
        write_version(repository, "grey", 2)
        monkeypatch.setattr(serving, "load", lambda *args, **options: held.wait(20) and load(*args, **options))
        polling = asyncio.create_task(ends.server.repository.poll())
        await eventually(lambda: ends.server.repository.states()[0][1].loading)
        during = await told_by_status(ends)
        held.set()
        await polling
        after = await told_by_status(ends)

    assert "  version 2 is being loaded (0 s so far)" in during
    assert "  version 1: " in during[1]
    assert [line[:11] for line in after[1:]] == ["  version 2"]


async def test_status_tells_what_was_unloaded_until_it_is_gone(repository):
    write_version(repository, "grey", 2)
    async with Around(repository) as ends:
        await ends.admin.LoadModel(admin_pb2.LoadModelRequest(model="grey", version=1))
        await ends.admin.UnloadModel(admin_pb2.UnloadModelRequest(model="grey", version=1))
        one = await told_by_status(ends)
        await ends.admin.UnloadModel(admin_pb2.UnloadModelRequest(model="grey"))
        both = await told_by_status(ends)
        shutil.rmtree(repository / "grey")
        await ends.server.repository.poll()
        none = await told_by_status(ends)

    assert one[-1] == "  version 1: unloaded"
    assert (both, none) == (["grey  unloaded"], ["nothing is served"])


async def test_who_changed_what_is_in_the_log(repository):
    write_version(repository, "grey", 2)
    with structlog.testing.capture_logs() as lines:
        async with Around(repository) as ends:
            routing = admin_pb2.Routing(versions="all", traffic={1: 3, 2: 1})
            await ends.admin.SetRouting(admin_pb2.SetRoutingRequest(model="grey", routing=routing))
            await ends.admin.LoadModel(admin_pb2.LoadModelRequest(model="grey", version=2))
            await ends.admin.UnloadModel(admin_pb2.UnloadModelRequest(model="grey"))
            with pytest.raises(aio.AioRpcError):
                await ends.admin.UnloadModel(admin_pb2.UnloadModelRequest(model="grey"))

    told = [line for line in lines if line.get("component") == "admin"]
    assert all(line["model"] == "grey" and line["peer"].startswith("ipv4:127.0.0.1:") for line in told)
    assert [(line["action"], line["event"].split()[-1]) for line in told] == [
        ("route", "out"),
        ("load", "out"),
        ("unload", "out"),
        ("unload", "refused"),
    ]
    assert (told[0]["versions"], told[0]["traffic"], told[1]["version"]) == ("all", {1: 3, 2: 1}, 2)


@pytest.mark.parametrize(
    ("routing", "words"),
    [
        ({"traffic": {5: 1}}, "no version 5"),
        ({"traffic": {0: 1}}, "no version 0"),
        ({"shadow": 5}, "no version 5"),
        ({"versions": "1,5"}, "no version 5"),
        ({"versions": "newest"}, "version policy"),
        ({"traffic": {1: math.inf}}, "finite"),
        ({"traffic": {1: math.nan}}, "above 0"),
    ],
)
async def test_a_routing_that_cannot_be_changes_nothing(repository, routing, words):
    async with Around(repository) as ends:
        request = admin_pb2.SetRoutingRequest(model="grey", routing=admin_pb2.Routing(**routing))
        with pytest.raises(aio.AioRpcError, match=words) as refused:
            await ends.admin.SetRouting(request)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        write_version(repository, "grey", 2)
        await ends.server.repository.poll()
        assert (await ends.classify()).version == 2


async def test_a_shadow_is_compared_and_never_answers(repository):
    write_version(repository, "grey", 2, classes=10, labels=[f"other {k}" for k in range(10)])
    async with Around(repository) as ends:
        routing = admin_pb2.Routing(versions="1", shadow=2)
        await ends.admin.SetRouting(admin_pb2.SetRoutingRequest(model="grey", routing=routing))
        replies = [await ends.classify(grey_png(level)) for level in (0, 85, 170, 255)]
        assert {reply.version for reply in replies} == {1}
        async with asyncio.timeout(10):
            for _ in count():
                agreeing = ends.sample("convoy_shadow_images_total", model="grey", version="2", outcome="agree")
                if agreeing == 4:
                    break
                await asyncio.sleep(0.01)


async def test_without_a_version_the_one_with_most_traffic_is_described(repository):
    """Drawn by the split it would be another one each time."""
    write_version(repository, "grey", 2)
    settings = {"grey": {"versions": "all", "traffic": {1: 55.0, 2: 45.0}}}
    async with Around(repository, model_settings=settings) as ends:
        described = {(await ends.api.GetModel(pb.GetModelRequest())).summary.version for _ in range(30)}
        assert described == {1}


async def test_policies_from_the_settings(repository):
    for number in (2, 3):
        write_version(repository, "grey", number)
    async with Around(repository, model_settings={"grey": {"versions": "latest:2", "traffic": {2: 1.0}}}) as ends:
        assert await ends.served() == [2, 3]
        assert (await ends.classify()).version == 2


async def test_the_canary_is_run_again(repository):
    async with Around(repository) as ends:
        await ends.server.repository.check_canaries()
        assert ends.sample("convoy_canary_ok", model="grey", version="1") == 1
        # What the canary promises changes under the server: as if the device had begun to compute something else.
        served = ends.server.repository.get("grey")
        served.version = write_version_object(repository, served)
        await ends.server.repository.check_canaries()
        assert ends.sample("convoy_canary_ok", model="grey", version="1") == 0


def write_version_object(repository, served):
    """The same version, promising other probabilities."""
    from service import artifact

    path = write_version(repository / "other", "grey", 1, canary_shift=0.3)
    return artifact.ModelVersion(path=path, manifest=artifact.read_manifest(path))


async def test_memory_does_not_grow_with_reloads(repository):
    from service.resources import rss_bytes

    async with Around(repository) as ends:
        request = admin_pb2.LoadModelRequest(model="grey")
        for _ in range(10):
            await ends.admin.LoadModel(request)
        before = rss_bytes()
        for _ in range(40):
            await ends.admin.LoadModel(request)
        assert rss_bytes() - before < 8 << 20


async def test_a_repository_by_url_is_mirrored_and_verified(repository, tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(repository), "/bucket/models", recursive=True)
    try:
        async with Around("memory://bucket/models", cache_dir=tmp_path / "cache") as ends:
            assert (await ends.classify()).version == 1
            path = write_version(repository, "grey", 2)
            memory.put(str(path), "/bucket/models/grey/2", recursive=True)
            memory.pipe_file("/bucket/models/grey/2/model.onnx", b"damaged on the way")
            await ends.server.repository.poll()
            assert (await ends.classify()).version == 1
            memory.rm("/bucket/models/grey/2", recursive=True)
            memory.put(str(path), "/bucket/models/grey/2", recursive=True)
            await ends.server.repository.load("grey")
            assert (await ends.classify()).version == 2
    finally:
        memory.rm("/bucket", recursive=True)
