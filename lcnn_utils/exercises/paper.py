"""The exercises of notebook 08; :mod:`lcnn_utils.exercises.engine` checks them."""

from collections.abc import Callable
from math import inf, nan
from typing import Any

import torch
from torch import Tensor, hypot, tensor

from .engine import choice_of, exercise, randn


@exercise(
    inputs=[(randn(n, n).abs() + 0.05, 30 * randn(n + 1, n).abs(), eps) for n, eps in [(5, 0.5), (20, 0.01)]],
    mistakes={
        "a quotient of means: each image has a C of its own": lambda g, h, eps: h.mean() / (g.mean() + eps),
        "which of the two may be 0, and needs eps?": lambda g, h, eps: ((h + eps) / g).mean(),
        "eps is added to every norm, not only to small ones": lambda g, h, eps: (h / g.clamp(min=eps)).mean(),
        "eps is not used: a gradient may be 0": lambda g, h, eps: (h / g).mean(),
        "eps belongs to the denominator": lambda g, h, eps: (h / g + eps).mean(),
        "the mean, not the median": lambda g, h, eps: (h / (g + eps)).median(),
        "which norm is divided by which?": lambda g, h, eps: (g / (h + eps)).mean(),
        "this is one C an image: the table has one number a net": lambda g, h, eps: h / (g + eps),
    },
)
def mean_curvature(grad_norm: Tensor, hessian_norm: Tensor, eps: float) -> Tensor:
    """f(grad_norm, hessian_norm, eps) → the paper's mean C of some images, a number: both norms (N,), ε a number.
    Solution: the mean of ``lcnn_utils.curvature.geometry(...).curvature``."""
    return (hessian_norm / (grad_norm + eps)).mean()


CELLS = [[1, 2.25, 3.35, 4.15, 5.15, 9], [0.1, 0.2, 0.2, 0.2, 0.1, 2], [2, 2, 3, 4, 5, 6], [0.1, 0.2, 0.2, 0.1, 0.2, 2]]


@exercise(
    inputs=[
        tuple(tensor(CELLS)),
        (randn(0, 200), randn(1, 200).abs() + 0.01, randn(2, 200), 2 * randn(3, 200).abs()),
    ],
    mistakes={
        "ours may lie below theirs, too: a difference has a size": lambda a, s, b, t: a - b <= hypot(s, t),
        "variances add up, standard deviations don't": lambda a, s, b, t: (a - b).abs() <= s + t,
        "both have a standard deviation: our_std is not used": lambda a, s, b, t: (a - b).abs() <= t,
        "both have a standard deviation: their_std is not used": lambda a, s, b, t: (a - b).abs() <= s,
        "this compares a difference with a variance": lambda a, s, b, t: (a - b).abs() <= s**2 + t**2,
        "True where it is inside": lambda a, s, b, t: (a - b).abs() > hypot(s, t),
        "for each cell: don't reduce over the cells": lambda a, s, b, t: ((a - b).abs() <= hypot(s, t)).all(),
    },
)
def inside(ours: Tensor, our_std: Tensor, theirs: Tensor, their_std: Tensor) -> Tensor:
    """f(ours, our_std, theirs, their_std) → for each cell whether the difference is at most the joint standard
    deviation, the root of the sum of both squares: four tensors (N,) → bool (N,).
    Solution: ``lcnn_utils.experiments.comparison``."""
    return (ours - theirs).abs() <= hypot(our_std, their_std)


def as_numbers(function: Callable, *arguments: Any) -> Any:
    """A tensor of any dtype in float64."""
    answer = function(*arguments)
    return answer.double() if isinstance(answer, Tensor) else answer


coded = lambda holds, fails: holds.double() - fails.double()
within = lambda low, high, least, most: (least < low) & (high < most)
outside = lambda low, high, least, most: (high <= least) | (low >= most)
touching = lambda low, high, least, most: (least <= low) & (high <= most)
beyond = lambda low, high, least, most: (high < least) | (low > most)
by_middle = lambda middle, *rules: coded(within(middle, middle, *rules), outside(middle, middle, *rules))
rows = lambda *numbers: tensor(numbers, dtype=torch.float64)
RULES = (rows(3.5, 3.5, 3.5, -1, -inf, 1), rows(inf, inf, inf, 1, 1, inf))


@exercise(
    inputs=[
        (rows(4, 2, 1, -2, 0.2, nan), rows(6, 4.5, 3, 2, 0.5, nan), *RULES),
        (rows(1, 4, 3.5, -0.9, 1, 2), rows(3, 5, 9, 0.7, 2, 3), *RULES),
        (rows(1, 4, 3, -0.5, 0, 2), rows(3, 5, 3.5, 1, 1, 3), *RULES),
        (randn(0, 90) - randn(1, 90).abs(), randn(0, 90) + randn(2, 90).abs(), -randn(3, 90).abs(), randn(4, 90).abs()),
    ],
    mistakes={
        "does it hold where an end touches a limit?": lambda *a: coded(touching(*a), outside(*a)),
        "does it fail where only an end touches a limit?": lambda *a: coded(within(*a), beyond(*a)),
        "the middle decides here: what of the rest?": lambda a, b, *r: by_middle((a + b) / 2, *r),
        "this holds as soon as a part is inside": lambda a, *r: coded(~outside(a, *r) & (a == a), outside(a, *r)),
        "this fails as soon as a part is outside": lambda a, *r: coded(within(a, *r), ~within(a, *r) & (a == a)),
        "at_most is not used everywhere": lambda a, b, c, d: coded(a > c, b <= c),
        "at_least is not used everywhere": lambda a, b, c, d: coded(b < d, a >= d),
        "does nothing fail here? An interval may lie on one side": within,
        "nan shows nothing either way": lambda a, *r: coded(within(a, *r), outside(a, *r) | (a != a)),
        "only 1 and −1: what lies partly inside is open": lambda *a: coded(within(*a), ~within(*a)),
    },
    call=as_numbers,
)
def verdict(low: Tensor, high: Tensor, at_least: Tensor, at_most: Tensor) -> Tensor:
    """f(low, high, at_least, at_most) → 1 where all of an interval from low to high lies strictly between at_least and
    at_most (it holds), −1 where none of it does (it fails), 0 where a part does, or for nan (open): (N,) each.
    Solution: the method ``verdict`` of ``lcnn_utils.experiments.Claim``."""
    holds = (at_least < low) & (high < at_most)
    fails = (high <= at_least) | (low >= at_most)
    return torch.where(holds, 1, torch.where(fails, -1, 0))


use = choice_of(mean_curvature, inside, verdict)
