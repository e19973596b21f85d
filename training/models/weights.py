"""Weights into models, strictly: what does not fit is refused with both lists of names, never skipped in silence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from service.errors import TrainingError
from training.models.architecture import Classifier, within
from training.models.registry import describe, published
from training.models.weights_file import WeightsFile, read_weights

_SHOWN = 8


class WeightsMismatchError(TrainingError):
    """The file does not fit the model.

    Attributes:
        missing: entries of the model that the file lacks.
        unexpected: entries of the file that the model lacks.
        mismatched: entries of both whose shapes differ, or of which one is floating-point and the other is not.
    """

    def __init__(
        self, message: str, missing: tuple[str, ...], unexpected: tuple[str, ...], mismatched: tuple[str, ...]
    ) -> None:
        super().__init__(message)
        self.missing = missing
        self.unexpected = unexpected
        self.mismatched = mismatched


@dataclass(frozen=True)
class LoadReport:
    """What became of each entry of the model and of the file.

    Attributes:
        path: of the file.
        sha256: of the file, in hexadecimal.
        verified: its name carries a hash, and the file has it.
        loaded: entries of the model that have the file's values now.
        adapted: those of `loaded` that were fitted to other input channels.
        replaced: entries of the model that keep their initial values: ignored on demand, or BatchNorm's counters of
            batches, which have no effect on the outputs, where the file has none of them.
        skipped: entries of the file that were not used: ignored on demand, or of auxiliary heads that the model lacks.
    """

    path: Path
    sha256: str
    verified: bool
    loaded: tuple[str, ...]
    adapted: tuple[str, ...]
    replaced: tuple[str, ...]
    skipped: tuple[str, ...]


def load_weights(
    model: Classifier,
    path: Path | str,
    *,
    check_hash: bool = True,
    ignore: Sequence[str] = (),
    adapt_input: bool = False,
) -> LoadReport:
    """Loads a checkpoint of the same architecture into `model`; on an error the model is unchanged.

    Three differences are no error. What stands before every name of the file is left out: "module." is from
    `DistributedDataParallel`, "_orig_mod." from `torch.compile`, others from modules that people put a classifier into.
    The file may have auxiliary heads that the model was built without. And it may lack
    all of BatchNorm's `num_batches_tracked`, which PyTorch did not have before 0.4.1 and which older files of
    torchvision lack (resnet50-0676ba61, inception_v3_google-0cc3c7bd); they are not used in the computation.

    Args:
        model: of any device and floating-point type; values are converted.
        path: `.safetensors`, else a PyTorch checkpoint: names to tensors, possibly under "model" or "state_dict".
        check_hash: compare the SHA-256 with the digits in the name, if there are any.
        ignore: prefixes of entries that keep their initial values, such as the head ("fc") for other classes.
        adapt_input: fit the first convolution to the model's input channels.

    Raises:
        TrainingError: the file cannot be read, is damaged or holds values that are not finite.
        WeightsMismatchError: names or shapes differ; the message lists them both ways.
    """
    file = read_weights(Path(path), check_hash=check_hash)
    own = model.state_dict()
    state = raw = _unwrapped(file.state, own)
    if adapt_input:
        state = adapt_input_channels(raw, describe(model.config.name).stem, model.config.in_channels)
    skipped = {name for name in state if within(name, (*ignore, *_missing_aux(model)))}
    replaced = {name for name in own if within(name, ignore)} | (set() if _counters(state) else _counters(own))
    wanted = {name: tensor for name, tensor in own.items() if name not in replaced}
    given = {name: tensor for name, tensor in state.items() if name not in skipped}
    _compare(model, file, wanted, given)
    _check_finite(file.path, given)
    model.load_state_dict(given, strict=False)  # names and shapes were compared above, with a better message
    return LoadReport(
        path=file.path,
        sha256=file.sha256,
        verified=file.verified,
        loaded=tuple(wanted),
        adapted=tuple(name for name in wanted if given[name] is not raw[name]),
        replaced=tuple(name for name in own if name in replaced),
        skipped=tuple(name for name in state if name in skipped),
    )


def _unwrapped(state: Mapping[str, Tensor], own: Iterable[str]) -> dict[str, Tensor]:
    """The entries without a first part that all their names share and none of the model's `own` has."""
    known = {name.partition(".")[0] for name in own}
    unwrapped = dict(state)
    while len(parts := {name.partition(".")[0] for name in unwrapped}) == 1 and not parts & known:
        if not all("." in name for name in unwrapped):
            break
        unwrapped = {name.partition(".")[2]: tensor for name, tensor in unwrapped.items()}
    return unwrapped


def adapt_input_channels(state: Mapping[str, Tensor], stem: str, in_channels: int) -> dict[str, Tensor]:
    """Fits the first convolution, float[O, C, kh, kw] at `<stem>.weight`, to other input channels.

    To one channel: the sum over the old ones, which gives the response to a gray image in colour. To more: the old
    ones in turn, scaled so that the response to equal channels stays.

    Returns:
        The same entries; only that weight is new, and only if it is there and its channels differ.
    """
    name = f"{stem}.weight"
    if name not in state or state[name].ndim != 4:  # noqa: PLR2004 - O, C, kh, kw
        return dict(state)  # the comparison of all names and shapes says more than that this one is missing
    adapted, weight = dict(state), state[name]
    channels = weight.shape[1]
    if in_channels == 1 != channels:
        adapted[name] = weight.sum(1, keepdim=True)
    elif in_channels != channels:
        order = torch.arange(in_channels) % channels
        adapted[name] = weight[:, order] * (channels / in_channels)
    return adapted


def _missing_aux(model: Classifier) -> tuple[str, ...]:
    """Auxiliary modules of the architecture that the model was built without."""
    modules = dict(model.named_modules())
    heads = (head.partition(".")[0] for head in describe(model.config.name).aux_heads)
    return tuple(head for head in heads if head not in modules)


def _counters(names: Iterable[str]) -> set[str]:
    """The counters of batches among the names; PyTorch before 0.4.1 had none."""
    return {name for name in names if name.endswith(".num_batches_tracked")}


def _compare(model: Classifier, file: WeightsFile, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    missing = tuple(name for name in own if name not in state)
    unexpected = tuple(name for name in state if name not in own)
    both = [name for name in own if name in state]
    mismatched = tuple(name for name in both if not _alike(own[name], state[name]))
    if not (missing or unexpected or mismatched):
        return
    parts = [
        _list("missing in the file", missing, str),
        _list("unknown to the model", unexpected, str),
        _list("of another shape", mismatched, lambda n: f"{n} {_kind(state[n])} for {_kind(own[n])}"),
    ]
    listed = "; ".join(part for part in parts if part)
    message = f"{file.path} does not fit this {model.config.name}{_origin(model, file)}: {listed}"
    raise WeightsMismatchError(message, missing, unexpected, mismatched)


def _origin(model: Classifier, file: WeightsFile) -> str:
    """Which other model the weights are from, where the file or its name says so."""
    if file.model:
        name, options = file.model
        if name != model.config.name:
            return f" (the file is of {name})"
        own = model.config.options()
        other = [f"model.options.{key}={value}" for key, value in options.items() if own.get(key) != value]
        return f" (the file is of one with {', '.join(other)})" if other else ""
    known = published(file.path.name)
    return f" (the file is torchvision's {known[0].name})" if known and known[0].name != model.config.name else ""


def _alike(own: Tensor, other: Tensor) -> bool:
    return own.shape == other.shape and own.is_floating_point() == other.is_floating_point()


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _list(what: str, names: Sequence[str], show: Callable[[str], str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} {what} ({', '.join(map(show, names[:_SHOWN]))}{more})"


def _check_finite(path: Path, state: Mapping[str, Tensor]) -> None:
    """There are such files, published ones too: torchvision's `vgg16_features` has a classifier of NaN."""
    broken = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if broken:
        raise TrainingError(f"{path} holds values that are not finite in {', '.join(broken[:_SHOWN])}")
