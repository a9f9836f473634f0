"""The exercises of notebook 09; :mod:`lcnn_utils.exercises.engine` checks them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .engine import choice_of, exercise, is_absent, joined, randn

row = lambda *values: torch.tensor(values, dtype=torch.float64)


def of_batch_norm(function: Callable, *arguments: Any) -> Any:
    """What decides the values of a BatchNorm: the answer's mean, and the sum of its var and eps."""
    answer = function(*arguments)
    if not isinstance(answer, tuple | list) or len(answer) != 3 or any(map(is_absent, answer)):
        return answer
    mean, var, eps = answer
    return joined(lambda: (mean, var + eps))


@exercise(
    inputs=[(2.0, row(1, -2), row(4, 1), 0.1), (0.2, randn(1, 3), randn(11, 3).exp(), 1e-3)],
    mistakes={
        "var is a mean of squares: what becomes of it?": lambda s, mean, var, eps: (mean / s, var / s, eps / s**2),
        "var and eps are of squares of x: what becomes of them?": lambda s, mean, var, eps: (mean / s, var / s, eps),
        "eps stands beside var, and has to shrink like it": lambda s, mean, var, eps: (mean / s, var / s**2, eps),
        "does eps count in x, or in squares of x?": lambda s, mean, var, eps: (mean / s, var / s**2, eps / s),
        "what is the mean of x/σ, when that of x is mean?": lambda s, mean, var, eps: (mean, var / s**2, eps / s**2),
        "a mean is no square": lambda s, mean, var, eps: (mean / s**2, var / s**2, eps / s**2),
        "it now reads what was divided by σ": lambda s, mean, var, eps: (mean * s, var * s**2, eps * s**2),
        "with the old ones, what would it give of x/σ?": lambda s, mean, var, eps: (mean, var, eps),
        "in the order mean, var, eps": lambda s, mean, var, eps: (var / s**2, mean / s, eps / s**2),
    },
    call=of_batch_norm,
    compared="mean, and var + eps: ",
)
def fold_norm(sigma: float, mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor, float]:
    """f(sigma, mean, var, eps) → (mean, var, eps) with which a BatchNorm gives of x/σ what it gave of x with the old
    ones: (x − mean)/√(var + eps) in each channel. mean and var are (C,), sigma > 0 is one number for all channels.
    Solution: ``lcnn_utils.nn.convert._lipschitz_from``."""
    return mean / sigma, var / sigma**2, eps / sigma**2


error = lambda accuracy, n: (accuracy * (1 - accuracy) / n).sqrt()


@exercise(
    inputs=[(row(0.9, 0.5, 0.2), 9), (row(0.98, 0.96, 1.0, 0.0), 180)],
    mistakes={
        "this is the error's square": lambda p, n: error(p, n) ** 2,
        "of one image: how does a mean of n vary?": lambda p, n: error(p, 1),
        "the error of a mean does not fall as fast as 1/n": lambda p, n: error(p, 1) / n,
        "is yours the same for 0.2 and for 0.8?": lambda p, n: (p / n).sqrt(),
        "n images, not n − 1: nothing was estimated before": lambda p, n: error(p, n - 1),
        "one standard error; a 95 % interval is longer": lambda p, n: 1.96 * error(p, n),
    },
)
def standard_error(accuracy: Tensor, n: int) -> Tensor:
    """f(accuracy, n) → the standard error of each accuracy (K,): the standard deviation of a mean of n answers, each
    right (1) with that probability, else wrong (0). Solution: √(p(1 − p)/n) for accuracy p; near 0 and 1
    ``lcnn_utils.attacks.wilson`` is the better interval."""
    return error(accuracy, n)


reach = lambda accuracy, by: accuracy >= accuracy.max() - by
within = lambda accuracy, n: reach(accuracy, error(accuracy.max(), n))


@exercise(
    inputs=[
        (row(0.9, 0.8995, 0.868, 0.845, 0.8, 0.4), 100),
        (row(0.974, 0.980, 0.983, 0.950), 180),
        (row(1.0, 0.99, 1.0, 0.95), 180),
    ],
    mistakes={
        "whose standard error, the best one's or each one's?": lambda acc, n: reach(acc, error(acc, n)),
        "one standard error, not 1.96 of them": lambda acc, n: reach(acc, 1.96 * error(acc.max(), n)),
        "True where an accuracy is good enough": lambda acc, n: ~within(acc, n),
        "only the best: how far below may others be?": lambda acc, n: acc == acc.max(),
        "at 100 % the error is 0: and the best itself?": lambda acc, n: acc > acc.max() - error(acc.max(), n),
        "compare with the best, not with the mean": lambda acc, n: acc >= acc.mean() - error(acc.max(), n),
        "True or False for each, not the accuracies": lambda acc, n: acc[within(acc, n)],
    },
)
def within_one_error(accuracy: Tensor, n: int) -> Tensor:
    """f(accuracy, n) → whether each accuracy is no further below the best one than the best one's
    ``standard_error``: accuracy (K,), shares of the same n images; the answer (K,), booleans. Solution: one line, a
    comparison with the best accuracy less its standard error."""
    return within(accuracy, n)


@exercise(
    inputs=[
        (row(0.2, 0.3, 0.05, 1, 0.15, 0.1), row(0.89, 0.875, 0.88, 0.4, 0.9, 0.885), 100),
        (row(1e-3, 1e-2, 1e-1, 1), row(1.0, 1.0, 0.99, 0.95), 180),
    ],
    mistakes={
        "this one is best by chance: which others are as good?": lambda lambdas, acc, n: lambdas[acc.argmax()],
        "the largest of all: is it accurate enough?": lambda lambdas, acc, n: lambdas.max(),
        "which end of those that are good enough?": lambda lambdas, acc, n: lambdas[within(acc, n)].min(),
        "the largest need not stand last": lambda lambdas, acc, n: lambdas[within(acc, n)][-1],
        "the largest need not stand first": lambda lambdas, acc, n: lambdas[within(acc, n)][0],
        "this is an accuracy: which λ has it?": lambda lambdas, acc, n: acc[within(acc, n)].min(),
        "this is a place in the table: which λ stands there?": lambda lambdas, acc, n: acc.argmax(),
        "one of those that are good enough, not all": lambda lambdas, acc, n: lambdas[within(acc, n)],
    },
)
def choose_lambda(lambdas: Tensor, accuracy: Tensor, n: int) -> Tensor:
    """f(lambdas, accuracy, n) → the largest λ whose validation accuracy is ``within_one_error`` of the best: lambdas
    and accuracy (K,), in any order; accuracies are shares of the same n images. Solution: one line, a condition that
    picks some of the lambdas, and their maximum."""
    return lambdas[within(accuracy, n)].max()


use = choice_of(fold_norm, standard_error, within_one_error, choose_lambda)
