"""How published classifiers want their pixels: presets by family, and what a user says instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from service import validation
from service.artifact import InputSpec, Resize, Weights
from service.errors import ConfigurationError

Layout = Literal["nchw", "nhwc"]
Scores = Literal["logits", "probabilities"]

# In pixels. Presets are of networks that see 224 of them or about.
_SMALL = 96


@dataclass(frozen=True)
class Normalisation:
    """What a network expects of a pixel: (p - mean) / std per channel, p in 0..1, then the channel order.

    `mean` and `std` are always red, green, blue (or one value), also for networks that want BGR.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    order: Literal["rgb", "bgr"] = "rgb"

    def ordered(self, values: Sequence[float]) -> NDArray[np.float64]:
        """Per-channel values in the network's own order."""
        return np.asarray(values[::-1] if self.order == "bgr" else values, np.float64)

    def apply(self, pixels: NDArray[np.uint8], layout: Layout, dtype: np.dtype[np.floating]) -> NDArray[np.floating]:
        """What the network is fed for uint8[N, H, W, C], computed without any graph."""
        own = pixels[..., ::-1] if self.order == "bgr" else pixels
        x = (own.astype(np.float64) / 255 - self.ordered(self.mean)) / self.ordered(self.std)
        return np.ascontiguousarray(x if layout == "nhwc" else x.transpose(0, 3, 1, 2)).astype(dtype)


@dataclass(frozen=True)
class Preset:
    """How a family of published models wants its images.

    `crop_share`: side of the centre crop as a share of the shorter side after the resize; None stretches. Of inputs
    below 96 pixels it is 1.
    """

    rule: Normalisation
    crop_share: float | None
    help: str


PRESETS = {
    "imagenet-torchvision": Preset(
        Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), 224 / 256, "torchvision, timm, most of PyTorch"
    ),
    "imagenet-caffe-bgr": Preset(
        Normalisation((123.68 / 255, 116.779 / 255, 103.939 / 255), (1 / 255,) * 3, "bgr"),
        224 / 256,
        "Caffe's ImageNet models and Keras' ResNet and VGG: BGR minus the mean",
    ),
    "tf-inception": Preset(Normalisation((0.5,) * 3, (0.5,) * 3), 0.875, "TensorFlow's Inception and MobileNet: -1..1"),
    "zero-one": Preset(Normalisation((0.0,) * 3, (1.0,) * 3), None, "pixels as 0..1, stretched to the input"),
    "none": Preset(Normalisation((0.0,) * 3, (1 / 255,) * 3), None, "pixels as 0..255, stretched to the input"),
}


@dataclass(frozen=True)
class Request:
    """What is imported, and how it is to be understood. None leaves a choice to the graph or the preset.

    Attributes:
        model: the ONNX file; external data beside it is merged.
        labels: text file with one class per line, in the order of the outputs.
        name: of the model in the repository.
        preset: key of `PRESETS`.
        mean: instead of the preset's: per channel red, green, blue (or one), of pixels in 0..1.
        std: the same.
        order: channel order that the network wants.
        resize: `crop` or `stretch`.
        shorter_side: in pixels, before a crop.
        interpolation: `bilinear` or `bicubic`.
        layout: where the channels are.
        size: height and width in pixels, for graphs that take any.
        output: name of the output with the scores.
        scores: what the output means.
        canary: encoded images to prove the version with; a few are drawn if there are none.
        weights: origin and licence.
    """

    model: Path
    labels: Path
    name: str
    preset: str = "imagenet-torchvision"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    order: Literal["rgb", "bgr"] | None = None
    resize: Literal["crop", "stretch"] | None = None
    shorter_side: int | None = None
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    layout: Layout | None = None
    size: tuple[int, int] | None = None
    output: str | None = None
    scores: Scores | None = None
    canary: Sequence[Path] = ()
    weights: Weights = field(default_factory=lambda: Weights(source="imported"))


def normalisation(request: Request, channels: int) -> Normalisation:
    """The preset's normalisation with what was given instead of it.

    Raises:
        ConfigurationError: an unknown preset, or values that do not fit the channels.
    """
    preset = _preset(request)
    mean, std = request.mean or preset.rule.mean, request.std or preset.rule.std
    if channels == 1 and len(set(mean)) == len(set(std)) == 1:
        mean, std = mean[:1], std[:1]
    if channels == 3:  # noqa: PLR2004  red, green, blue
        mean, std = (values * 3 if len(values) == 1 else values for values in (mean, std))
    if len(mean) != channels or len(std) != channels:
        raise ConfigurationError(
            f"mean {mean} and std {std} do not fit images of {channels} channels; give --mean and --std with "
            f"{channels} values, of pixels in 0..1"
        )
    if not all(0 <= value <= 1 for value in mean) or not all(0 < value <= 1 for value in std):
        raise ConfigurationError(
            f"mean {mean} has to be within 0..1 and std {std} above 0 and up to 1, because pixels are in 0..1 here; "
            "divide values for pixels in 0..255 by 255"
        )
    return Normalisation(mean, std, "rgb" if channels == 1 else request.order or preset.rule.order)


def input_spec(request: Request, height: int, width: int, channels: Literal[1, 3]) -> InputSpec:
    """The resize rule: the preset's with what was given instead of it.

    Raises:
        ConfigurationError: the parts contradict each other.
    """
    share = _preset(request).crop_share
    mode = request.resize or ("stretch" if share is None else "crop")
    if mode == "stretch" and request.shorter_side is not None:
        raise ConfigurationError("--shorter-side belongs to --resize crop; images are stretched to the input here")
    longest = max(height, width)
    if longest < _SMALL:  # networks for thumbnails see all of them
        share = None
    side = None if mode == "stretch" else request.shorter_side or round(longest / (share or 1))
    if side is not None and side < longest:
        raise ConfigurationError(f"--shorter-side {side} is smaller than the input of {height}x{width}")
    try:
        resize = Resize(mode=mode, shorter_side=side, interpolation=request.interpolation)
        return InputSpec(height=height, width=width, channels=channels, resize=resize)
    except ValidationError as error:
        (fault, *_) = error.errors()
        raise ConfigurationError(
            f"an input of {height}x{width} with a shorter side of {side} cannot be: {validation.message(fault)}"
        ) from None


def _preset(request: Request) -> Preset:
    try:
        return PRESETS[request.preset]
    except KeyError:
        raise ConfigurationError(f"unknown preset {request.preset!r}; choose among {', '.join(PRESETS)}") from None
