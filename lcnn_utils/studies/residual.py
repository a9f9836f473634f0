"""Stacks of residual blocks, added or averaged: how slope and signal change with depth."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pandas as pd
import torch
from torch import Generator, Tensor, nn
from torch.func import jacrev

from ..nn import CenteredSoftplus, LipschitzBatchNorm2d, spectral_normalize
from ..nn.spectral_norm import Shape

MERGES = ("sum", "average", "average + γ-BatchNorm")


def random_conv(c_in: int, c_out: int, seed: int, *, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    """A convolution without bias, padding ``kernel // 2``, float64 weights N(0, 1/fan-in) drawn from ``seed``."""
    conv = nn.utils.skip_init(nn.Conv2d, c_in, c_out, kernel, stride, kernel // 2, bias=False, dtype=torch.float64)
    weight = torch.randn(conv.weight.shape, generator=Generator().manual_seed(seed), dtype=torch.float64)
    conv.weight.data = weight / math.sqrt(c_in * kernel**2)
    return conv


class _Block(nn.Module):
    """z ↦ φ(F(z) + z), or the authors' φ(½(F(z/√2) + z/√2)); F is conv – φ – conv of norm 1, or with γ-BatchNorms."""

    def __init__(self, merge: str, shape: Shape, seed: int, beta: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index in range(2):
            layers.append(spectral_normalize(random_conv(shape[0], shape[0], seed + index), shape, 100))
            if merge == MERGES[2]:
                layers.append(LipschitzBatchNorm2d(shape[0], momentum=1.0).double())  # running = last statistics
            layers.append(CenteredSoftplus(beta, trainable=False))
        self.average, self.branch, self.activation = merge != "sum", nn.Sequential(*layers[:-1]), layers[-1]

    def forward(self, z: Tensor) -> Tensor:
        z = z / math.sqrt(2) if self.average else z
        return self.activation((self.branch(z) + z) / (2 if self.average else 1))


def residual_frame(
    depth: int, seeds: Sequence[int], *, channels: int = 4, size: int = 6, beta: float = 5.0
) -> pd.DataFrame:
    """Stacks of residual blocks, conv – φ – conv of norm 1 beside an identity: how slope and signal change.

    Columns: block (of MERGES), seed, blocks, slope (‖Jacobian‖₂ of the stack at a random x), signal ‖z‖/‖x‖, bound (on
    the slope; nan with BatchNorm).
    """
    rows, shape = [], (channels, size, size)
    for merge, seed in itertools.product(MERGES, seeds):
        z = torch.randn(32, *shape, generator=Generator().manual_seed(seed), dtype=torch.float64)
        start, jacobian = z[0].norm(), torch.eye(z[0].numel(), dtype=torch.float64)
        for n in range(1, depth + 1):
            block = _Block(merge, shape, 1000 * seed + 2 * n, beta)
            block(z)  # in training mode: BatchNorm takes the statistics of this batch
            block.eval()
            jacobian = jacrev(lambda x: block(x[None])[0])(z[0]).reshape(jacobian.shape).detach() @ jacobian  # noqa: B023
            z = block(z).detach()
            bound = {"sum": 2.0**n, "average": 2 ** (-n / 2)}.get(merge, math.nan)
            slope = torch.linalg.matrix_norm(jacobian, 2).item()
            rows.append((merge, seed, n, slope, (z[0].norm() / start).item(), bound))
    return pd.DataFrame(rows, columns=["block", "seed", "blocks", "slope", "signal", "bound"])
