"""How far must a sample move before the network is wrong, and what is left of the accuracy at each ε (paper, Table 2)?

Threat model: the attacker knows the network and its gradients and moves each sample by a step of length at most ε, in
L2 or L∞, inside the box of valid pixels. What an attack finds is an *upper* bound of robustness: finding nothing proves
nothing. Reference for the intervals: E. Wilson, J. Am. Stat. Assoc. 22 (1927).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import pandas as pd
import torch
from torch import Tensor, nn

from ..curvature import length, measuring, prepare
from ..data import Images, floats
from .pgd import UNIT, Box, ascend, check, fooling, margin_loss, move, pgd, project, random_steps, scale

PAPER_EPS = (0.05, 0.1, 0.15, 0.2)  # L2, table 2
FIRST = 0.05  # ε at which the search for the smallest step begins
BISECTIONS = 10  # of ε, an attack each
HALVINGS = 12  # of a found step, to its shortest wrong part: 2^-12 of its length


def _is_wrong(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Where the network's answer is wrong, or a tie, (N,)."""
    with torch.no_grad():
        logits = model(x)
    return (logits.argmax(1) != y) | (margin_loss(logits, y) >= 0)


def minimal_radius(
    model: nn.Module, x: Tensor, y: Tensor, *, norm: str = "l2", steps: int = 20, restarts: int = 5, box: Box = UNIT
) -> tuple[Tensor, Tensor]:
    """The smallest step found that makes the network wrong about each sample: (its length (N,), the point, like ``x``).

    An upper bound of the distance to the decision boundary, never a certificate: 0 and x where the network is wrong
    already (ties are), infinity and x where nothing was found. ε is doubled from ``FIRST`` until PGD on the margin loss
    succeeds (at most to the whole box, or 20 times without one), then bisected; each step found is cut to the shortest
    part that still makes the network wrong. The first of the ``restarts`` begins on the way to the best point so far,
    the others anywhere in the ball. Other arguments and errors as in :func:`pgd`.
    """
    generator = torch.Generator().manual_seed(0)
    with measuring(model):
        x, y = prepare(model, x, y)
        largest = check(x, 2**20 * FIRST, norm, box, steps=steps, restarts=restarts)[0].item()
        start = min(FIRST, largest)
        radius = torch.where(_is_wrong(model, x, y), 0.0, torch.inf).to(x.dtype)
        point, low, halved = x.clone(), torch.zeros_like(radius), torch.zeros_like(y)
        for _ in range(math.ceil(math.log2(largest / start)) + 1 + BISECTIONS):
            fooled = radius.isfinite()
            todo = torch.where(fooled, (halved < BISECTIONS) & (radius - low > 1e-3 * radius), low < largest)
            eps = torch.where(fooled, (low + radius) / 2, (2 * low).clamp(min=start)).where(todo, 0)
            starts = [project(point - x, eps, norm), *random_steps(x, eps, norm, restarts - 1, generator)]
            tried, loss = ascend(fooling(model, x, y), x, eps, starts, norm, steps, box)
            won = todo & (loss >= 0)
            point[won] = _shortened(model, x[won], y[won], tried[won], box)
            halved += todo & fooled
            radius[won] = length(point[won] - x[won], norm)
            low = torch.where(todo & ~won, eps, torch.where(low < radius, low, radius / 2))  # failing proves nothing
    return radius, point


def _shortened(model: nn.Module, x: Tensor, y: Tensor, x_adv: Tensor, box: Box) -> Tensor:
    """The first points on the ways from x to ``x_adv`` (all wrong) that bisection finds wrong; like x."""
    right, wrong, point = x.new_zeros(len(x)), x.new_ones(len(x)), x_adv.clone()
    for _ in range(HALVINGS if len(x) else 0):
        middle = (right + wrong) / 2
        tried = move(x, scale(x_adv - x, middle), box)
        with torch.no_grad():
            fooled = margin_loss(model(tried), y) >= 0
        right, wrong = torch.where(fooled, right, middle), torch.where(fooled, middle, wrong)
        point[fooled] = tried[fooled]
    return point


def first_success(
    model: nn.Module, x: Tensor, y: Tensor, eps_grid: Iterable[float], *, batch_size: int = 512, seed: int = 0, **attack
) -> Tensor:
    """The smallest ε of the grid at which :func:`pgd` (settings: ``**attack``) makes the network wrong: (N,).

    0 where it is wrong already (a tie counts as wrong), infinity where it is right throughout. Only samples that
    survived the last ε are attacked at the next. Starts depend on a sample's place and the seed, not on who survives.
    """
    generator, grid, parts = torch.Generator().manual_seed(seed), _grid(eps_grid), []
    with measuring(model):
        x, y = prepare(model, x, y)
        for xs, ys in zip(x.split(batch_size), y.split(batch_size), strict=True):
            fell = torch.where(_is_wrong(model, xs, ys), 0.0, torch.inf).to(torch.promote_types(xs.dtype, torch.float))
            for eps in grid:
                left = torch.where(fell.isinf(), eps, 0.0).to(xs)  # the fallen have ε = 0, which costs nothing
                points = pgd(model, xs, ys, left, generator=generator, **attack)
                with torch.no_grad():
                    fell[fell.isinf() & (margin_loss(model(points), ys) >= 0)] = eps
            parts.append(fell)
    return torch.cat(parts)


def robustness_curve(
    model: nn.Module, images: Images | tuple[Tensor, Tensor], eps_grid: Iterable[float] = PAPER_EPS, **attack
) -> pd.DataFrame:
    """Accuracy that an attack leaves at each ε, 0 among them, with 95 % Wilson intervals: :func:`curve_of`, norm, loss.

    ``images``: a split as ``data.load`` gives it, on the model's device, or (x, y); else as :func:`first_success`.
    """
    grid = _grid(eps_grid)
    curve = curve_of(first_success(model, *floats(images), grid, **attack), grid)
    return curve.assign(norm=attack.get("norm", "l2"), loss=attack.get("loss", "margin"))


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
