"""The exercises of notebook 09; :mod:`lcnn_utils.exercises.engine` checks them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .engine import choice_of, exercise, is_absent, randn


def in_a_row(function: Callable, sigma: float, mean: Tensor, var: Tensor, eps: float) -> Any:
    """The three parts that a function answers as one tensor (2C + 1,)."""
    answer = function(sigma, mean, var, eps)
    if not isinstance(answer, tuple | list) or any(is_absent(part) for part in answer):
        return answer
    return torch.cat([torch.as_tensor(part, dtype=torch.float64).flatten() for part in answer])


@exercise(
    inputs=[(3.0, randn(0, 4), randn(10, 4).exp(), 1e-2), (0.2, randn(1, 3), randn(11, 3).exp(), 1e-3)],
    mistakes={
        "a variance is a square: divide it by σ²": lambda s, mean, var, eps: (mean / s, var / s, eps / s**2),
        "eps is added to the variance: it has to shrink like it": lambda s, m, var, eps: (m / s, var / s**2, eps),
        "eps is a variance, too: divide it by σ²": lambda s, mean, var, eps: (mean / s, var / s**2, eps / s),
        "the mean of x/σ is the mean of x, over σ": lambda s, mean, var, eps: (mean, var / s**2, eps / s**2),
        "a mean is no square: divide it by σ": lambda s, mean, var, eps: (mean / s**2, var / s**2, eps / s**2),
        "the other way round: what comes in became smaller": lambda s, m, v, eps: (m * s, v * s**2, eps * s**2),
        "all three change": lambda s, mean, var, eps: (mean, var, eps),
    },
    call=in_a_row,
    compared="mean, var and eps in one row: ",
)
def fold_norm(sigma: float, mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor, float]:
    """f(sigma, mean, var, eps) → (mean, var, eps) with which a BatchNorm gives of x/σ what it gave of x with the old
    ones: (x − mean)/√(var + eps) in each channel. mean and var are (C,), sigma > 0 is one number for all channels.
    Solution: ``lcnn_utils.nn.convert._lipschitz_from``."""
    return mean / sigma, var / sigma**2, eps / sigma**2


table = lambda **rows: tuple(torch.tensor(row, dtype=torch.float64) for row in rows.values())
LAMBDAS = [0.15, 0.6, 0.05, 1.0, 0.3, 0.1, 0.8, 0.4, 0.2]
TABLES = [  # in the first, each of the mistakes below chooses another λ
    (*table(lambdas=[*LAMBDAS, 0.12], accuracy=[0.89, 0.845, 0.88, 0.4, 0.875, 0.9, 0.65, 0.868, 0.8995, 0.89]), 100),
    (*table(lambdas=[1e-3, 1e-2, 1e-1, 1.0], accuracy=[0.980, 0.983, 0.974, 0.950]), 180),
    (*table(lambdas=[1e-3, 1e-2, 1e-1, 1.0], accuracy=[1.0, 1.0, 0.99, 0.95]), 180),
    (*table(lambdas=[3.0], accuracy=[0.7]), 20),
]
error = lambda accuracy, n: (accuracy * (1 - accuracy) / n).sqrt()
reached = lambda lambdas, accuracy, by: lambdas[accuracy >= accuracy.max() - by]  # in the table's order
within = lambda lambdas, accuracy, n, times=1.0: reached(lambdas, accuracy, times * error(accuracy.max(), n))


@exercise(
    inputs=TABLES,
    mistakes={
        "this one is best by chance: larger ones may be as good": lambda lams, acc, n: lams[acc.argmax()],
        "the largest of all: its accuracy is too low": lambda lams, acc, n: lams.max(),
        "this is the smallest λ within reach, not the largest": lambda lams, acc, n: within(lams, acc, n).min(),
        "the largest, which need not stand last": lambda lams, acc, n: within(lams, acc, n)[-1],
        "divide by n under the root": lambda lams, acc, n: within(lams, acc, 1).max(),
        "that is the error's square": lambda lams, acc, n: reached(lams, acc, error(acc.max(), n) ** 2).max(),
        "one standard error, not 1.96": lambda lams, acc, n: within(lams, acc, n, 1.96).max(),
        "the standard error of the best, not of each": lambda lams, acc, n: reached(lams, acc, error(acc, n)).max(),
    },
)
def choose_lambda(lambdas: Tensor, accuracy: Tensor, n: int) -> Tensor:
    """f(lambdas, accuracy, n) → the largest λ whose validation accuracy is no further below the best one than the
    best one's standard error, √(p(1 − p)/n). lambdas and accuracy are (K,), in any order; accuracies are shares, each
    of the same n images. Solution: notebook 09, the cell that chooses λ."""
    return within(lambdas, accuracy, n).max()


use = choice_of(fold_norm, choose_lambda)
