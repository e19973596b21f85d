"""The small network of introductory courses (Keras's "Convolutional Neural Network" tutorial), for 28x28 images."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from service.artifact import InputSpec, Resize
from training.models.architecture import Architecture, Classifier, Config, option
from training.models.layers import pool_to, scaled


@dataclass(frozen=True, kw_only=True)
class ConvNetConfig(Config):
    """Three 3x3 convolutions without padding and two linear layers."""

    width: float = option(1.0, "multiplies the channels and units of every layer but the last", 0.1, 32)
    dropout: float = option(0.0, "probability of dropping a unit before each linear layer", 0, 0.95)

    @property
    def min_size(self) -> int:
        """Three 3x3 convolutions without padding, the first two halved afterwards."""
        return 18


class ConvNet(Classifier):
    """Images other than 28x28 are pooled to the 3x3 grid that 28x28 gives."""

    config: ConvNetConfig

    def __init__(self, config: ConvNetConfig) -> None:
        super().__init__(config)
        c1, c2, c3, f1 = (scaled(n, config.width) for n in (32, 64, 64, 64))
        self.conv1 = nn.Conv2d(config.in_channels, c1, kernel_size=3)
        self.conv2 = nn.Conv2d(c1, c2, kernel_size=3)
        self.conv3 = nn.Conv2d(c2, c3, kernel_size=3)
        self.fc1 = nn.Linear(c3 * 3 * 3, f1)
        self.fc2 = nn.Linear(f1, config.num_classes)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """float32[N, C, H, W] to logits float32[N, K]; the shapes are those of 28x28 at width 1."""
        self.check_batch(x)  # [N, C, 28, 28]
        x = functional.max_pool2d(functional.relu(self.conv1(x)), 2)  # [N, 32, 13, 13]
        x = functional.max_pool2d(functional.relu(self.conv2(x)), 2)  # [N, 64, 5, 5]
        x = pool_to(functional.relu(self.conv3(x)), 3)  # [N, 64, 3, 3]
        x = functional.relu(self.fc1(self.dropout(x.flatten(1))))  # [N, 64]
        logits: Tensor = self.fc2(self.dropout(x))  # [N, K]
        return logits


ARCHITECTURES = (
    Architecture(
        family="convnet",
        build=ConvNet,
        config=ConvNetConfig(name="convnet", num_classes=10, in_channels=1),
        input=InputSpec(height=28, width=28, channels=1, resize=Resize(mode="stretch")),
        mean=(0.5,),
        std=(0.5,),
        stem="conv1",
        head="fc2",
        stages=(("conv1",), ("conv2",), ("conv3",), ("fc1",), ("fc2",)),
        parameters=93_322,
    ),
)
