"""The networks under study, each as a Standard net and as its low-curvature version (LCNN).

Standard means the authors' baseline: their residual block, BatchNorm without scale and shift, softplus with β = 1000
(nearly a ReLU, but with a Hessian). LCNN: β trainable from 5, convolutions of norm 1, γ-Lipschitz BatchNorm.
Images are in [0, 1]; to standardise them: ``nn.Sequential(torchvision.transforms.Normalize(mean, std), net)``.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .batchnorm import LipschitzBatchNorm2d
from .convert import replace_layers
from .softplus import CenteredSoftplus
from .spectral_norm import spectral_normalize

BLOCKS = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
VGG11 = ((1,), (2,), (4, 4), (8, 8), (8, 8))  # channels over ``width``, with average pooling after each group
Activation = Callable[[], nn.Module]


@dataclass(frozen=True)
class _Parts:
    """The layers that differ between the kinds of net."""

    lcnn: bool = False
    beta: float | None = None
    gamma: float = 10.0
    activation: Activation | None = None
    ordinary: bool = False

    def __post_init__(self) -> None:
        if self.lcnn and self.ordinary:
            raise ValueError("an LCNN needs the averaged blocks and norms: use ordinary=True with lcnn=False")

    def unit(self) -> nn.Module:
        """A new activation."""
        if self.activation is not None:
            return self.activation()
        default = 5.0 if self.lcnn else 1000.0
        return CenteredSoftplus(default if self.beta is None else self.beta, trainable=self.lcnn)

    def conv(self, c_in: int, c_out: int, kernel: int, stride: int, size: int) -> list[nn.Module]:
        """Convolution of a ``size`` x ``size`` image and its normalisation."""
        conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False)
        if not self.lcnn:
            return [conv, nn.BatchNorm2d(c_out, affine=self.ordinary)]
        return [spectral_normalize(conv, (c_in, size, size)), LipschitzBatchNorm2d(c_out, self.gamma)]

    def head(self, features: int, num_classes: int) -> list[nn.Module]:
        """Global average, then a classifier: of norm 1, in the Standard net too (as the authors have it)."""
        linear = nn.Linear(features, num_classes)
        return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear if self.ordinary else spectral_normalize(linear)]


class AveragedBlock(nn.Module):
    """The authors' residual block: x ↦ φ(½(F(x/√2) + S(x/√2))), with F two convolutions and S the shortcut.

    Doubling the input as (x, x)/√2 keeps its norm and averaging the branches divides it by √2, so the block's slope is
    at most max(slope F, slope S)/√2, where a plain sum would add the slopes.
    """

    def __init__(self, c_in: int, c_out: int, stride: int, size: int, parts: _Parts) -> None:
        super().__init__()
        first, second = (c_in, c_out, 3, stride, size), (c_out, c_out, 3, 1, math.ceil(size / stride))
        self.branch = nn.Sequential(*parts.conv(*first), parts.unit(), *parts.conv(*second))
        same = stride == 1 and c_in == c_out
        self.shortcut = nn.Identity() if same else nn.Sequential(*parts.conv(c_in, c_out, 1, stride, size))
        self.activation = parts.unit()

    def forward(self, x: Tensor) -> Tensor:
        x = x / math.sqrt(2)
        mean = self.branch(x) + self.shortcut(x)
        mean /= 2  # in place
        return self.activation(mean)


class OrdinaryBlock(AveragedBlock):
    """The usual residual block: x ↦ φ(F(x) + S(x)) (K. He et al., CVPR 2016)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.branch(x) + self.shortcut(x))


def resnet(
    depth: int = 18, *, num_classes: int, width: int = 64, in_channels: int = 3, image_size: int = 32,
    lcnn: bool = False, beta: float | None = None, gamma: float = 10.0, activation: Activation | None = None,
    ordinary: bool = False,
) -> nn.Sequential:  # fmt: skip
    """ResNet for small images with the authors' averaged blocks: (N, C, H, W) in [0, 1] → logits (N, num_classes).

    ``depth`` is 10, 18 or 34; ``width`` channels are doubled in each of the last three stages; the norms of
    convolutions depend on ``image_size``, the side of the images. ``lcnn`` asks for low-curvature layers (with γ from
    ``gamma``), otherwise it is the Standard net. ``beta`` is the starting β, default 5 (LCNN, trainable) or 1000
    (Standard, fixed); ``activation`` makes other activations, such as ``nn.ReLU``. ``ordinary`` is everybody else's
    net: blocks that add, BatchNorm with scale and shift, a free classifier.
    Raises ValueError: another depth, β or γ not positive, an LCNN with ordinary layers.
    """
    if depth not in BLOCKS:
        raise ValueError(f"resnet depth must be one of {', '.join(map(str, BLOCKS))}, got {depth}")
    parts, size, channels = _Parts(lcnn, beta, gamma, activation, ordinary), image_size, width
    layers = [*parts.conv(in_channels, width, 3, 1, size), parts.unit()]
    block_kind = OrdinaryBlock if ordinary else AveragedBlock
    for stage, blocks in enumerate(BLOCKS[depth]):
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            layers.append(block_kind(channels, width * 2**stage, stride, size, parts))
            channels, size = width * 2**stage, math.ceil(size / stride)
    return nn.Sequential(*layers, *parts.head(channels, num_classes))


def vgg11(
    *, num_classes: int, width: int = 64, in_channels: int = 3, image_size: int = 32, **layer_options: Any
) -> nn.Sequential:
    """VGG-11 with average pooling (a maximum has kinks) and one β a layer.

    ``layer_options`` are lcnn, beta, gamma, activation, ordinary; these and the errors as of :func:`resnet`.
    """
    parts, size, channels = _Parts(**layer_options), image_size, in_channels
    layers: list[nn.Module] = []
    for group in VGG11:
        for factor in group:
            layers += [*parts.conv(channels, width * factor, 3, 1, size), parts.unit()]
            channels = width * factor
        if size > 1:
            layers.append(nn.AvgPool2d(2))
            size //= 2
    return nn.Sequential(*layers, *parts.head(channels, num_classes))


def mlp(
    sizes: Sequence[int], *, lcnn: bool = False, beta: float | None = None, gamma: float = 10.0,
    activation: Activation | None = None,
) -> nn.Sequential:  # fmt: skip
    """Multilayer perceptron (N, sizes[0]) → logits (N, sizes[-1]); images are flattened first.

    A hidden layer of the LCNN is a linear map of norm 1, γ-BatchNorm and a trainable β. Its read-out is free: it sets
    the scale of the logits, which the curvature of a margin or a logit doesn't see (that of the loss does).
    Raises ValueError: fewer than two sizes, β or γ not positive.
    """
    if len(sizes) < 2:
        raise ValueError(f"mlp needs the sizes of its input and output at least, got {list(sizes)}")
    parts = _Parts(lcnn, beta, gamma, activation)
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in itertools.pairwise(sizes[:-1]):
        linear = nn.Linear(inputs, outputs)
        layers += [spectral_normalize(linear), LipschitzBatchNorm2d(outputs, gamma)] if lcnn else [linear]
        layers.append(parts.unit())
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))


def relu_reading(model: nn.Module) -> nn.Module:
    """A copy with the same weights whose activations are ReLUs (the limit β → ∞)."""

    def new(layer: nn.Module) -> nn.Module | None:
        if not isinstance(layer, CenteredSoftplus):
            return None
        return nn.ReLU() if layer.cap is None else nn.Hardtanh(0.0, layer.cap)

    return replace_layers(copy.deepcopy(model), new)
