"""Random nets, and every bound of a net beside the exact value."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd
import torch
from torch import Tensor, nn

from .. import nn as models
from ..curvature import curvature_bound, geometry, local_bound, normalised_bound, published_bound
from ..nn import CenteredSoftplus, LipschitzBatchNorm2d, refresh_norms


def scramble(model: nn.Module, seed: int) -> nn.Module:
    """Give ``model`` random weights, β, γ and BatchNorm statistics (in place, float64, eval mode)."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    random = lambda like: torch.randn(like.shape, generator=generator, dtype=like.dtype)
    for name, p in model.named_parameters():
        width = 1 if name.endswith(("log_beta", "log_gamma")) else max(1, p[0].numel())
        p.data = random(p) / width**0.5
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.copy_(random(buffer) ** 2 + 0.1)
        if name.endswith("running_mean"):
            buffer.copy_(random(buffer) / 2)
        if name.endswith("weight.0.v"):  # spectral norm's direction, still that of the old weight
            buffer.copy_(random(buffer))
    refresh_norms(model)
    return model


def random_mlp(seed: int) -> nn.Sequential:
    """A small float64 MLP of random size (1 to 5 units, 2 to 4 hidden layers); β from 0.1 to 1000, an LCNN's random."""
    generator = torch.Generator().manual_seed(seed)
    depth = int(torch.randint(3, 6, (), generator=generator))
    sizes = [*torch.randint(1, 6, (depth,), generator=generator).tolist(), 2 + seed % 2]
    return scramble(models.mlp(sizes, lcnn=seed % 3 == 0, beta=float(10 ** (seed % 5 - 1))), seed)  # type: ignore[return-value]


def random_cnn(seed: int) -> tuple[nn.Module, tuple[int, int, int]]:
    """A small ResNet, VGG or plain CNN with random weights in float64, and the shape of its input."""
    generator = torch.Generator().manual_seed(seed)
    channels, size = (int(torch.randint(*ends, (), generator=generator)) for ends in ((1, 3), (2, 5)))
    options: dict = dict(num_classes=3, width=1, in_channels=channels, image_size=size, lcnn=bool(seed % 2), beta=3.0)
    model: nn.Module = models.vgg11(**options) if seed % 4 == 2 else models.resnet(10, **options)
    if seed % 4 == 3:
        model = nn.Sequential(
            nn.Conv2d(channels, 4, 3, 2, 1, groups=channels), nn.BatchNorm2d(4), nn.Softplus(2.0), nn.ZeroPad2d(1),
            nn.AvgPool2d(2, 1, 1, count_include_pad=False), nn.Conv2d(4, 3, 2), LipschitzBatchNorm2d(3, affine=True),
            CenteredSoftplus(4.0, cap=1.0), nn.AdaptiveAvgPool2d((2, 1)), nn.Flatten(), nn.Linear(6, 3),
            nn.BatchNorm1d(3),
        )  # fmt: skip
    return scramble(model, seed), (channels, size, size)


def audit(model: nn.Module, x: Tensor, y: Tensor, scalar: str = "margin") -> pd.DataFrame:
    """Every bound beside the exact value, a row a sample of x (N, …) with label y (N,).

    Columns: gradient, hessian and curvature (exact); local (A), data_free (B), normalised (C); kappa (the largest over
    layers); published, published_widths (bounds of the curvature).
    """
    g = geometry(model, x, y, scalar=scalar, method="exact", eps=0.0)
    c = normalised_bound(model, x, y, scalar=scalar)
    values = dict(gradient=g.grad_norm, hessian=g.hessian_norm, curvature=g.curvature, normalised=c.bound)
    values |= dict(local=local_bound(model, x, y, scalar=scalar), kappa=c.kappa.amax(1))
    shape = x.shape[1:]
    return pd.DataFrame({name: value.cpu().numpy() for name, value in values.items()}).assign(
        data_free=curvature_bound(model, shape, scalar=scalar),
        published=published_bound(model, shape),
        published_widths=published_bound(model, shape, widths=True),
    )


def audit_frame(nets: Iterable[int], points: int = 2) -> pd.DataFrame:
    """:func:`audit` of random MLPs (one a seed in ``nets``), margins and single logits in turn; column net added.

    Points whose gradient is below 1e-100, so that the square of its norm is about to underflow, are left out.
    """
    parts = []
    for seed in nets:
        model, generator = random_mlp(seed), torch.Generator().manual_seed(seed + 1)
        x = torch.randn((points, model[1].in_features), generator=generator, dtype=torch.float64)  # type: ignore[arg-type]
        y = torch.arange(points) % 2
        parts.append(audit(model, x, y, ("margin", "logit")[seed % 2]).assign(net=seed))
    frame = pd.concat(parts, ignore_index=True)
    return frame[frame.gradient > 1e-100].reset_index(drop=True)


class Cancelling(nn.Module):
    """x ↦ (s₀(x) + s₀(−x), 0), x of shape (N, 1): at 0 the two slopes cancel and the two curvatures add up."""

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(1, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.activation = CenteredSoftplus(beta, trainable=False)
        self.inner.weight.data = torch.tensor([[1.0], [-1.0]])
        self.outer.weight.data = torch.tensor([[1.0, 1.0], [0.0, 0.0]])

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.activation(self.inner(x)))
