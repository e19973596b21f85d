"""GoogLeNet: Szegedy et al., "Going Deeper with Convolutions", arXiv:1409.4842, with batch normalisation.

Names, shapes and initialisation are those of torchvision, so that its published weights load strictly. They were
trained on pixels scaled to [-1, 1]: torchvision's `transform_input` undoes the ImageNet normalisation for them, which
equals normalising with mean and standard deviation 0.5 at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from service.artifact import InputSpec, Resize
from training.models.architecture import Architecture, Classifier, Config, PublishedWeights, TrainingOutputs, option
from training.models.layers import scaled


@dataclass(frozen=True, kw_only=True)
class GoogLeNetConfig(Config):
    """GoogLeNet, also known as Inception v1."""

    aux: bool = option(False, "two auxiliary heads help training; they are left out of evaluation and export")
    small_images: bool = option(
        False, "for images of about 32 pixels: the first convolution is 3x3 with stride 1, the first two poolings go"
    )
    width: float = option(1.0, "multiplies the channels of every layer", 0.1, 8)
    dropout: float = option(0.2, "probability of dropping a feature before the last layer", 0, 0.95)
    aux_dropout: float = option(0.7, "the same in the auxiliary heads", 0, 0.95)

    @property
    def min_size(self) -> int:
        """The poolings round up, so that little is needed; torchvision's bound for its stem."""
        return 2 if self.small_images else 15


class ConvNorm(nn.Module):
    """Convolution without bias, batch normalisation with epsilon 1e-3, ReLU; `kwargs` are those of the convolution."""

    def __init__(self, channels: int, out: int, **kwargs: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, bias=False, **kwargs)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """float32[N, channels, H, W] to float32[N, out, H', W'], not negative."""
        return functional.relu(self.bn(self.conv(x)), inplace=True)  # [N, out, H', W']


class Inception(nn.Module):
    """Four branches side by side: 1x1; 1x1 and 3x3; the same narrower; max pooling and 1x1.

    The third branch has a 5x5 convolution in the paper and a 3x3 in the published weights.
    """

    def __init__(self, channels: int, one: int, branch2: tuple[int, int], branch3: tuple[int, int], pool: int) -> None:
        super().__init__()
        self.branch1 = ConvNorm(channels, one, kernel_size=1)
        self.branch2 = _reduced(channels, *branch2)
        self.branch3 = _reduced(channels, *branch3)
        self.branch4 = nn.Sequential(
            nn.MaxPool2d(3, stride=1, padding=1, ceil_mode=True), ConvNorm(channels, pool, kernel_size=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """float32[N, channels, H, W] to float32[N, sum of the branches, H, W]."""
        branches = (self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x))  # each [N, ., H, W]
        return torch.cat(branches, 1)  # [N, sum, H, W]


def _reduced(channels: int, reduced: int, out: int) -> nn.Sequential:
    return nn.Sequential(ConvNorm(channels, reduced, kernel_size=1), ConvNorm(reduced, out, kernel_size=3, padding=1))


class Auxiliary(nn.Module):
    """A classifier on a 4x4 grid of an inner feature map."""

    def __init__(self, channels: int, config: GoogLeNetConfig) -> None:
        super().__init__()
        reduced, hidden = scaled(128, config.width), scaled(1024, config.width)
        self.conv = ConvNorm(channels, reduced, kernel_size=1)
        self.fc1 = nn.Linear(reduced * 4 * 4, hidden)
        self.fc2 = nn.Linear(hidden, config.num_classes)
        self.dropout = nn.Dropout(config.aux_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """float32[N, channels, H, W] to logits float32[N, K]."""
        x = self.conv(functional.adaptive_avg_pool2d(x, 4))  # [N, 128, 4, 4]
        x = functional.relu(self.fc1(x.flatten(1)), inplace=True)  # [N, 1024]
        logits: Tensor = self.fc2(self.dropout(x))  # [N, K]
        return logits


class GoogLeNet(Classifier):
    """A stem and nine inception modules in three resolutions."""

    config: GoogLeNetConfig
    aux_weight: ClassVar[float] = 0.3

    def __init__(self, config: GoogLeNetConfig) -> None:
        super().__init__(config)
        wide = partial(scaled, width=config.width)
        kernel, stride = (3, 1) if config.small_images else (7, 2)
        self.conv1 = ConvNorm(config.in_channels, wide(64), kernel_size=kernel, stride=stride, padding=kernel // 2)
        self.conv2 = ConvNorm(wide(64), wide(64), kernel_size=1)
        self.conv3 = ConvNorm(wide(64), wide(192), kernel_size=3, padding=1)
        self._channels = wide(192)
        self.inception3a = self._inception(64, (96, 128), (16, 32), 32)
        self.inception3b = self._inception(128, (128, 192), (32, 96), 64)
        self.inception4a = self._inception(192, (96, 208), (16, 48), 64)
        after_4a = self._channels
        self.inception4b = self._inception(160, (112, 224), (24, 64), 64)
        self.inception4c = self._inception(128, (128, 256), (24, 64), 64)
        self.inception4d = self._inception(112, (144, 288), (32, 64), 64)
        after_4d = self._channels
        self.inception4e = self._inception(256, (160, 320), (32, 128), 128)
        self.inception5a = self._inception(256, (160, 320), (32, 128), 128)
        self.inception5b = self._inception(384, (192, 384), (48, 128), 128)
        self.aux1 = Auxiliary(after_4a, config) if config.aux else None
        self.aux2 = Auxiliary(after_4d, config) if config.aux else None
        self.dropout = nn.Dropout(config.dropout)
        self.fc = nn.Linear(self._channels, config.num_classes)
        self.apply(_initialise)

    def _inception(self, one: int, branch2: tuple[int, int], branch3: tuple[int, int], pool: int) -> Inception:
        """The next module; keeps count of the channels."""
        wide = partial(scaled, width=self.config.width)
        before = self._channels
        self._channels = wide(one) + wide(branch2[1]) + wide(branch3[1]) + wide(pool)
        pair2, pair3 = (wide(branch2[0]), wide(branch2[1])), (wide(branch3[0]), wide(branch3[1]))
        return Inception(before, wide(one), pair2, pair3, wide(pool))

    def forward(self, x: Tensor) -> Tensor | TrainingOutputs:
        """float32[N, C, H, W] to logits float32[N, K]; the shapes are those of 224x224 at width 1.

        In training mode with auxiliary heads it returns `TrainingOutputs`.
        """
        self.check_batch(x)  # [N, 3, 224, 224]
        x = self._stem_pool(self.conv1(x))  # [N, 64, 56, 56]
        x = self._stem_pool(self.conv3(self.conv2(x)))  # [N, 192, 28, 28]
        x = self.inception3a(x)  # [N, 256, 28, 28]
        x = self.inception3b(x)  # [N, 480, 28, 28]
        x = functional.max_pool2d(x, 3, stride=2, ceil_mode=True)  # [N, 480, 14, 14]
        x = inner1 = self.inception4a(x)  # [N, 512, 14, 14]
        x = self.inception4b(x)  # [N, 512, 14, 14]
        x = self.inception4c(x)  # [N, 512, 14, 14]
        x = inner2 = self.inception4d(x)  # [N, 528, 14, 14]
        x = self.inception4e(x)  # [N, 832, 14, 14]
        x = functional.max_pool2d(x, 2, stride=2, ceil_mode=True)  # [N, 832, 7, 7]
        x = self.inception5a(x)  # [N, 832, 7, 7]
        x = self.inception5b(x)  # [N, 1024, 7, 7]
        x = x.mean((2, 3))  # [N, 1024]
        if self.training and self.aux1 is not None and self.aux2 is not None:
            aux_logits = (self.aux1(inner1), self.aux2(inner2))  # twice [N, K]
            return TrainingOutputs(self.fc(self.dropout(x)), aux_logits)  # thrice [N, K]
        logits: Tensor = self.fc(self.dropout(x))  # [N, K]
        return logits

    def _stem_pool(self, x: Tensor) -> Tensor:
        if self.config.small_images:
            return x  # [N, C, H, W]
        return functional.max_pool2d(x, 3, stride=2, ceil_mode=True)  # [N, C, H/2, W/2]


def _initialise(module: nn.Module) -> None:
    """Truncated normal with deviation 0.01; BatchNorm starts as PyTorch makes it: 1 and 0."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, mean=0.0, std=0.01, a=-2, b=2)


ARCHITECTURES = (
    Architecture(
        family="googlenet",
        build=GoogLeNet,
        config=GoogLeNetConfig(name="googlenet"),
        input=InputSpec(height=224, width=224, resize=Resize(shorter_side=256)),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        stem="conv1.conv",
        head="fc",
        aux_heads=("aux1.fc2", "aux2.fc2"),
        stages=(
            ("conv1", "conv2", "conv3"),
            ("inception3a", "inception3b"),
            ("inception4a", "inception4b", "inception4c", "inception4d", "inception4e"),
            ("inception5a", "inception5b"),
            ("fc",),
        ),
        parameters=6_624_904,
        weights=(PublishedWeights("googlenet-1378be20.pth", 69.778),),
    ),
)
