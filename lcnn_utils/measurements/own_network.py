"""What notebook 09 measures: a network of one's own, and what softer activations do to it without training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pandas as pd
from torch import Tensor, nn
from tqdm import tqdm

from ..attacks import robustness_curve
from ..curvature import evaluating
from ..nn import refresh_statistics, softened
from ..saliency import stability
from ..saliency.stability import summary
from .curvature import net_frame
from .lipschitz import STATISTICS

BETAS = (1000, 300, 100, 50, 30, 20, 10, 7, 5, 4, 3, 2, 1.5, 1, 0.5, 0.3)
NOISE = 0.1  # ‖η‖₂ under which gradients are compared
Nets = nn.Module | Sequence[nn.Module]


def softening(
    nets: Nets, x: Tensor, y: Tensor, betas: Iterable[float] = BETAS, *, train: Tensor | None = None, **options
) -> pd.DataFrame:
    """:func:`qualities` (``options``) of nets that are :func:`nn.softened` to each β, the largest first, not trained.

    ``train``: images (N, C, H, W) on which BatchNorm's running statistics are measured again, as a second series:
    softer activations send other values. Columns beta, statistics (of ``STATISTICS``) added. Errors: as of both.
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
    """A row for each of: accuracy on all of x, y; of the first ``images`` of them ``robust``, the accuracy that PGD
    (L2, ``eps``) leaves; mean C of the loss and of the margin; ``change``, the mean relative change of the loss's
    gradient under random noise of length ``NOISE`` (left out where no image is right).

    Columns quantity, n (images), value, low, high: 95 % intervals over the images; of several ``nets``, which may
    differ by their seed, the mean of their values and its range. ValueError: bad input, as :func:`curvature.geometry`.
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
    first = x[:images], y[:images]
    with evaluating(net):
        geometry = net_frame(net, *first)
    values = geometry[["curvature", "margin_curvature"]].melt(var_name="quantity", value_name="of_image")
    if geometry.correct.any():
        change = stability(net, first, (NOISE,), noise=("random",)).relative_change
        values = pd.concat([values, pd.DataFrame({"quantity": "change", "of_image": change})])
    shares = {"accuracy": robustness_curve(net, (x, y), (0,)), "robust": robustness_curve(net, first, (eps,), restarts=2)}
    rows = [curve.tail(1).assign(quantity=name, value=curve.accuracy) for name, curve in shares.items()]
    means = summary(values, "of_image", ["quantity"])
    return pd.concat([*rows, means])[means.columns].reset_index(drop=True)
