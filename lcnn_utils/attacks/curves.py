"""What is left of a network's accuracy at each ε (the paper's Table 2), with intervals.

At each ε of a grid only the samples that survived the last one are attacked: a point of the smaller ball lies in the
larger one too, so the curve falls by construction, and the more of them fall, the less it costs.

Reference for the intervals: E. Wilson, J. Am. Stat. Assoc. 22 (1927).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import pandas as pd
import torch
from torch import Tensor, nn

from ..curvature import measuring
from ..curvature.premises import _prepare
from ..data import Images, floats
from .pgd import _attack, margin_loss

PAPER_EPS = (0.05, 0.1, 0.15, 0.2)  # L2, table 2


def first_success(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps_grid: Iterable[float],
    *,
    batch_size: int = 512,
    generator: torch.Generator | None = None,
    **attack,
) -> Tensor:
    """The smallest ε of the grid at which :func:`ascent.pgd` makes the network wrong about each sample: (N,).

    0 where it is wrong already (a tie counts as wrong), infinity where it is right throughout. A sample's starts depend
    on its place among x and on the seed, not on which others survive.

    Args:
        eps_grid: lengths in units of x, in any order.
        batch_size: samples attacked at once (memory).
        generator: of the starts (default: seed 0).
        **attack: ``norm``, ``loss``, ``steps``, ``restarts``, … of :func:`ascent.pgd`.

    Raises:
        ValueError: bad samples, labels, ε or settings of the attack.
    """
    generator = generator or torch.Generator().manual_seed(0)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    with measuring(model):
        x, y = _prepare(model, x, y)
        grid, parts = _grid(eps_grid), []
        for xs, ys in zip(x.split(batch_size), y.split(batch_size), strict=True):
            with torch.no_grad():
                logits = model(xs)
            wrong = (logits.argmax(1) != ys) | (margin_loss(logits, ys) >= 0)
            fell = torch.where(wrong, 0.0, torch.inf).to(torch.promote_types(xs.dtype, torch.float32))
            for eps in grid:
                left = torch.where(fell.isinf(), eps, 0.0).to(xs)  # the fallen have ε = 0, which costs nothing
                loss = _attack(model, xs, ys, left, generator=generator, **attack)[1]
                fell[fell.isinf() & (loss >= 0)] = eps
            parts.append(fell)
    return torch.cat(parts)


def robustness_curve(
    model: nn.Module, images: Images | tuple[Tensor, Tensor], eps_grid: Iterable[float] = PAPER_EPS, **attack
) -> pd.DataFrame:
    """Accuracy that an attack leaves at each ε, 0 among them, with 95 % Wilson intervals.

    Args:
        images: a split as ``data.load`` gives it, on the model's device, or (x, y).
        **attack: arguments of :func:`first_success`.

    Returns:
        Columns eps, correct, n, accuracy, low, high (shares), norm, loss.

    Raises:
        ValueError: as :func:`first_success`.
    """
    grid = _grid(eps_grid)
    return curve_of(first_success(model, *floats(images), grid, **attack), grid).assign(
        norm=attack.get("norm", "l2"), loss=attack.get("loss", "margin")
    )


def curve_of(fell: Tensor, eps_grid: Iterable[float]) -> pd.DataFrame:
    """The curve of samples whose first success is known, (N,): columns eps, correct, n, accuracy, low, high."""
    rows = []
    for eps in dict.fromkeys((0.0, *_grid(eps_grid))):
        correct = int((fell > eps).sum())
        rows.append((eps, correct, len(fell), correct / len(fell), *wilson(correct, len(fell))))
    return pd.DataFrame(rows, columns=["eps", "correct", "n", "accuracy", "low", "high"])


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a share that was ``successes`` of ``n``."""
    from scipy.stats import binomtest  # here: it takes half a second to import

    interval = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def _grid(eps_grid: Iterable[float]) -> list[float]:
    """Distinct values in growing order."""
    grid = sorted({float(e) for e in eps_grid})
    if not grid or not all(0 <= e < math.inf for e in grid):
        raise ValueError(f"eps_grid must hold lengths, finite and 0 or more, at least one of them; got {grid}")
    return grid
