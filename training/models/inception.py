"""Inception v3: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", arXiv:1512.00567.

Names, shapes and initialisation are those of torchvision, so that its published weights load strictly. As with
GoogLeNet, mean and standard deviation 0.5 equal torchvision's ImageNet normalisation followed by `transform_input`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from service.artifact import InputSpec, Resize
from training.models.architecture import Architecture, Classifier, Config, PublishedWeights, TrainingOutputs, option
from training.models.googlenet import ConvNorm
from training.models.layers import scaled

# Below this size of the inner map, the published pooling of the auxiliary head leaves less than its 5x5 convolution
# needs. It is what images of 299 pixels give.
_AUX_SIZE = 17


@dataclass(frozen=True, kw_only=True)
class InceptionConfig(Config):
    """Inception v3."""

    aux: bool = option(False, "an auxiliary head helps training; it is left out of evaluation and export")
    small_images: bool = option(
        False, "for images of about 32 pixels: the stem keeps the resolution (padded, stride 1, no max pooling)"
    )
    width: float = option(1.0, "multiplies the channels of every layer", 0.1, 8)
    dropout: float = option(0.5, "probability of dropping a feature before the last layer", 0, 0.95)

    @property
    def min_size(self) -> int:
        """Smallest size that leaves one pixel after the reductions without padding."""
        return 7 if self.small_images else 75


def _mean3(x: Tensor) -> Tensor:
    """3x3 average pooling that keeps the size; the zeros of the border count, as in the published weights."""
    return functional.avg_pool2d(x, kernel_size=3, stride=1, padding=1)


class InceptionA(nn.Module):
    """Branches 1x1, 5x5, two 3x3, pooling; keeps the resolution."""

    def __init__(self, channels: int, pool: int, width: float) -> None:
        super().__init__()
        wide = partial(scaled, width=width)
        self.branch1x1 = ConvNorm(channels, wide(64), kernel_size=1)
        self.branch5x5_1 = ConvNorm(channels, wide(48), kernel_size=1)
        self.branch5x5_2 = ConvNorm(wide(48), wide(64), kernel_size=5, padding=2)
        self.branch3x3dbl_1 = ConvNorm(channels, wide(64), kernel_size=1)
        self.branch3x3dbl_2 = ConvNorm(wide(64), wide(96), kernel_size=3, padding=1)
        self.branch3x3dbl_3 = ConvNorm(wide(96), wide(96), kernel_size=3, padding=1)
        self.branch_pool = ConvNorm(channels, wide(pool), kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """float32[N, channels, H, W] to float32[N, 224 + pool, H, W]."""
        one = self.branch1x1(x)  # [N, 64, H, W]
        five = self.branch5x5_2(self.branch5x5_1(x))  # [N, 64, H, W]
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))  # [N, 96, H, W]
        return torch.cat((one, five, double, self.branch_pool(_mean3(x))), 1)  # [N, 224 + pool, H, W]


class InceptionB(nn.Module):
    """Branches 3x3, two 3x3, max pooling; halves the resolution."""

    def __init__(self, channels: int, width: float) -> None:
        super().__init__()
        wide = partial(scaled, width=width)
        self.branch3x3 = ConvNorm(channels, wide(384), kernel_size=3, stride=2)
        self.branch3x3dbl_1 = ConvNorm(channels, wide(64), kernel_size=1)
        self.branch3x3dbl_2 = ConvNorm(wide(64), wide(96), kernel_size=3, padding=1)
        self.branch3x3dbl_3 = ConvNorm(wide(96), wide(96), kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """float32[N, channels, H, W] to float32[N, 480 + channels, (H - 1) / 2, (W - 1) / 2]."""
        three = self.branch3x3(x)  # [N, 384, H/2, W/2]
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))  # [N, 96, H/2, W/2]
        pooled = functional.max_pool2d(x, kernel_size=3, stride=2)  # [N, channels, H/2, W/2]
        return torch.cat((three, double, pooled), 1)  # [N, 480 + channels, H/2, W/2]


class InceptionC(nn.Module):
    """Branches 1x1, 7x7 as 1x7 and 7x1, that twice, pooling; keeps the resolution."""

    def __init__(self, channels: int, inner: int, width: float) -> None:
        super().__init__()
        out, inner = scaled(192, width), scaled(inner, width)
        self.branch1x1 = ConvNorm(channels, out, kernel_size=1)
        self.branch7x7_1 = ConvNorm(channels, inner, kernel_size=1)
        self.branch7x7_2 = ConvNorm(inner, inner, kernel_size=(1, 7), padding=(0, 3))
        self.branch7x7_3 = ConvNorm(inner, out, kernel_size=(7, 1), padding=(3, 0))
        self.branch7x7dbl_1 = ConvNorm(channels, inner, kernel_size=1)
        self.branch7x7dbl_2 = ConvNorm(inner, inner, kernel_size=(7, 1), padding=(3, 0))
        self.branch7x7dbl_3 = ConvNorm(inner, inner, kernel_size=(1, 7), padding=(0, 3))
        self.branch7x7dbl_4 = ConvNorm(inner, inner, kernel_size=(7, 1), padding=(3, 0))
        self.branch7x7dbl_5 = ConvNorm(inner, out, kernel_size=(1, 7), padding=(0, 3))
        self.branch_pool = ConvNorm(channels, out, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """float32[N, channels, H, W] to float32[N, 768, H, W]."""
        one = self.branch1x1(x)  # [N, 192, H, W]
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))  # [N, 192, H, W]
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))  # [N, inner, H, W]
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))  # [N, 192, H, W]
        return torch.cat((one, seven, double, self.branch_pool(_mean3(x))), 1)  # [N, 768, H, W]


class InceptionD(nn.Module):
    """Branches 3x3, 7x7 and 3x3, max pooling; halves the resolution."""

    def __init__(self, channels: int, width: float) -> None:
        super().__init__()
        inner, out = scaled(192, width), scaled(320, width)
        self.branch3x3_1 = ConvNorm(channels, inner, kernel_size=1)
        self.branch3x3_2 = ConvNorm(inner, out, kernel_size=3, stride=2)
        self.branch7x7x3_1 = ConvNorm(channels, inner, kernel_size=1)
        self.branch7x7x3_2 = ConvNorm(inner, inner, kernel_size=(1, 7), padding=(0, 3))
        self.branch7x7x3_3 = ConvNorm(inner, inner, kernel_size=(7, 1), padding=(3, 0))
        self.branch7x7x3_4 = ConvNorm(inner, inner, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """float32[N, channels, H, W] to float32[N, 512 + channels, (H - 1) / 2, (W - 1) / 2]."""
        three = self.branch3x3_2(self.branch3x3_1(x))  # [N, 320, H/2, W/2]
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))  # [N, 192, H, W]
        seven = self.branch7x7x3_4(seven)  # [N, 192, H/2, W/2]
        pooled = functional.max_pool2d(x, kernel_size=3, stride=2)  # [N, channels, H/2, W/2]
        return torch.cat((three, seven, pooled), 1)  # [N, 512 + channels, H/2, W/2]


class InceptionE(nn.Module):
    """Branches 1x1, 3x3 and two 3x3 that each end in 1x3 beside 3x1, pooling; keeps the resolution."""

    def __init__(self, channels: int, width: float) -> None:
        super().__init__()
        wide = partial(scaled, width=width)
        inner = wide(384)
        self.branch1x1 = ConvNorm(channels, wide(320), kernel_size=1)
        self.branch3x3_1 = ConvNorm(channels, inner, kernel_size=1)
        self.branch3x3_2a = ConvNorm(inner, inner, kernel_size=(1, 3), padding=(0, 1))
        self.branch3x3_2b = ConvNorm(inner, inner, kernel_size=(3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = ConvNorm(channels, wide(448), kernel_size=1)
        self.branch3x3dbl_2 = ConvNorm(wide(448), inner, kernel_size=3, padding=1)
        self.branch3x3dbl_3a = ConvNorm(inner, inner, kernel_size=(1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = ConvNorm(inner, inner, kernel_size=(3, 1), padding=(1, 0))
        self.branch_pool = ConvNorm(channels, wide(192), kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """float32[N, channels, H, W] to float32[N, 2048, H, W]."""
        one = self.branch1x1(x)  # [N, 320, H, W]
        three = self.branch3x3_1(x)  # [N, 384, H, W]
        three = torch.cat((self.branch3x3_2a(three), self.branch3x3_2b(three)), 1)  # [N, 768, H, W]
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))  # [N, 384, H, W]
        double = torch.cat((self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)), 1)  # [N, 768, H, W]
        return torch.cat((one, three, double, self.branch_pool(_mean3(x))), 1)  # [N, 2048, H, W]


class Auxiliary(nn.Module):
    """A classifier on the inner feature map, by way of a 5x5 grid."""

    def __init__(self, channels: int, config: InceptionConfig) -> None:
        super().__init__()
        reduced, out = scaled(128, config.width), scaled(768, config.width)
        self.conv0 = ConvNorm(channels, reduced, kernel_size=1)
        self.conv1 = ConvNorm(reduced, out, kernel_size=5)
        self.fc = nn.Linear(out, config.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """float32[N, channels, H, W] to logits float32[N, K]."""
        if min(x.shape[2:]) < _AUX_SIZE:
            x = functional.adaptive_avg_pool2d(x, 5)  # [N, 768, 5, 5]
        else:
            x = functional.avg_pool2d(x, kernel_size=5, stride=3)  # [N, 768, 5, 5]
        x = self.conv1(self.conv0(x))  # [N, 768, 1, 1]
        logits: Tensor = self.fc(x.mean((2, 3)))  # [N, K]
        return logits


class InceptionV3(Classifier):
    """A stem and eleven inception modules in three resolutions."""

    config: InceptionConfig
    aux_weight: ClassVar[float] = 0.4

    def __init__(self, config: InceptionConfig) -> None:
        super().__init__(config)
        width = config.width
        wide = partial(scaled, width=width)
        stride, padding = (1, 1) if config.small_images else (2, 0)
        self.Conv2d_1a_3x3 = ConvNorm(config.in_channels, wide(32), kernel_size=3, stride=stride, padding=padding)
        self.Conv2d_2a_3x3 = ConvNorm(wide(32), wide(32), kernel_size=3, padding=padding)
        self.Conv2d_2b_3x3 = ConvNorm(wide(32), wide(64), kernel_size=3, padding=1)
        self.Conv2d_3b_1x1 = ConvNorm(wide(64), wide(80), kernel_size=1)
        self.Conv2d_4a_3x3 = ConvNorm(wide(80), wide(192), kernel_size=3, padding=padding)
        after_a = wide(64) + wide(64) + wide(96) + wide(64)
        self.Mixed_5b = InceptionA(wide(192), 32, width)
        self.Mixed_5c = InceptionA(after_a - wide(64) + wide(32), 64, width)
        self.Mixed_5d = InceptionA(after_a, 64, width)
        self.Mixed_6a = InceptionB(after_a, width)
        after_b, after_c = wide(384) + wide(96) + after_a, 4 * wide(192)
        self.Mixed_6b = InceptionC(after_b, 128, width)
        self.Mixed_6c = InceptionC(after_c, 160, width)
        self.Mixed_6d = InceptionC(after_c, 160, width)
        self.Mixed_6e = InceptionC(after_c, 192, width)
        self.AuxLogits = Auxiliary(after_c, config) if config.aux else None
        self.Mixed_7a = InceptionD(after_c, width)
        after_d, after_e = wide(320) + wide(192) + after_c, wide(320) + 4 * wide(384) + wide(192)
        self.Mixed_7b = InceptionE(after_d, width)
        self.Mixed_7c = InceptionE(after_e, width)
        self.dropout = nn.Dropout(config.dropout)
        self.fc = nn.Linear(after_e, config.num_classes)
        self._initialise()

    def _initialise(self) -> None:
        """Truncated normal with deviation 0.1, 0.001 at the end of the auxiliary head."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                std = 0.001 if name == "AuxLogits.fc" else 0.1
                nn.init.trunc_normal_(module.weight, mean=0.0, std=std, a=-2, b=2)

    def forward(self, x: Tensor) -> Tensor | TrainingOutputs:
        """float32[N, C, H, W] to logits float32[N, K]; the shapes are those of 299x299 at width 1.

        In training mode with the auxiliary head it returns `TrainingOutputs`.
        """
        self.check_batch(x)  # [N, 3, 299, 299]
        x = self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))  # [N, 32, 147, 147]
        x = self._stem_pool(self.Conv2d_2b_3x3(x))  # [N, 64, 73, 73]
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))  # [N, 192, 71, 71]
        x = self._stem_pool(x)  # [N, 192, 35, 35]
        x = self.Mixed_5b(x)  # [N, 256, 35, 35]
        x = self.Mixed_5c(x)  # [N, 288, 35, 35]
        x = self.Mixed_5d(x)  # [N, 288, 35, 35]
        x = self.Mixed_6a(x)  # [N, 768, 17, 17]
        x = self.Mixed_6b(x)  # [N, 768, 17, 17]
        x = self.Mixed_6c(x)  # [N, 768, 17, 17]
        x = self.Mixed_6d(x)  # [N, 768, 17, 17]
        x = inner = self.Mixed_6e(x)  # [N, 768, 17, 17]
        x = self.Mixed_7a(x)  # [N, 1280, 8, 8]
        x = self.Mixed_7b(x)  # [N, 2048, 8, 8]
        x = self.Mixed_7c(x)  # [N, 2048, 8, 8]
        x = x.mean((2, 3))  # [N, 2048]
        if self.training and self.AuxLogits is not None:
            return TrainingOutputs(self.fc(self.dropout(x)), (self.AuxLogits(inner),))  # twice [N, K]
        logits: Tensor = self.fc(self.dropout(x))  # [N, K]
        return logits

    def _stem_pool(self, x: Tensor) -> Tensor:
        if self.config.small_images:
            return x  # [N, C, H, W]
        return functional.max_pool2d(x, kernel_size=3, stride=2)  # [N, C, (H - 1) / 2, (W - 1) / 2]


ARCHITECTURES = (
    Architecture(
        family="inception",
        build=InceptionV3,
        config=InceptionConfig(name="inception_v3"),
        input=InputSpec(height=299, width=299, resize=Resize(shorter_side=342)),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        stem="Conv2d_1a_3x3.conv",
        head="fc",
        aux_heads=("AuxLogits.fc",),
        stages=(
            ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3"),
            ("Mixed_5b", "Mixed_5c", "Mixed_5d"),
            ("Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"),
            ("Mixed_7a", "Mixed_7b", "Mixed_7c"),
            ("fc",),
        ),
        parameters=23_834_568,
        weights=(PublishedWeights("inception_v3_google-0cc3c7bd.pth", 77.294, shorter_side=342),),
    ),
)
