"""Adversarial points: how far must a sample move before the network is wrong (the paper's Table 2)?

Threat model: white box. The attacker knows the network and its gradients and moves each sample by a step of length at
most ε, in L2 or L∞, inside the box of valid pixels. Pixels lie in [0, 1] and ε is in their unit (the paper's: 0.05 to
0.2 in L2). What an attack finds is an *upper* bound of robustness: finding nothing proves nothing.

``ascent`` has the attack itself, ``curves`` what is left of the accuracy at each ε, ``masking`` the checks that such a
number means something. Here is the attack that asks for the smallest step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..curvature import measuring
from ..curvature.premises import _prepare
from .balls import Box, _length, _moved, _project, _random_steps, _scaled
from .pgd import _ascend, _check, _check_eps, margin_loss

HALVINGS = 12  # of a found step, to its shortest wrong part: 2^-12 of its length


def minimal_radius(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    norm: str = "l2",
    steps: int = 50,
    restarts: int = 2,
    bisections: int = 10,
    start: float = 0.05,
    box: Box = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """The smallest step found that makes the network wrong about each sample: (its length (N,), the point, like ``x``).

    An upper bound of the distance to the decision boundary, never a certificate. ε is doubled from ``start`` until
    PGD on the margin loss succeeds, then bisected; each step found is cut to the shortest part of it, by bisection
    along it, that still makes the network wrong. The first PGD of each round starts on the way to the best point so
    far (at x while there is none: exact for a linear network of two classes), the other restarts anywhere in the ball.

    Args:
        steps, restarts: of each PGD.
        bisections: of ε, once a step has been found (fewer where the bracket is within 0.1 %).
        start: first ε tried, in units of x; it is doubled until the ball holds the whole box, or 20 times without one.

    Other arguments and errors as in :func:`pgd`.

    Returns:
        0 and x where the network is wrong already; infinity and x where nothing was found; else the measured length
        of the returned point's step, and the point, which the network does get wrong (in half precision another batch
        size may decide otherwise, by rounding). Exact ties count as wrong, as in :func:`pgd`.
    """
    if not 0 < start < math.inf:
        raise ValueError(f"start is {start}: the first eps tried must be a positive number")
    generator = generator or torch.Generator().manual_seed(0)
    with measuring(model):
        x, y = _prepare(model, x, y)
        _check(x, norm, box, steps=steps, restarts=restarts, bisections=bisections)
        with torch.no_grad():
            logits = model(x)
        radius = torch.where((logits.argmax(1) != y) | (margin_loss(logits, y) >= 0), 0.0, torch.inf).to(x.dtype)
        point, low, halved = x.clone(), torch.zeros_like(radius), torch.zeros_like(y)
        size = 2**20 * start if box is None else (box[1] - box[0]) * (math.sqrt(x[0].numel()) if norm == "l2" else 1)
        start = min(start, size)
        _check_eps(size, x, norm, box)
        for _ in range(max(0, math.ceil(math.log2(size / start))) + 1 + bisections):
            found = radius.isfinite()
            todo = torch.where(found, (halved < bisections) & (radius - low > 1e-3 * radius), low < size)
            eps = torch.where(found, (low + radius) / 2, (2 * low).clamp(min=start)).where(todo, 0)
            starts = [_project(point - x, eps, norm), *_random_steps(x, eps, norm, restarts - 1, generator)]
            ascended, now = _ascend(model, x, y, eps, starts, norm, "margin", steps, None, box)
            won = todo & (now >= 0)
            point[won] = _shortened(model, x[won], y[won], ascended[won], box)
            halved += todo & found
            radius[won] = _length(point[won] - x[won], norm)
            low = torch.where(todo & ~won, eps, torch.where(low < radius, low, radius / 2))  # failing proves nothing
    return radius, point


def _shortened(model: nn.Module, x: Tensor, y: Tensor, found: Tensor, box: Box) -> Tensor:
    """The first points on the ways from x to ``found`` (all wrong) that bisection finds wrong; like x."""
    if not len(x):
        return found
    right, wrong = x.new_zeros(len(x)), x.new_ones(len(x))
    point = found
    for _ in range(HALVINGS):
        middle = (right + wrong) / 2
        tried = _moved(x, _scaled(found - x, middle), box)
        with torch.no_grad():
            fooled = margin_loss(model(tried), y) >= 0
        right, wrong = torch.where(fooled, right, middle), torch.where(fooled, middle, wrong)
        point = torch.where(fooled.view(-1, *[1] * (x.dim() - 1)), tried, point)
    return point
