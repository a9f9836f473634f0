"""The exercises of notebook 08; :mod:`lcnn_utils.exercises.engine` checks them."""

from collections.abc import Callable
from math import inf, nan
from typing import Any

import torch
from torch import Tensor, hypot, tensor

from .engine import choice_of, exercise, randn


@exercise(
    inputs=[(randn(n, n).abs() + 0.05, 30 * randn(n + 1, n).abs(), eps) for n, eps in [(5, 0.1), (1, 0.5), (20, 0.01)]],
    mistakes={
        "a quotient of means: each image has a C of its own": lambda g, h, eps: h.mean() / (g.mean() + eps),
        "which of the two may be 0, so that eps must be added to it?": lambda g, h, eps: ((h + eps) / g).mean(),
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


@exercise(
    inputs=[
        (
            tensor([1.0, 2.25, 3.35, 4.15, 5.15, 9.0]),
            tensor([0.1, 0.2, 0.2, 0.2, 0.1, 2.0]),
            tensor([2.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
            tensor([0.1, 0.2, 0.2, 0.1, 0.2, 2.0]),
        ),
        *[(randn(n, n), randn(n + 1, n).abs() + 0.01, randn(n + 2, n), 2 * randn(n + 3, n).abs()) for n in (60, 200)],
    ],
    mistakes={
        "ours may lie below theirs, too: a difference has a size": lambda a, s, b, t: a - b <= hypot(s, t),
        "variances add up, standard deviations don't": lambda a, s, b, t: (a - b).abs() <= s + t,
        "both have a standard deviation: our_std is not used": lambda a, s, b, t: (a - b).abs() <= t,
        "both have a standard deviation: their_std is not used": lambda a, s, b, t: (a - b).abs() <= s,
        "this compares a difference with a variance": lambda a, s, b, t: (a - b).abs() <= s**2 + t**2,
        "True where it is inside": lambda a, s, b, t: (a - b).abs() > hypot(s, t),
        "inside, for each cell: don't reduce over the cells": lambda a, s, b, t: ((a - b).abs() <= hypot(s, t)).all(),
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


def coded(holds: Tensor, fails: Tensor) -> Tensor:
    return holds.double() - fails.double()


within = lambda low, high, least, most: (least < low) & (high < most)
outside = lambda low, high, least, most: (high <= least) | (low >= most)
known = lambda low: low == low
random_intervals = lambda n: (randn(n, n) - randn(n + 1, n).abs(), randn(n, n) + randn(n + 2, n).abs())


rules = tensor([[3.5, 3.5, 3.5, -1, -inf, 1], [inf, inf, inf, 1, 1, inf]]).double().unbind()


@exercise(
    inputs=[
        (*tensor([[4, 2, 1, -2, 0.2, nan], [6, 4.5, 3, 2, 0.5, nan]]).double().unbind(), *rules),
        (*tensor([[1, 4, 3.5, -0.9, 1, 2], [3, 5, 9, 0.7, 2, 3]]).double().unbind(), *rules),
        *[(*random_intervals(n), -randn(n + 3, n).abs(), randn(n + 4, n).abs()) for n in (90, 200)],
    ],
    mistakes={
        "the middle of the interval decides here: what of the rest?": lambda a, b, c, d: coded(
            within((a + b) / 2, (a + b) / 2, c, d), outside((a + b) / 2, (a + b) / 2, c, d)
        ),
        "this holds as soon as a part of the interval is inside": lambda a, b, c, d: coded(
            known(a) & ~outside(a, b, c, d), outside(a, b, c, d)
        ),
        "this fails as soon as a part of the interval is outside": lambda a, b, c, d: coded(
            within(a, b, c, d), known(a) & ~within(a, b, c, d)
        ),
        "at_most is not used, or not everywhere": lambda a, b, c, d: coded(a > c, b <= c),
        "at_least is not used, or not everywhere": lambda a, b, c, d: coded(b < d, a >= d),
        "1 where it holds, −1 where it fails": lambda a, b, c, d: -coded(within(a, b, c, d), outside(a, b, c, d)),
        "nothing fails here: what of an interval that lies on one side, or on the other?": within,
        "nan: where there is no interval, nothing is shown either way": lambda a, b, c, d: coded(
            within(a, b, c, d), outside(a, b, c, d) | ~known(a)
        ),
        "an interval that touches a limit: the limits themselves are outside": lambda a, b, c, d: coded(
            (a >= c) & (b <= d), (b < c) | (a > d)
        ),
        "entry by entry: `and`, `or` and `if` take a single truth value": lambda a, b, c, d: bool(a > c),
        "make numbers of truth values before you subtract": lambda a, b, c, d: within(a, b, c, d) - outside(a, b, c, d),
        "only 1 and −1: what lies partly inside is open, and so is nan": lambda a, b, c, d: coded(
            within(a, b, c, d), ~within(a, b, c, d)
        ),
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
