"""A residual network of eight layers for photos of about 32 pixels, made to learn them in minutes on a CPU.

It puts together what the records for CIFAR-10 rest on (Page, "How to Train Your ResNet", 2018; Jordan, "94% on CIFAR-10
in 3.29 Seconds", arXiv:2404.00498): a whitening 2x2 convolution as the stem, pooling right after the convolution that
widens, convolutions that start as the identity, logits scaled down, and the mirror image seen beside the image. Here
the second convolution of each stage is a residual branch, and rectifiers stand in place of GELU: they quantise to int8
without loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from service.artifact import InputSpec, Resize
from training.models.architecture import Architecture, Classifier, Config, option
from training.models.layers import scaled

_LOGIT_SCALE = 0.125  # keeps the softmax soft while the head's weights are still random
_LEAST_VARIANCE = 5e-4  # added to the variances, so that directions without any are not blown up


@dataclass(frozen=True, kw_only=True)
class ResNet8Config(Config):
    """A stem, three stages of two 3x3 convolutions, a linear layer."""

    width: float = option(1.0, "multiplies the channels of every stage", 0.1, 8)
    dropout: float = option(0.0, "probability of dropping a feature before the last layer", 0, 0.95)

    mirror: bool = option(
        False,
        "after training, each image is seen beside its mirror image: half to one point more for twice the computation",
    )

    @property
    def min_size(self) -> int:
        """The stem takes one pixel off, and the stages halve three times."""
        return 9


class ShiftNorm(nn.BatchNorm2d):
    """BatchNorm that learns a shift but no scale: `weight` is a constant 1.

    As the scale is positive, the normalisation can change places with a maximum.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        del self.weight
        self.register_buffer("weight", torch.ones(channels))


class Convolution(nn.Module):
    """3x3 convolution, normalisation, rectifier; `pool` halves the resolution by the maximum."""

    def __init__(self, channels: int, planes: int, *, pool: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, planes, kernel_size=3, padding=1, bias=False)
        self.norm = ShiftNorm(planes)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        """float32[N, channels, H, W] to [N, planes, H, W], or half of H and W.

        Training pools first, so that a quarter of the pixels is left to normalise. The exported graph normalises first,
        which folds into the convolution; the numbers are the same (`ShiftNorm`), but the statistics must then be those
        of pooled pixels, which is why only evaluation may do so.
        """
        x = self.conv(x)  # [N, planes, H, W]
        if self.pool and self.training:
            x = functional.max_pool2d(x, 2)  # [N, planes, H/2, W/2]
        x = functional.relu(self.norm(x), inplace=True)  # as before
        if self.pool and not self.training:
            x = functional.max_pool2d(x, 2)  # [N, planes, H/2, W/2]
        return x


class Stage(nn.Module):
    """A convolution that widens and halves, then a residual branch of one convolution."""

    def __init__(self, channels: int, planes: int) -> None:
        super().__init__()
        self.widen = Convolution(channels, planes, pool=True)
        self.residual = Convolution(planes, planes, pool=False)
        nn.init.dirac_(self.widen.conv.weight[:channels])  # the first planes start as copies of the input

    def forward(self, x: Tensor) -> Tensor:
        """float32[N, channels, H, W] to [N, planes, H/2, W/2]."""
        x = self.widen(x)  # [N, planes, H/2, W/2]
        branch: Tensor = self.residual(x)  # [N, planes, H/2, W/2]
        return x + branch


class ResNet8(Classifier):
    """A whitening stem, three stages, the maximum over what is left of the image, one linear layer."""

    config: ResNet8Config
    adapts = True

    def __init__(self, config: ResNet8Config) -> None:
        super().__init__(config)
        planes = [scaled(n, config.width) for n in (64, 256, 256)]
        patch = 4 * config.in_channels  # values in a 2x2 patch
        self.stem = nn.Conv2d(config.in_channels, 2 * patch, kernel_size=2)
        self.stage1 = Stage(2 * patch, planes[0])
        self.stage2 = Stage(planes[0], planes[1])
        self.stage3 = Stage(planes[1], planes[2])
        self.dropout = nn.Dropout(config.dropout)
        self.fc = nn.Linear(planes[2], config.num_classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """float32[N, C, H, W] to logits float32[N, K]; the shapes are those of 32x32 at width 1."""
        self.check_batch(x)  # [N, 3, 32, 32]
        mirror = self.config.mirror and not self.training
        if mirror:
            x = torch.cat((x, x.flip(3)))  # [2N, 3, 32, 32], and so on to the logits
        x = functional.relu(self.stem(x), inplace=True)  # [N, 24, 31, 31]
        x = self.stage1(x)  # [N, 64, 15, 15]
        x = self.stage2(x)  # [N, 256, 7, 7]
        x = self.stage3(x)  # [N, 256, 3, 3]
        x = x.amax((2, 3))  # [N, 256]
        logits: Tensor = self.fc(self.dropout(x)) * _LOGIT_SCALE  # [N, K]
        if mirror:
            logits = logits.reshape(2, -1, self.config.num_classes).mean(0)  # [N, K]
        return logits

    @torch.no_grad()
    def adapt_to(self, images: Tensor) -> None:
        """Sets the stem to whiten 2x2 patches: its filters are the patches' principal directions and their negatives.

        Each is divided by the standard deviation along it, so all outputs start with the same variance.

        Args:
            images: float32[N, C, H, W], normalised, as the network will see them.
        """
        channels = images.shape[1]
        patches = images.float().unfold(2, 2, 1).unfold(3, 2, 1)  # [N, C, H-1, W-1, 2, 2]
        rows = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, 4 * channels)  # [N*(H-1)*(W-1), 4C]
        variances, directions = torch.linalg.eigh(torch.cov(rows.double().T))
        filters = directions.T / (variances + _LEAST_VARIANCE).sqrt()[:, None]  # [4C, 4C]
        both = torch.cat((filters, -filters)).reshape(-1, channels, 2, 2)  # [8C, C, 2, 2]
        self.stem.weight.copy_(both)
        nn.init.zeros_(self.stem.bias)  # type: ignore[arg-type] # it was built with a bias


ARCHITECTURES = (
    Architecture(
        family="resnet8",
        build=ResNet8,
        config=ResNet8Config(name="resnet8", num_classes=10),
        input=InputSpec(height=32, width=32, resize=Resize(mode="stretch")),
        stem="stem",
        head="fc",
        stages=(("stem",), ("stage1",), ("stage2",), ("stage3",), ("fc",)),
        parameters=1_971_640,
    ),
)
