"""The authors' layers as they are published, from their description: what the lab's layers have to beat.

softplus(βx)/β with a trained β; BatchNorm times min(1, γ·min σ); and a power iteration in every forward pass.
Reference: S. Srinivas et al., NeurIPS 2022, arXiv:2206.07144, and their public code.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lcnn_utils.nn import CenteredSoftplus, LipschitzBatchNorm2d, SpectralNorm, replace_layers


class Softplus(nn.Module):
    """(log(1 + e^{βx}) − log 2)/β with β = e^{log β}, at least 1e-3."""

    def __init__(self, beta: float = 5.0) -> None:
        super().__init__()
        self.log_beta = nn.Parameter(torch.tensor(math.log(beta)))

    def forward(self, x: Tensor) -> Tensor:
        beta = self.log_beta.exp().clamp(min=1e-3)
        return (F.softplus(beta * x) - math.log(2)) / beta


class BatchNorm(nn.Module):
    """BN(x)·min(1, γ·min_c σ_c), σ from the running variance."""

    def __init__(self, channels: int, gamma: float = 10.0) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels, affine=False)
        self.log_gamma = nn.Parameter(torch.tensor(math.log(gamma)))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        smallest = (self.bn.running_var + self.bn.eps).sqrt().min()
        return y * (self.log_gamma.exp() * smallest).clamp(max=1)


class Norm(nn.Module):
    """W/σ: each training pass makes one power iteration with the convolution and its transpose, then σ = uᵀAv."""

    def __init__(self, ours: SpectralNorm) -> None:
        super().__init__()
        self.geometry = ours.geometry
        self.register_buffer("v", ours.v.clone())

    def forward(self, weight: Tensor) -> Tensor:
        if self.geometry is None:
            apply, back = F.linear, lambda u, w: u @ w
        else:
            stride, padding, *_ = self.geometry.values()
            sizes = zip(self.v.shape[2:], padding, weight.shape[2:], stride, strict=True)
            over = [(n + 2 * p - k) % s for n, p, k, s in sizes]  # rows and columns that the stride leaves over
            apply = lambda v, w: F.conv2d(v, w, None, stride, padding)
            back = lambda u, w: F.conv_transpose2d(u, w, None, stride, padding, over)
        with torch.no_grad():
            u = apply(self.v, weight)
            u = u / torch.linalg.vector_norm(u)
            v = back(u, weight)
            self.v.copy_(v / torch.linalg.vector_norm(v))
        return weight / (u * apply(self.v.clone(), weight)).sum()


def as_published(net: nn.Module) -> nn.Module:
    """An LCNN of ``lcnn_utils`` with the published layers in place of its own, in place."""
    for module in list(net.modules()):
        if parametrize.is_parametrized(module, "weight"):
            norm = Norm(module.parametrizations.weight[0])
            raw = module.parametrizations.weight.original.detach().clone()
            parametrize.remove_parametrizations(module, "weight")
            module.weight.data = raw
            parametrize.register_parametrization(module, "weight", norm, unsafe=True)

    def new(layer: nn.Module) -> nn.Module | None:
        if isinstance(layer, CenteredSoftplus):
            return Softplus(layer.beta.item())
        return BatchNorm(layer.num_features, layer.gamma.item()) if isinstance(layer, LipschitzBatchNorm2d) else None

    return replace_layers(net, new)
