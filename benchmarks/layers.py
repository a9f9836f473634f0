"""What an LCNN's layers cost beside PyTorch's and the authors' as published: `python benchmarks/layers.py`.

CIFAR's shapes with random images, so no dataset; whole steps are timed by `training.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import published
import torch
import torch.nn.functional as F
from common import interleaved, write
from torch import Tensor, nn

from lcnn_utils.lab import one_thread
from lcnn_utils.nn import CenteredSoftplus, LipschitzBatchNorm2d, conv_norm, spectral_normalize

BETA = 5.0
SHAPES = ((128, 16, 32, 32), (128, 8, 8, 8))  # the first stage of CIFAR's ResNet-18 of width 16, and of digits' nets


def layers(channels: int) -> list[dict[str, Callable]]:
    """Two groups of layers; the yardstick of each comes first."""
    activations = {
        "F.softplus, β fixed": partial(F.softplus, beta=BETA),
        "ReLU": nn.ReLU(),
        "CenteredSoftplus, β fixed": CenteredSoftplus(BETA, trainable=False),
        "CenteredSoftplus, β trained": CenteredSoftplus(BETA),
        "published, β trained": published.Softplus(BETA),
    }
    norms = {
        "nn.BatchNorm2d": nn.BatchNorm2d(channels, affine=False),
        "LipschitzBatchNorm2d, nothing clipped": LipschitzBatchNorm2d(channels, 10.0),
        "LipschitzBatchNorm2d, all clipped": LipschitzBatchNorm2d(channels, 0.5),
        "published": published.BatchNorm(channels),
    }
    return [activations, norms]


def backward(function: Callable, x: Tensor, g: Tensor) -> Callable[[], Any]:
    """Forward and backward pass, to x and to the function's parameters."""
    leaf = x.clone().requires_grad_()  # keeps the layout
    parameters = [leaf, *function.parameters()] if isinstance(function, nn.Module) else [leaf]
    return lambda: torch.autograd.grad(function(leaf), parameters, g)


def check() -> None:
    """The published layers are what they are described to be, and ours computes the same where it should."""
    x = torch.randn(8, 4, 6, 6)
    torch.testing.assert_close(published.Softplus(BETA)(x), CenteredSoftplus(BETA)(x), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(published.BatchNorm(4, 1e6)(x), LipschitzBatchNorm2d(4, 1e6)(x), rtol=1e-4, atol=1e-5)
    for stride, size in ((1, 6), (2, 6), (2, 5)):
        conv = spectral_normalize(nn.Conv2d(4, 8, 3, stride, 1, bias=False), (4, size, size))
        published.as_published(nn.Sequential(conv))
        for _ in range(300):
            _ = conv.weight
        assert abs(conv_norm(conv, (4, size, size), "exact").item() - 1) < 1e-3


def main() -> None:
    one_thread()
    check()
    rows = []
    for shape in SHAPES:
        generator = torch.Generator().manual_seed(0)
        x, g = (torch.randn(shape, generator=generator).to(memory_format=torch.channels_last) for _ in range(2))
        for group in layers(shape[1]):
            runs = {name: backward(layer, x, g) for name, layer in group.items()}
            for name, times in interleaved(runs, rounds=100, seconds=15).items():
                row = {"shape": "×".join(map(str, shape)), "layer": name, "ms": times["seconds"] * 1e3}
                rows.append(row | {"time / first": times["ratio"], "quartiles": times["quartiles"]})
    notes = [
        "Forward and backward to x and the parameters; eager, float32, one thread, NHWC, standard normal inputs. "
        "`time / first` is relative to the first of each group.",
    ]
    write("layers", rows, 2**21, notes)


if __name__ == "__main__":
    main()
