"""The exercises of notebook 08; :mod:`lcnn_utils.exercises.engine` checks them."""

from torch import Tensor, hypot

from .engine import choice_of, exercise, randn


@exercise(
    inputs=[(randn(n, n).abs() + 0.05, 30 * randn(n + 1, n).abs(), eps) for n, eps in [(7, 0.1), (1, 0.5), (20, 0.01)]],
    mistakes={
        "the mean of the quotients, not the quotient of the means": lambda g, h, eps: h.mean() / (g.mean() + eps),
        "ε is added to the gradient's norm, not to the Hessian's": lambda g, h, eps: ((h + eps) / g).mean(),
        "don't forget ε: a gradient may be 0": lambda g, h, eps: (h / g).mean(),
        "the mean, not the median": lambda g, h, eps: (h / (g + eps)).median(),
        "Hessian over gradient, not the other way round": lambda g, h, eps: (g / (h + eps)).mean(),
    },
)
def mean_curvature(grad_norm: Tensor, hessian_norm: Tensor, eps: float) -> Tensor:
    """f(grad_norm, hessian_norm, eps) → the paper's mean C of some images, a number: both norms (N,), ε a number.
    Solution: the mean of ``lcnn_utils.curvature.geometry(...).curvature``."""
    return (hessian_norm / (grad_norm + eps)).mean()


@exercise(
    inputs=[
        (randn(n, n), randn(n + 1, n).abs() + 0.01, randn(n + 2, n), 2 * randn(n + 3, n).abs() + 0.02)
        for n in [60, 1, 200]
    ],
    mistakes={
        "a difference has a size: take its absolute value": lambda a, s, b, t: a - b <= hypot(s, t),
        "independent deviations add as squares: √(s² + t²), not s + t": lambda a, s, b, t: (a - b).abs() <= s + t,
        "both have a standard deviation, ours too": lambda a, s, b, t: (a - b).abs() <= t,
        "both have a standard deviation, theirs too": lambda a, s, b, t: (a - b).abs() <= s,
        "don't forget the root": lambda a, s, b, t: (a - b).abs() <= s**2 + t**2,
        "True where it is inside": lambda a, s, b, t: (a - b).abs() > hypot(s, t),
    },
)
def inside(ours: Tensor, our_std: Tensor, theirs: Tensor, their_std: Tensor) -> Tensor:
    """f(ours, our_std, theirs, their_std) → for each cell whether the difference is at most the joint standard
    deviation, the root of the sum of both squares: four tensors (N,) → bool (N,).
    Solution: ``lcnn_utils.experiments.comparison``."""
    return (ours - theirs).abs() <= hypot(our_std, their_std)


use = choice_of(mean_curvature, inside)
