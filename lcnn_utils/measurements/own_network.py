"""What notebook 09 measures: a network of one's own, and what softer activations do to it without training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..attacks import robustness_curve
from ..curvature import evaluating, geometry
from ..nn import refresh_statistics, softened
from ..saliency import stability
from ..saliency.stability import summary
from .lipschitz import STATISTICS

BETAS = (1000, 300, 100, 30, 10, 5, 3, 2, 1, 0.5, 0.3, 0.1)
NOISE = 0.1  # ‖η‖₂ under which gradients are compared
Nets = nn.Module | Sequence[nn.Module]


def softening(
    nets: Nets, x: Tensor, y: Tensor, betas: Iterable[float] = BETAS, *, train: Tensor | None = None, **options
) -> pd.DataFrame:
    """:func:`qualities` (``options``) of nets that are :func:`nn.softened` to each β, the largest first, not trained.

    ``train``: images (N, C, H, W) on which BatchNorm's running statistics are measured again, as a second series:
    softer activations send other values. Columns beta, statistics (of ``STATISTICS``) added. Errors: as of both.
    A net and β take 2 s for digits' ResNet-10, a second an image for a ResNet-18 of 64 × 64 pixels (one CPU core).
    """
    nets = [nets] if isinstance(nets, nn.Module) else nets
    parts = []
    for beta in tqdm(sorted(betas, reverse=True), desc="β", leave=False):
        soft = [softened(net, beta).eval() for net in nets]
        parts.append(qualities(soft, x, y, **options).assign(beta=beta, statistics=STATISTICS[0]))
        if train is not None:
            soft = [refresh_statistics(net, train) for net in soft]
            parts.append(qualities(soft, x, y, **options).assign(beta=beta, statistics=STATISTICS[1]))
    return pd.concat(parts, ignore_index=True)


def qualities(nets: Nets, x: Tensor, y: Tensor, *, eps: float = 0.3, images: int = 100) -> pd.DataFrame:
    """A row for each of: ``accuracy`` on all of x, y; on the first ``images`` of them ``robust``, the accuracy that PGD
    (L2, ``eps``) leaves; the mean C of the loss and of the margin, ``curvature`` and ``margin_curvature``; ``change``,
    the mean relative change of the gradient of the predicted class's loss under random noise of length ``NOISE``.

    Columns quantity, n (images), value, low, high: 95 % intervals over the images; of several ``nets``, as of several
    seeds, the mean of their values and its range. ValueError: bad input, as :func:`curvature.geometry`.
    """
    if isinstance(nets, nn.Module):
        return _of_one_net(nets, x, y, eps, images)
    parts = [_of_one_net(net, x, y, eps, images) for net in nets]
    if len(parts) == 1:
        return parts[0]
    values = pd.concat(parts).groupby("quantity", sort=False)
    over_nets = values.agg(n=("n", "min"), value=("value", "mean"), low=("value", "min"), high=("value", "max"))
    return over_nets.reset_index()


def _of_one_net(net: nn.Module, x: Tensor, y: Tensor, eps: float, images: int) -> pd.DataFrame:
    first_x, first_y = x[:images], y[:images]
    with evaluating(net), torch.no_grad():
        predicted = net(first_x).argmax(1)
    scalars = {"curvature": "loss", "margin_curvature": "margin"}
    c = {name: geometry(net, first_x, first_y, scalar=scalar, tol=0.1).curvature for name, scalar in scalars.items()}
    values = pd.DataFrame({name: curvature.cpu().numpy() for name, curvature in c.items()})
    values["change"] = stability(net, (first_x, predicted), (NOISE,), noise=("random",)).relative_change
    means = summary(values.melt(var_name="quantity"), "value", ["quantity"])
    clean, attacked = robustness_curve(net, (x, y), (0,)), robustness_curve(net, (first_x, first_y), (eps,), restarts=2)
    shares = pd.concat([clean.assign(quantity="accuracy"), attacked.tail(1).assign(quantity="robust")])
    return pd.concat([shares.rename(columns={"accuracy": "value"})[means.columns], means], ignore_index=True)
