"""The checks of notebook 08; see :mod:`lcnn_utils.exercises.engine`."""

from collections.abc import Callable

import torch

from .engine import randn, verdict

__all__ = ["inside", "mean_curvature"]


def mean_curvature(f: Callable) -> bool | None:
    """f(grad_norm, hessian_norm, eps) → the paper's mean C of some images, a number: both norms (N,), ε a number.
    Solution: the mean of ``lcnn_utils.curvature.geometry(...).curvature``."""
    truth = lambda g, h, eps: (h / (g + eps)).mean()
    mistakes = {
        "the mean of the quotients, not the quotient of the means": lambda g, h, eps: h.mean() / (g.mean() + eps),
        "ε is added to the gradient's norm, not to the Hessian's": lambda g, h, eps: ((h + eps) / g).mean(),
        "don't forget ε: a gradient may be 0": lambda g, h, eps: (h / g).mean(),
        "the mean, not the median": lambda g, h, eps: (h / (g + eps)).median(),
        "Hessian over gradient, not the other way round": lambda g, h, eps: (g / (h + eps)).mean(),
    }
    sizes = [(7, 0.1), (1, 0.5), (20, 0.01), (5, 0.3)]
    inputs = [(randn(i, n).abs() + 0.05, 30 * randn(i + 10, n).abs(), eps) for i, (n, eps) in enumerate(sizes)]
    return verdict(mean_curvature, f, inputs, truth, mistakes)


def inside(f: Callable) -> bool | None:
    """f(ours, our_spread, theirs, their_spread) → for each cell whether the difference is at most the joint spread, the
    root of the sum of both squares: four tensors (N,) → bool (N,). Solution: ``lcnn_utils.experiments.comparison``."""
    truth = lambda a, sa, b, sb: (a - b).abs() <= torch.hypot(sa, sb)
    mistakes = {
        "a difference has a size: take its absolute value": lambda a, sa, b, sb: a - b <= torch.hypot(sa, sb),
        "independent spreads add as squares: √(s² + t²), not s + t": lambda a, sa, b, sb: (a - b).abs() <= sa + sb,
        "both have a spread, ours too": lambda a, sa, b, sb: (a - b).abs() <= sb,
        "both have a spread, theirs too": lambda a, sa, b, sb: (a - b).abs() <= sa,
        "don't forget the root": lambda a, sa, b, sb: (a - b).abs() <= sa.square() + sb.square(),
        "True where it is inside": lambda a, sa, b, sb: (a - b).abs() > torch.hypot(sa, sb),
    }
    inputs = []
    for i, n in enumerate((60, 1, 200, 40)):
        spreads = [randn(i + 10 * k, n).abs() + 0.01 for k in (1, 2)]
        inputs.append((randn(i, n), spreads[0], randn(i + 30, n), 2 * spreads[1]))
    return verdict(inside, f, inputs, truth, mistakes)
