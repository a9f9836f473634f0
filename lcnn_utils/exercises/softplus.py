"""The exercises of notebook 01; :mod:`lcnn_utils.exercises.engine` checks them."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, sigmoid
from torch.func import grad

from .engine import choice_of, exercise, is_stub, joined, randn

LOG2 = math.log(2)


@exercise(
    inputs=[
        (torch.tensor([-1.0, 0.0, 2.0]), 3.0),
        (3 * randn(1, 2, 3, 4), 0.5),
        ((3 * randn(2, 7)).float(), 0.01),
        (torch.tensor([-500.0, -1.0, 0.0, 1.0, 500.0]), 100.0),
    ],
    mistakes={
        "what is its value at x = 0? It has to be 0": lambda x, beta: F.softplus(x, beta),
        "how does the value at 0 depend on beta?": lambda x, beta: F.softplus(x, beta) - LOG2,
        "too steep: what stands below the fraction bar?": lambda x, beta: F.softplus(beta * x) - LOG2,
        "beta is not used": lambda x, beta: F.softplus(x) - LOG2,
    },
    wild="e^{βx} overflows where βx is large, though its logarithm would not: never form it alone",
)
def centered_softplus(x: Tensor, beta: float) -> Tensor:
    """f(x, beta) → (log(1 + e^{βx}) − log 2)/β, like x in shape and dtype, for a number β > 0 and however large x.
    Solution: ``lcnn_utils.nn.centered_softplus``."""
    exact = torch.logaddexp(beta * x.double(), torch.zeros_like(x.double())) - LOG2
    return (exact / beta).to(x.dtype)


bump = lambda t: sigmoid(t) * sigmoid(-t)  # σ′ = σ(1 − σ)


@exercise(
    inputs=[(torch.tensor([-0.5, 0.0, 1.0], dtype=torch.float64), 3.0)]
    + [(3 * randn(1, 2, 7) / scale, beta) for beta, scale in [(0.5, 1), (0.01, 0.01), (1e3, 1), (1e3, 1e3)]],
    mistakes={
        "s₀″ lacks a factor: the chain rule, once more": lambda x, beta: (sigmoid(beta * x), bump(beta * x)),
        "swapped: the first derivative comes first": lambda x, beta: (beta * bump(beta * x), sigmoid(beta * x)),
        "beta is missing from what σ is taken of": lambda x, beta: (sigmoid(x), beta * bump(x)),
        "where is beta? s₀′ depends on it, and s₀″ does twice": lambda x, beta: (sigmoid(x), bump(x)),
        "the derivative of σ is no σ": lambda x, beta: (sigmoid(beta * x), beta * sigmoid(beta * x)),
        "a factor beta too many": lambda x, beta: (beta * sigmoid(beta * x), beta**2 * bump(beta * x)),
    },
    wild="e^{βx} overflows where βx is large: torch has σ, which doesn't",
    call=joined,
    compared="s₀′ and s₀″, stacked: ",
)
def derivatives(x: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """f(x, beta) → the pair (s₀′, s₀″) of the centered softplus, each like x (any shape), for a number β > 0.
    Solution: the first lines of ``lcnn_utils/nn/softplus.py``."""
    return sigmoid(beta * x), beta * bump(beta * x)


def largest_second_derivative(function: Callable, c: float) -> Any:
    """That of the centered softplus, by differentiating at the β that a function answers."""
    answer = function(c)
    if is_stub(answer) or isinstance(answer, tuple):
        return answer
    beta = torch.as_tensor(answer, dtype=torch.float64).detach()
    x = torch.linspace(-5, 5, 1001, dtype=torch.float64) / beta
    return grad(lambda x: sigmoid(beta * x).sum())(x).max()


@exercise(
    inputs=[(2.5,), (0.25,), (30.0,)],
    mistakes={
        "how much of β does s₀″ reach at its largest?": lambda c: c,
        "the other way round: a larger c needs a larger β": lambda c: c / 4,
        "both factors, σ and 1 − σ, are ½ at 0": lambda c: 2 * c,
    },
    call=largest_second_derivative,
    compared="largest s₀″ at your β: ",
)
def beta_for_curvature(c: float) -> float:
    """f(c) → the number β at which the largest second derivative of the centered softplus is c > 0.
    That is measured, by differentiating at your β. Solution: the head of ``lcnn_utils.nn.softplus``."""
    return 4 * c


@exercise(
    inputs=[(E, centered) for centered in (False, True) for E in (3.0, 0.25, 7.0)],
    mistakes={
        "centered is not used": lambda E, centered: 1 + E,
        "nothing is halved where centered is False": lambda E, centered: (1 + E) / 2,
        "this is v or βv, not its exponential": lambda E, centered: math.log((1 + E) / (1 + centered)),
        "log 2 less in βv: what is that for e^{βv}?": lambda E, centered: 1 + E - LOG2 * centered,
        "E is e^{βu} already: don't take its exponential": lambda E, centered: (1 + math.exp(E)) / (1 + centered),
        "the 1 under the logarithm is missing": lambda E, centered: E / (1 + centered),
    },
)
def next_exponential(E: float, centered: bool) -> float:
    """f(E, centered) → e^{βv} behind a layer, from E = e^{βu} before it: v = s(u; β), or s₀(u; β) if centered.
    Solution: βv = log(1 + E), so it is 1 + E, and half of that where log 2 is subtracted."""
    return (1 + E) / 2 if centered else 1 + E


STACKS = [(torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64), 2.0, 5), (randn(3, 9), 0.5, 5), (randn(4, 4), 4.0, 1)]
exp_of = lambda x, beta: torch.exp(beta * x)


@exercise(
    inputs=STACKS,
    mistakes={
        "this is one layer: n is not used": lambda x, beta, n: F.softplus(x, beta),
        "each layer adds less than the first, and x is missing": lambda x, beta, n: n * LOG2 / beta,
        "each layer adds less than the first; where is x?": lambda x, beta, n: n * LOG2 / beta + 0 * x,
        "at x = 0 only: what is E at another x?": lambda x, beta, n: math.log(n + 1) / beta + 0 * x,
        "each layer adds less than the first one": lambda x, beta, n: F.softplus(x, beta) + (n - 1) * LOG2 / beta,
        "divide by beta at the end": lambda x, beta, n: torch.log(n + exp_of(x, beta)),
        "this is E: go back to x": lambda x, beta, n: n + exp_of(x, beta),
        "each layer adds to E, it doesn't multiply": lambda x, beta, n: F.softplus(x, beta) * n,
    },
)
def plain_stack(x: Tensor, beta: float, n: int) -> Tensor:
    """f(x, beta, n) → the output of n plain softplus units behind one another, elementwise, like x.
    Solution: log(n + e^{βx})/β."""
    return torch.log(n + torch.exp(beta * x)) / beta


plain = plain_stack.reference


@exercise(
    inputs=STACKS,
    mistakes={
        "these are n plain layers: centering changes what a layer does to E": plain,
        "this is one layer: n is not used": lambda x, beta, n: F.softplus(x, beta) - LOG2 / beta,
        "centre each layer, not only the last": lambda x, beta, n: plain(x, beta, n) - math.log(n + 1) / beta,
        "subtracting at the end is another thing": lambda x, beta, n: plain(x, beta, n) - n * LOG2 / beta,
        "how many layers are these?": lambda x, beta, n: torch.log1p((exp_of(x, beta) - 1) / 2 ** (n - 1)) / beta,
        "right near x = 0 only": lambda x, beta, n: x / 2**n,
        "at x = 0 this isn't 0: what is halved?": lambda x, beta, n: torch.log(1 + exp_of(x, beta) / 2**n) / beta,
        "what is left is halved n times": lambda x, beta, n: torch.log1p((exp_of(x, beta) - 1) / (2 * n)) / beta,
        "it is the distance of E from 1 that is halved": lambda x, beta, n: x - n * LOG2 / beta,
        "divide by beta at the end": lambda x, beta, n: torch.log1p((exp_of(x, beta) - 1) / 2**n),
    },
)
def centered_stack(x: Tensor, beta: float, n: int) -> Tensor:
    """f(x, beta, n) → the output of n centered softplus units behind one another, elementwise, like x.
    Solution: log(1 + (e^{βx} − 1)/2ⁿ)/β."""
    return torch.log1p(torch.expm1(beta * x) / 2**n) / beta


use = choice_of(centered_softplus, derivatives, beta_for_curvature, next_exponential, plain_stack, centered_stack)
