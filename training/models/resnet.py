"""ResNet, ResNeXt and Wide ResNet.

He et al., "Deep Residual Learning for Image Recognition", arXiv:1512.03385; Xie et al., "Aggregated Residual
Transformations for Deep Neural Networks", arXiv:1611.05431; Zagoruyko and Komodakis, "Wide Residual Networks",
arXiv:1605.07146. As in torchvision, whose published weights load strictly, the stride of a bottleneck is on its 3x3
convolution ("v1.5").
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from service.artifact import InputSpec, Resize
from training.models.architecture import Architecture, Classifier, Config, PublishedWeights, option
from training.models.layers import scaled


@dataclass(frozen=True, kw_only=True)
class ResNetConfig(Config):
    """`blocks`: residual blocks per stage. `groups` and `group_width` (at 64 planes) shape the 3x3 of a bottleneck."""

    blocks: tuple[int, int, int, int]
    bottleneck: bool
    groups: int = 1
    group_width: int = 64
    small_images: bool = option(
        False, "for images of about 32 pixels: the first convolution is 3x3 with stride 1 and no max pooling follows"
    )
    width: float = option(1.0, "multiplies the channels of every layer", 0.1, 8)
    dropout: float = option(0.0, "probability of dropping a feature before the last layer", 0, 0.95)
    zero_init: bool = option(False, "each residual branch starts at zero (arXiv:1706.02677): helps large batches")

    @property
    def expansion(self) -> int:
        """Output channels of a block per plane."""
        return 4 if self.bottleneck else 1


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    def __init__(self, channels: int, planes: int, stride: int, config: ResNetConfig) -> None:
        super().__init__()
        # The shortcut comes first so that random draws have torchvision's order; it is registered last.
        downsample = _shortcut(channels, planes * config.expansion, stride)
        self.conv1 = nn.Conv2d(channels, planes, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """The normalisation that ends the residual branch."""
        return self.bn2

    def forward(self, x: Tensor) -> Tensor:
        """float32[N, channels, H, W] to [N, planes, H / stride, W / stride]."""
        shortcut = x if self.downsample is None else self.downsample(x)  # [N, planes, H/s, W/s]
        x = functional.relu(self.bn1(self.conv1(x)), inplace=True)  # [N, planes, H/s, W/s]
        x = self.bn2(self.conv2(x))  # [N, planes, H/s, W/s]
        x += shortcut  # [N, planes, H/s, W/s]
        return functional.relu(x, inplace=True)  # [N, planes, H/s, W/s]


class Bottleneck(nn.Module):
    """1x1 down, 3x3 (grouped in ResNeXt), 1x1 up to four times the planes, around a shortcut."""

    def __init__(self, channels: int, planes: int, stride: int, config: ResNetConfig) -> None:
        super().__init__()
        inner = max(1, planes * config.group_width // 64) * config.groups
        outer = planes * config.expansion
        downsample = _shortcut(channels, outer, stride)  # first, as in BasicBlock
        self.conv1 = nn.Conv2d(channels, inner, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, kernel_size=3, stride=stride, padding=1, groups=config.groups, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, outer, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(outer)
        self.downsample = downsample

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """The normalisation that ends the residual branch."""
        return self.bn3

    def forward(self, x: Tensor) -> Tensor:
        """float32[N, channels, H, W] to [N, 4 * planes, H / stride, W / stride]."""
        shortcut = x if self.downsample is None else self.downsample(x)  # [N, 4*planes, H/s, W/s]
        x = functional.relu(self.bn1(self.conv1(x)), inplace=True)  # [N, inner, H, W]
        x = functional.relu(self.bn2(self.conv2(x)), inplace=True)  # [N, inner, H/s, W/s]
        x = self.bn3(self.conv3(x))  # [N, 4*planes, H/s, W/s]
        x += shortcut  # [N, 4*planes, H/s, W/s]
        return functional.relu(x, inplace=True)  # [N, 4*planes, H/s, W/s]


class ResNet(Classifier):
    """A stem, four stages of residual blocks, global average pooling and one linear layer."""

    config: ResNetConfig

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__(config)
        planes = [scaled(64, config.width) * 2**stage for stage in range(4)]
        kernel, stride = (3, 1) if config.small_images else (7, 2)
        self.conv1 = nn.Conv2d(config.in_channels, planes[0], kernel, stride, padding=kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(planes[0])
        self.layer1 = _layer(planes[0], planes[0], 0, config)
        self.layer2 = _layer(planes[0] * config.expansion, planes[1], 1, config)
        self.layer3 = _layer(planes[1] * config.expansion, planes[2], 2, config)
        self.layer4 = _layer(planes[2] * config.expansion, planes[3], 3, config)
        self.dropout = nn.Dropout(config.dropout)
        self.fc = nn.Linear(planes[3] * config.expansion, config.num_classes)
        self.apply(_initialise)
        if config.zero_init:
            for block in self.modules():
                if isinstance(block, BasicBlock | Bottleneck):
                    nn.init.zeros_(block.last_norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        """float32[N, C, H, W] to logits float32[N, K]; the shapes are those of resnet50 at 224x224."""
        self.check_batch(x)  # [N, 3, 224, 224]
        x = functional.relu(self.bn1(self.conv1(x)), inplace=True)  # [N, 64, 112, 112]
        if not self.config.small_images:
            x = functional.max_pool2d(x, kernel_size=3, stride=2, padding=1)  # [N, 64, 56, 56]
        x = self.layer1(x)  # [N, 256, 56, 56]
        x = self.layer2(x)  # [N, 512, 28, 28]
        x = self.layer3(x)  # [N, 1024, 14, 14]
        x = self.layer4(x)  # [N, 2048, 7, 7]
        x = x.mean((2, 3))  # [N, 2048]
        logits: Tensor = self.fc(self.dropout(x))  # [N, K]
        return logits


def _shortcut(channels: int, outer: int, stride: int) -> nn.Sequential | None:
    """A projection where the shape changes, else None: the identity."""
    if stride == 1 and channels == outer:
        return None
    return nn.Sequential(nn.Conv2d(channels, outer, kernel_size=1, stride=stride, bias=False), nn.BatchNorm2d(outer))


def _layer(channels: int, planes: int, stage: int, config: ResNetConfig) -> nn.Sequential:
    """One stage; all but the first halve the resolution in their first block."""
    block = Bottleneck if config.bottleneck else BasicBlock
    first = block(channels, planes, 1 if stage == 0 else 2, config)
    rest = (block(planes * config.expansion, planes, 1, config) for _ in range(config.blocks[stage] - 1))
    return nn.Sequential(first, *rest)


def _initialise(module: nn.Module) -> None:
    """Kaiming for convolutions; the other layers start as PyTorch makes them, BatchNorm with 1 and 0."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _resnet(
    name: str,
    blocks: tuple[int, int, int, int],
    parameters: int,
    *weights: PublishedWeights,
    bottleneck: bool = True,
    groups: int = 1,
    group_width: int = 64,
) -> Architecture:
    config = ResNetConfig(name=name, blocks=blocks, bottleneck=bottleneck, groups=groups, group_width=group_width)
    return Architecture(
        family="resnet",
        build=ResNet,
        config=config,
        input=InputSpec(height=224, width=224, resize=Resize(shorter_side=256)),
        stem="conv1",
        head="fc",
        stages=(("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",), ("fc",)),
        parameters=parameters,
        weights=weights,
    )


def _v1(file: str, top1: float) -> PublishedWeights:
    return PublishedWeights(f"{file}.pth", top1, shorter_side=256)


def _v2(file: str, top1: float) -> PublishedWeights:
    return PublishedWeights(f"{file}.pth", top1, shorter_side=232)


ARCHITECTURES = (
    _resnet("resnet18", (2, 2, 2, 2), 11_689_512, _v1("resnet18-f37072fd", 69.758), bottleneck=False),
    _resnet("resnet34", (3, 4, 6, 3), 21_797_672, _v1("resnet34-b627a593", 73.314), bottleneck=False),
    _resnet("resnet50", (3, 4, 6, 3), 25_557_032, _v1("resnet50-0676ba61", 76.130), _v2("resnet50-11ad3fa6", 80.858)),
    _resnet(
        "resnet101", (3, 4, 23, 3), 44_549_160, _v1("resnet101-63fe2227", 77.374), _v2("resnet101-cd907fc2", 81.886)
    ),
    _resnet(
        "resnet152", (3, 8, 36, 3), 60_192_808, _v1("resnet152-394f9c45", 78.312), _v2("resnet152-f82ba261", 82.284)
    ),
    _resnet(
        "resnext50_32x4d",
        (3, 4, 6, 3),
        25_028_904,
        _v1("resnext50_32x4d-7cdf4587", 77.618),
        _v2("resnext50_32x4d-1a0047aa", 81.198),
        groups=32,
        group_width=4,
    ),
    _resnet(
        "resnext101_32x8d",
        (3, 4, 23, 3),
        88_791_336,
        _v1("resnext101_32x8d-8ba56ff5", 79.312),
        _v2("resnext101_32x8d-110c445d", 82.834),
        groups=32,
        group_width=8,
    ),
    _resnet(
        "resnext101_64x4d",
        (3, 4, 23, 3),
        83_455_272,
        _v2("resnext101_64x4d-173b62eb", 83.246),
        groups=64,
        group_width=4,
    ),
    _resnet(
        "wide_resnet50_2",
        (3, 4, 6, 3),
        68_883_240,
        _v1("wide_resnet50_2-95faca4d", 78.468),
        _v2("wide_resnet50_2-9ba9bcbe", 81.602),
        group_width=128,
    ),
    _resnet(
        "wide_resnet101_2",
        (3, 4, 23, 3),
        126_886_696,
        _v1("wide_resnet101_2-32ee1156", 78.848),
        _v2("wide_resnet101_2-d733dc28", 82.510),
        group_width=128,
    ),
)
