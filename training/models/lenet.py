"""LeNet-5: LeCun et al., "Gradient-Based Learning Applied to Document Recognition", 1998."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from service.artifact import InputSpec, Resize
from training.models.architecture import Architecture, Classifier, Config, option
from training.models.layers import pool_to, scaled


@dataclass(frozen=True, kw_only=True)
class LeNetConfig(Config):
    """LeNet-5. The paper's partial connections and trained pooling are left out, as everywhere today."""

    classic: bool = option(False, "average pooling and tanh, as in 1998, instead of max pooling and ReLU")
    width: float = option(1.0, "multiplies the channels and units of every layer but the last", 0.1, 32)
    dropout: float = option(0.0, "probability of dropping a unit before each of the last two layers", 0, 0.95)

    @property
    def min_size(self) -> int:
        """Two 5x5 convolutions without padding, each halved afterwards."""
        return 16


class LeNet(Classifier):
    """Two convolutions and three linear layers. Images other than 32x32 are pooled to the 5x5 grid of the paper."""

    config: LeNetConfig

    def __init__(self, config: LeNetConfig) -> None:
        super().__init__(config)
        c1, c2, f1, f2 = (scaled(n, config.width, multiple=1) for n in (6, 16, 120, 84))
        self.conv1 = nn.Conv2d(config.in_channels, c1, kernel_size=5)
        self.conv2 = nn.Conv2d(c1, c2, kernel_size=5)
        self.fc1 = nn.Linear(c2 * 5 * 5, f1)
        self.fc2 = nn.Linear(f1, f2)
        self.fc3 = nn.Linear(f2, config.num_classes)
        self.dropout = nn.Dropout(config.dropout)
        self.activation = torch.tanh if config.classic else functional.relu
        self.pool = functional.avg_pool2d if config.classic else functional.max_pool2d

    def forward(self, x: Tensor) -> Tensor:
        """float32[N, C, H, W] to logits float32[N, K]; the shapes are those of 32x32 at width 1."""
        self.check_batch(x)  # [N, C, 32, 32]
        x = self.activation(self.conv1(x))  # [N, 6, 28, 28]
        x = self.pool(x, 2)  # [N, 6, 14, 14]
        x = self.activation(self.conv2(x))  # [N, 16, 10, 10]
        x = pool_to(self.pool(x, 2), 5)  # [N, 16, 5, 5]
        x = self.activation(self.fc1(x.flatten(1)))  # [N, 120]
        x = self.activation(self.fc2(self.dropout(x)))  # [N, 84]
        logits: Tensor = self.fc3(self.dropout(x))  # [N, K]
        return logits


ARCHITECTURES = (
    Architecture(
        family="lenet",
        build=LeNet,
        config=LeNetConfig(name="lenet5", num_classes=10, in_channels=1),
        input=InputSpec(height=32, width=32, channels=1, resize=Resize(mode="stretch")),
        mean=(0.5,),
        std=(0.5,),
        stem="conv1",
        head="fc3",
        stages=(("conv1",), ("conv2",), ("fc1",), ("fc2",), ("fc3",)),
        parameters=61_706,
    ),
)
