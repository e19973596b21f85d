"""VGG: Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", arXiv:1409.1556.

Names, shapes and initialisation are those of torchvision, so that its published weights load strictly. The variants
without batch normalisation are hard to train from scratch: prefer `_bn`, or a low learning rate with a warm-up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from service.artifact import InputSpec, Resize
from training.models.architecture import Architecture, Classifier, Config, PublishedWeights, option
from training.models.layers import pool_to, scaled

_CHANNELS = (64, 128, 256, 512, 512)


@dataclass(frozen=True, kw_only=True)
class VGGConfig(Config):
    """`convolutions`: per block of equal resolution; each block ends in a max pooling."""

    convolutions: tuple[int, int, int, int, int]
    batch_norm: bool
    small_images: bool = option(
        False,
        "for images of about 32 pixels: the linear layers see a 1x1 grid and have 512 units instead of 7x7 and 4096",
    )
    width: float = option(1.0, "multiplies the channels and units of every layer but the last", 0.1, 8)
    dropout: float = option(0.5, "probability of dropping a unit after each hidden linear layer", 0, 0.95)

    @property
    def min_size(self) -> int:
        """Five poolings, each of which halves the size."""
        return 32

    @property
    def grid(self) -> int:
        """Height and width of the feature map that the linear layers see."""
        return 1 if self.small_images else 7


class VGG(Classifier):
    """Five blocks of 3x3 convolutions and three linear layers."""

    config: VGGConfig

    def __init__(self, config: VGGConfig) -> None:
        super().__init__(config)
        hidden = scaled(512 if config.small_images else 4096, config.width)
        self.features = nn.Sequential(*_features(config))
        self.classifier = nn.Sequential(
            nn.Linear(scaled(_CHANNELS[-1], config.width) * config.grid**2, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(config.dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(config.dropout),
            nn.Linear(hidden, config.num_classes),
        )
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        """float32[N, C, H, W] to logits float32[N, K]; the shapes are those of 224x224 at width 1."""
        self.check_batch(x)  # [N, 3, 224, 224]
        x = self.features(x)  # [N, 512, 7, 7]
        x = pool_to(x, self.config.grid)  # [N, 512, 7, 7]
        logits: Tensor = self.classifier(x.flatten(1))  # [N, K]
        return logits


def _features(config: VGGConfig) -> Iterator[nn.Module]:
    channels = config.in_channels
    for depth, width in zip(config.convolutions, _CHANNELS, strict=True):
        for _ in range(depth):
            before, channels = channels, scaled(width, config.width)
            yield nn.Conv2d(before, channels, kernel_size=3, padding=1)
            if config.batch_norm:
                yield nn.BatchNorm2d(channels)
            yield nn.ReLU(inplace=True)
        yield nn.MaxPool2d(2)


def _initialise(module: nn.Module) -> None:
    """Kaiming for convolutions, N(0, 0.01) for linear layers; BatchNorm starts as PyTorch makes it: 1 and 0."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, 0, 0.01)
        nn.init.zeros_(module.bias)


def _stages(config: VGGConfig) -> tuple[tuple[str, ...], ...]:
    """One stage per block of `features`, then one per linear layer."""
    blocks: list[list[str]] = [[]]
    for index, module in enumerate(_layer_kinds(config)):
        if module == "pool":
            blocks.append([])
        elif module != "relu":
            blocks[-1].append(f"features.{index}")
    linear = ((f"classifier.{index}",) for index in (0, 3, 6))
    return (*(tuple(block) for block in blocks if block), *linear)


def _layer_kinds(config: VGGConfig) -> Iterator[str]:
    unit = ("conv", "norm", "relu") if config.batch_norm else ("conv", "relu")
    for depth in config.convolutions:
        yield from unit * depth
        yield "pool"


def _vgg(
    depth: int, convolutions: tuple[int, int, int, int, int], parameters: tuple[int, int], *files: tuple[str, float]
) -> Iterator[Architecture]:
    """The variants of one depth without and with batch normalisation."""
    for batch_norm, count, (file, top1) in zip((False, True), parameters, files, strict=True):
        name = f"vgg{depth}_bn" if batch_norm else f"vgg{depth}"
        config = VGGConfig(name=name, convolutions=convolutions, batch_norm=batch_norm)
        yield Architecture(
            family="vgg",
            build=VGG,
            config=config,
            input=InputSpec(height=224, width=224, resize=Resize(shorter_side=256)),
            stem="features.0",
            head="classifier.6",
            stages=_stages(config),
            parameters=count,
            weights=(PublishedWeights(f"{name}-{file}.pth", top1),),
        )


ARCHITECTURES = (
    *_vgg(11, (1, 1, 2, 2, 2), (132_863_336, 132_868_840), ("8a719046", 69.020), ("6002323d", 70.370)),
    *_vgg(13, (2, 2, 2, 2, 2), (133_047_848, 133_053_736), ("19584684", 69.928), ("abd245e5", 71.586)),
    *_vgg(16, (2, 2, 3, 3, 3), (138_357_544, 138_365_992), ("397923af", 71.592), ("6c64b313", 73.360)),
    *_vgg(19, (2, 2, 4, 4, 4), (143_667_240, 143_678_248), ("dcbb9e9d", 72.376), ("c79401a0", 74.218)),
)
