"""`convoy.v1.ImageClassifier`: messages in, domain calls, messages out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from convoy.v1 import image_classifier_pb2 as pb
from convoy.v1 import image_classifier_pb2_grpc as pb_grpc
from grpc import aio

from service.classifier import Answer, Classifier, Query, Result
from service.errors import ConvoyError, EngineError, ImageFault, InvalidImageError, UnusableImagesError
from service.repository import Repository
from service.rpc.describe import NAMED_FAULTS, details, fault, summary
from service.serving import ServedModel
from service.turns import in_turns

Context = aio.ServicerContext[Any, Any]

DEFAULT_TOP_K = 5

# So many logits are written in the time of a class with its label.
_LOGITS = 16

# Smaller goes first.
_PRIORITIES = {pb.PRIORITY_HIGH: -1, pb.PRIORITY_NORMAL: 0, pb.PRIORITY_LOW: 1}


class ImageClassifier(pb_grpc.ImageClassifierServicer):
    """Translates between the API and the domain; decides nothing.

    Args:
        repository: the models.
        classifier: answers requests.
        default_deadline_s: deadline of a call that brings none.
        max_deadline_s: longest deadline.
    """

    def __init__(
        self, repository: Repository, classifier: Classifier, default_deadline_s: float, max_deadline_s: float
    ) -> None:
        self._repository = repository
        self._classifier = classifier
        self._default_deadline_s = default_deadline_s
        self._max_deadline_s = max_deadline_s

    def refusal(self, context: Context) -> ConvoyError | None:
        """Why no call of `Classify` could be admitted now, whatever its message; None if one could."""
        return self._classifier.refusal(self._repository.names(), time.monotonic() + self._budget_s(context))

    async def Classify(self, request: pb.ClassifyRequest, context: Context) -> pb.ClassifyResponse:  # noqa: N802  # the name is the API's
        """Classifies images."""
        arrived = time.monotonic()
        model = self._model(request)
        query = Query(
            top_k=request.top_k or DEFAULT_TOP_K,
            min_score=request.min_score,
            logits=request.return_logits,
            priority=_PRIORITIES.get(request.priority, 0),
        )
        shadow = self._repository.shadow(model.name, model)
        deadline = arrived + self._budget_s(context)
        self._classifier.check_count(len(request.images))  # before they are copied
        images = tuple(request.images)  # once: each look at a field of bytes copies it
        del request  # it has copies of its own
        result = await self._classifier.classify(model, images, query, deadline, shadow)
        _raise_if_all_failed(result)
        return await _response(model, result, time.monotonic() - arrived)

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:  # noqa: N802
        """Lists what is served."""
        del request, context
        return pb.ListModelsResponse(models=[summary(self._repository, model) for model in self._repository])

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:  # noqa: N802
        """Describes one version."""
        del context
        found = self._model(request)
        if not request.HasField("version"):  # not the one that the split has drawn: it would be another each time
            found = self._repository.default(found.name) or found
        return details(self._repository, found)

    def _model(self, request: pb.ClassifyRequest | pb.GetModelRequest) -> ServedModel:
        return self._repository.get(request.model, request.version if request.HasField("version") else None)

    def _budget_s(self, context: Context) -> float:
        remaining: float | None = context.time_remaining()  # None without a deadline, whatever its type says
        return min(self._default_deadline_s if remaining is None else remaining, self._max_deadline_s)


def _raise_if_all_failed(result: Result) -> None:
    """A request of which nothing can be used is an error of the whole call."""
    faults = [outcome for outcome in result.outcomes if isinstance(outcome, InvalidImageError)]
    if len(faults) < len(result.outcomes):
        return
    if any(each.reason is ImageFault.NON_FINITE_OUTPUT for each in faults):
        raise EngineError("the model's output is not finite for any image of the request")
    some = enumerate(faults[:NAMED_FAULTS])
    named = "; ".join(f"image {position} ({each.reason.name}): {each}" for position, each in some)
    more = len(faults) - NAMED_FAULTS
    raise UnusableImagesError(named if more <= 0 else f"{named}; and {more} more of {len(faults)} images", faults)


async def _response(model: ServedModel, result: Result, total_s: float) -> pb.ClassifyResponse:
    labels = model.version.manifest.classes
    timing = result.timing
    # Built in place: a message given to another one's constructor is copied into it, and so are its parts.
    response = pb.ClassifyResponse(
        model=model.name,
        version=model.number,
        timing=pb.Timing(
            queue_us=_us(timing.queue_s),
            decode_us=_us(timing.decode_s),
            inference_us=_us(timing.inference_s),
            total_us=_us(total_s),
        ),
    )
    await in_turns(_filled(response, result, labels), _places(result))
    return response


def _filled(response: pb.ClassifyResponse, result: Result, labels: tuple[str, ...]) -> Iterator[pb.ImageResult]:
    for outcome in result.outcomes:
        message = response.results.add()
        _fill(message, outcome, labels)
        yield message


def _places(result: Result) -> int:
    """Classes of one image, or what a float32 of each class costs beside one."""
    for outcome in result.outcomes:
        if isinstance(outcome, Answer):
            return len(outcome.classes) + (0 if outcome.logits is None else len(outcome.logits) // _LOGITS)
    return 1


def _fill(message: pb.ImageResult, outcome: Answer | InvalidImageError, labels: tuple[str, ...]) -> None:
    if isinstance(outcome, InvalidImageError):
        message.error.CopyFrom(fault(outcome))
        return
    classification = message.classification
    classification.SetInParent()  # also where no class reaches the minimal score
    for index, score in outcome.classes:
        place = classification.classes.add()  # by keywords it takes nearly twice the time
        place.index = index
        place.label = labels[index]
        place.score = score
    if outcome.logits is not None:
        classification.logits.extend(outcome.logits.tolist())


def _us(seconds: float) -> int:
    return round(seconds * 1_000_000)
