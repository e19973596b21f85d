"""`convoy.v1.Admin`: operating the repository of a running server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

from convoy.v1 import admin_pb2 as pb
from convoy.v1 import admin_pb2_grpc as pb_grpc
from grpc import aio

from service import logs
from service.errors import ConvoyError, InvalidRequestError
from service.model_state import ModelState
from service.repository import Repository
from service.routing import Routing
from service.rpc.describe import summary

Context = aio.ServicerContext[Any, Any]

_log = logs.get("admin")


class Admin(pb_grpc.AdminServicer):
    """Translates between the API and the repository; decides nothing."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository

    async def LoadModel(self, request: pb.LoadModelRequest, context: Context) -> pb.LoadModelResponse:  # noqa: N802  # the name is the API's
        """Loads a model, or loads it again."""
        version = request.version if request.HasField("version") else None
        with _told("load", request.model, context, version=version):
            await self._repository.load(request.model, version)
        return pb.LoadModelResponse(
            versions=[summary(self._repository, model) for model in self._repository if model.name == request.model]
        )

    async def UnloadModel(self, request: pb.UnloadModelRequest, context: Context) -> pb.UnloadModelResponse:  # noqa: N802
        """Takes a model or a version out of service."""
        version = request.version if request.HasField("version") else None
        with _told("unload", request.model, context, version=version):
            await self._repository.unload(request.model, version)
        return pb.UnloadModelResponse()

    async def SetRouting(self, request: pb.SetRoutingRequest, context: Context) -> pb.SetRoutingResponse:  # noqa: N802
        """Changes who answers."""
        routing = _routing(request.routing)
        told = {"versions": routing.versions, "traffic": dict(routing.traffic), "shadow": routing.shadow}
        with _told("route", request.model, context, **told):
            await self._repository.route(request.model, routing)
        return pb.SetRoutingResponse(routing=_message(self._repository.routing(request.model)))

    async def GetStatus(self, request: pb.GetStatusRequest, context: Context) -> pb.GetStatusResponse:  # noqa: N802
        """Tells everything."""
        del request, context
        statuses = [self._status(name, model) for name, model in self._repository.states()]
        return pb.GetStatusResponse(models=[each for each in statuses if _says_anything(each)])

    def _status(self, name: str, model: ModelState) -> pb.ModelStatus:
        load = model.loading
        return pb.ModelStatus(
            model=name,
            versions=[summary(self._repository, served) for _, served in sorted(model.served.items())],
            routing=_message(model.routing),
            failures=[pb.LoadFailure(version=number, reason=why) for number, why in sorted(model.failed.items())],
            loading=pb.LoadUnderWay(version=load.number, seconds=load.seconds) if load else None,
            unloaded_versions=model.unloaded_versions,
            unloaded=model.unloaded and bool(model.present),
        )


def _says_anything(status: pb.ModelStatus) -> bool:
    """Of a model that is gone from the repository nothing is left but its routing."""
    return bool(
        status.versions or status.failures or status.HasField("loading") or status.unloaded_versions or status.unloaded
    )


@contextlib.contextmanager
def _told(action: str, model: str, context: Context, **what: Any) -> Iterator[None]:
    """Logs who asked for a change, and what became of it: it explains what is served from then on."""
    if not model:
        raise InvalidRequestError("name the model")
    said = _log.bind(action=action, model=model, peer=context.peer(), **{k: v for k, v in what.items() if v})
    try:
        yield
    except asyncio.CancelledError:
        said.warning("admin call was given up by its caller, what has begun is carried through")
        raise
    except ConvoyError as error:
        said.warning("admin call refused", error=str(error))
        raise
    said.info("admin call carried out")


def _routing(message: pb.Routing) -> Routing:
    policy = message.versions or "latest"
    return Routing(policy, dict(message.traffic), message.shadow if message.HasField("shadow") else None)


def _message(routing: Routing) -> pb.Routing:
    return pb.Routing(versions=routing.versions, traffic=dict(routing.traffic), shadow=routing.shadow)
