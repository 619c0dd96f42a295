"""Small image classifiers, built untrained: CIFAR-type residual networks and MobileNetV2 for small images.

``width`` scales channels, ``depth`` the number of blocks; both are 1.0 for the published network.  A shallower or
narrower network has a subset of the module names of the full one.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn


def scaled(channels: int, width: float, multiple: int = 4) -> int:
    """``channels * width`` rounded to a multiple, at least one multiple.

    >>> [scaled(16, width) for width in (1.0, 0.6, 0.1)]
    [16, 8, 4]
    """
    return max(multiple, int(channels * width / multiple + 0.5) * multiple)


def _initialise(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al., 1512.03385), by 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                OrderedDict(conv=nn.Conv2d(inputs, outputs, 1, stride, bias=False), bn=nn.BatchNorm2d(outputs))
            )
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        out: Tensor = self.relu2(y + self.shortcut(x))
        return out


class SmallResNet(nn.Module):
    """A residual network of 6n+2 layers for small images: three stages of 16, 32 and 64 channels."""

    def __init__(self, layers: int, classes: int, channels: int, width: float = 1.0, depth: float = 1.0) -> None:
        super().__init__()
        blocks = max(1, int((layers - 2) // 6 * depth + 0.5))
        widths = [scaled(c, width) for c in (16, 32, 64)]
        self.conv1 = nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        self.layer1 = self._stage(widths[0], widths[0], blocks, stride=1)
        self.layer2 = self._stage(widths[0], widths[1], blocks, stride=2)
        self.layer3 = self._stage(widths[1], widths[2], blocks, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten(1)
        self.fc = nn.Linear(widths[2], classes)
        _initialise(self)

    @staticmethod
    def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(inputs, outputs, stride)
        return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        out: Tensor = self.fc(self.flatten(self.pool(x)))
        return out


def resnet8(classes: int = 10, channels: int = 3, width: float = 1.0, depth: float = 1.0) -> nn.Module:
    """One block a stage; ``depth`` only lengthens it."""
    return SmallResNet(8, classes, channels, width, depth)


def resnet20(classes: int = 10, channels: int = 3, width: float = 1.0, depth: float = 1.0) -> nn.Module:
    """Three blocks a stage."""
    return SmallResNet(20, classes, channels, width, depth)


def resnet56(classes: int = 10, channels: int = 3, width: float = 1.0, depth: float = 1.0) -> nn.Module:
    """Nine blocks a stage."""
    return SmallResNet(56, classes, channels, width, depth)


class InvertedResidual(nn.Module):
    """Expand by 1x1, depthwise 3x3, project by 1x1 (Sandler et al., 1801.04381)."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        stages: OrderedDict[str, nn.Module] = OrderedDict()
        if expansion != 1:
            stages["expand"] = nn.Conv2d(inputs, hidden, 1, bias=False)
            stages["bn1"] = nn.BatchNorm2d(hidden)
            stages["relu1"] = nn.ReLU6()
        stages["depthwise"] = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
        stages["bn2"] = nn.BatchNorm2d(hidden)
        stages["relu2"] = nn.ReLU6()
        stages["project"] = nn.Conv2d(hidden, outputs, 1, bias=False)
        stages["bn3"] = nn.BatchNorm2d(outputs)
        self.conv = nn.Sequential(stages)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return x + out if self.residual else out


class SmallMobileNetV2(nn.Module):
    """MobileNetV2 with the first two strides removed, so that 28x28 and 32x32 images reach the last stage at 4x4."""

    STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    """Expansion, channels, blocks and first stride of each stage."""

    def __init__(self, classes: int, channels: int, width: float = 1.0) -> None:
        super().__init__()
        inputs = scaled(32, width, 8)
        self.conv1 = nn.Conv2d(channels, inputs, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU6()
        blocks: list[nn.Module] = []
        for expansion, stage_channels, count, first_stride in self.STAGES:
            outputs = scaled(stage_channels, width, 8)
            for index in range(count):
                blocks.append(InvertedResidual(inputs, outputs, first_stride if index == 0 else 1, expansion))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        last = scaled(1280, max(width, 1.0), 8)
        self.conv2 = nn.Conv2d(inputs, last, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(last)
        self.relu2 = nn.ReLU6()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten(1)
        self.fc = nn.Linear(last, classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.relu1(self.bn1(self.conv1(x))))
        x = self.relu2(self.bn2(self.conv2(x)))
        out: Tensor = self.fc(self.flatten(self.pool(x)))
        return out


def mobilenetv2(classes: int = 10, channels: int = 3, width: float = 1.0) -> nn.Module:
    """MobileNetV2 for small images."""
    return SmallMobileNetV2(classes, channels, width)
