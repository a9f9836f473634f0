"""The exercises of notebook 01; :mod:`lcnn_utils.exercises.engine` checks them."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, sigmoid
from torch.func import grad

from .engine import choice_of, exercise, is_stub, randn, stacked

LOG2 = math.log(2)
OVERFLOW = "e^{βx} overflows: use F.softplus, torch.logaddexp, or log1p of e^{−β|x|}"


@exercise(
    inputs=[
        ((3 * randn(0, 7)).float(), 3.0),
        (3 * randn(1, 2, 3, 4), 0.5),
        ((3 * randn(2, 7)).float(), 0.01),
        (3 * randn(3), 1e3),
        (torch.tensor([-500.0, -1.0, 0.0, 1.0, 500.0]), 100.0),
    ],
    mistakes={
        "not centred: subtract the value at 0, log 2/β": lambda x, beta: F.softplus(x, beta),
        "the value at 0 is log 2/β, not log 2": lambda x, beta: F.softplus(x, beta) - LOG2,
        "divide by β": lambda x, beta: F.softplus(beta * x) - LOG2,
        "β is not used: this is the one of β = 1": lambda x, beta: F.softplus(x) - LOG2,
        "this is plain softplus of β = 1: neither β nor the centring is there": lambda x, beta: F.softplus(x),
    },
    wild=OVERFLOW,
)
def centered_softplus(x: Tensor, beta: float) -> Tensor:
    """f(x, beta) → (log(1 + e^{βx}) − log 2)/β, like x in shape and dtype, for a number β > 0 and however large x.
    Solution: ``lcnn_utils.nn.centered_softplus``."""
    exact = torch.logaddexp(beta * x.double(), torch.zeros_like(x.double())) - LOG2
    return (exact / beta).to(x.dtype)


bump = lambda t: sigmoid(t) * sigmoid(-t)  # σ′ = σ(1 − σ)


@exercise(
    inputs=[
        (3 * randn(1, 2, 7) / scale, beta) for beta, scale in [(3.0, 1), (0.5, 1), (0.01, 0.01), (1e3, 1), (1e3, 1e3)]
    ],
    mistakes={
        "s₀″ lacks the β of the chain rule": lambda x, beta: (sigmoid(beta * x), bump(beta * x)),
        "swapped: s₀′ comes first": lambda x, beta: (beta * bump(beta * x), sigmoid(beta * x)),
        "the slope is σ(βx), not σ(x)": lambda x, beta: (sigmoid(x), beta * bump(x)),
        "the slope is σ(βx), not σ(x), so s₀″ has a factor β": lambda x, beta: (sigmoid(x), bump(x)),
        "s₀″ lacks the factor 1 − σ(βx)": lambda x, beta: (sigmoid(beta * x), beta * sigmoid(beta * x)),
        "β and 1/β cancel in s₀′": lambda x, beta: (beta * sigmoid(beta * x), beta**2 * bump(beta * x)),
    },
    wild="e^{βx} overflows: use torch.sigmoid(βx)",
    call=stacked,
    compared="s₀′ and s₀″, stacked: ",
)
def derivatives(x: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """f(x, beta) → the pair (s₀′, s₀″) of the centered softplus, each like x (any shape), for a number β > 0.
    Solution: the first lines of ``lcnn_utils/nn/softplus.py``."""
    return sigmoid(beta * x), beta * bump(beta * x)


def largest_second_derivative(function: Callable, c: float) -> Any:
    """That of the centered softplus, by differentiating at the β that a function answers."""
    answer = function(c)
    if is_stub(answer):
        return answer
    beta = torch.as_tensor(answer, dtype=torch.float64).detach()
    x = torch.linspace(-5, 5, 1001, dtype=torch.float64) / beta
    return grad(lambda x: sigmoid(beta * x).sum())(x).max()


@exercise(
    inputs=[(2.5,), (0.25,), (1.0,), (30.0,), (0.01,)],
    mistakes={
        "at 0, s₀″ = β·½·½: a quarter of β is reached, so c itself is too small": lambda c: c,
        "inverted: multiply by 4 where you divide": lambda c: c / 4,
        "at 0, s₀″ = βσ(1 − σ) is β/4, not β/2": lambda c: 2 * c,
    },
    wild="β is a finite number above 0",
    call=largest_second_derivative,
    compared="largest s₀″ at your β: ",
)
def beta_for_curvature(c: float) -> float:
    """f(c) → the number β at which the largest second derivative of the centered softplus is c > 0.
    That is measured, by differentiating at your β. Solution: the head of ``lcnn_utils.nn.softplus``."""
    return 4 * c


use = choice_of(centered_softplus, derivatives, beta_for_curvature)
