"""AlexNet: Krizhevsky, "One weird trick for parallelizing convolutional neural networks", arXiv:1404.5997, 2014.

Names, shapes and initialisation are those of torchvision, so that its published weights load strictly.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from service.artifact import InputSpec, Resize
from training.models.architecture import Architecture, Classifier, Config, PublishedWeights, option
from training.models.layers import pool_to, scaled


@dataclass(frozen=True, kw_only=True)
class AlexNetConfig(Config):
    """AlexNet in one column, without local response normalisation."""

    small_images: bool = option(
        False,
        "for images of about 32 pixels: the first convolution is 3x3 with stride 1, "
        "the linear layers see a 3x3 grid and have 1024 units instead of 6x6 and 4096",
    )
    width: float = option(1.0, "multiplies the channels and units of every layer but the last", 0.1, 8)
    dropout: float = option(0.5, "probability of dropping a unit before each hidden linear layer", 0, 0.95)

    @property
    def min_size(self) -> int:
        """Smallest size that leaves one pixel after three 3x3 poolings of stride 2."""
        return 15 if self.small_images else 63

    @property
    def grid(self) -> int:
        """Height and width of the feature map that the linear layers see."""
        return 3 if self.small_images else 6


class AlexNet(Classifier):
    """Five convolutions and three linear layers."""

    config: AlexNetConfig

    def __init__(self, config: AlexNetConfig) -> None:
        super().__init__(config)
        c1, c2, c3, c4, c5 = (scaled(n, config.width) for n in (64, 192, 384, 256, 256))
        hidden = scaled(1024 if config.small_images else 4096, config.width)
        kernel, stride, padding = (3, 1, 1) if config.small_images else (11, 4, 2)
        self.features = nn.Sequential(
            nn.Conv2d(config.in_channels, c1, kernel, stride, padding),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(c1, c2, kernel_size=5, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(c2, c3, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(c3, c4, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(c4, c5, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2),
        )
        self.classifier = nn.Sequential(
            nn.Dropout(config.dropout),
            nn.Linear(c5 * config.grid**2, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(config.dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, config.num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """float32[N, C, H, W] to logits float32[N, K]; the shapes are those of 224x224 at width 1."""
        self.check_batch(x)  # [N, 3, 224, 224]
        x = self.features(x)  # [N, 256, 6, 6]
        x = pool_to(x, self.config.grid)  # [N, 256, 6, 6]
        logits: Tensor = self.classifier(x.flatten(1))  # [N, K]
        return logits


ARCHITECTURES = (
    Architecture(
        family="alexnet",
        build=AlexNet,
        config=AlexNetConfig(name="alexnet"),
        input=InputSpec(height=224, width=224, resize=Resize(shorter_side=256)),
        stem="features.0",
        head="classifier.6",
        stages=(
            ("features.0",),
            ("features.3",),
            ("features.6", "features.8", "features.10"),
            ("classifier.1",),
            ("classifier.4",),
            ("classifier.6",),
        ),
        parameters=61_100_840,
        weights=(PublishedWeights("alexnet-owt-7be5be79.pth", 56.522),),
    ),
)
