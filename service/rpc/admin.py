"""`convoy.v1.Admin`: operating the repository of a running server."""

from __future__ import annotations

from typing import Any

from convoy.v1 import admin_pb2 as pb
from convoy.v1 import admin_pb2_grpc as pb_grpc
from grpc import aio

from service.errors import InvalidRequestError
from service.repository import Repository
from service.routing import Routing
from service.rpc.describe import summary

Context = aio.ServicerContext[Any, Any]


class Admin(pb_grpc.AdminServicer):
    """Translates between the API and the repository; decides nothing."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository

    async def LoadModel(self, request: pb.LoadModelRequest, context: Context) -> pb.LoadModelResponse:  # noqa: N802  # the name is the API's
        """Loads a model, or loads it again."""
        del context
        _named(request.model)
        await self._repository.load(request.model, request.version if request.HasField("version") else None)
        return pb.LoadModelResponse(
            versions=[summary(self._repository, model) for model in self._repository if model.name == request.model]
        )

    async def UnloadModel(self, request: pb.UnloadModelRequest, context: Context) -> pb.UnloadModelResponse:  # noqa: N802
        """Takes a model or a version out of service."""
        del context
        _named(request.model)
        await self._repository.unload(request.model, request.version if request.HasField("version") else None)
        return pb.UnloadModelResponse()

    async def SetRouting(self, request: pb.SetRoutingRequest, context: Context) -> pb.SetRoutingResponse:  # noqa: N802
        """Changes who answers."""
        del context
        _named(request.model)
        await self._repository.route(request.model, _routing(request.routing))
        return pb.SetRoutingResponse(routing=_message(self._repository.routing(request.model)))

    async def GetStatus(self, request: pb.GetStatusRequest, context: Context) -> pb.GetStatusResponse:  # noqa: N802
        """Tells everything."""
        del request, context
        models: dict[str, pb.ModelStatus] = {}
        for served in self._repository:
            status = models.setdefault(
                served.name,
                pb.ModelStatus(model=served.name, routing=_message(self._repository.routing(served.name))),
            )
            status.versions.append(summary(self._repository, served))
        for name, number, reason in self._repository.failures():
            failures = models.setdefault(name, pb.ModelStatus(model=name)).failures
            failures.append(pb.LoadFailure(version=number, reason=reason))
        return pb.GetStatusResponse(models=models.values())


def _named(model: str) -> None:
    if not model:
        raise InvalidRequestError("name the model")


def _routing(message: pb.Routing) -> Routing:
    policy = message.versions or "latest"
    return Routing(policy, dict(message.traffic), message.shadow if message.HasField("shadow") else None)


def _message(routing: Routing) -> pb.Routing:
    return pb.Routing(versions=routing.versions, traffic=dict(routing.traffic), shadow=routing.shadow)
