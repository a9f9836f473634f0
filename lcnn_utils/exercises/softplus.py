"""The checks of notebook 01; see :mod:`lcnn_utils.exercises.engine`."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad

from ..nn import softplus as activations
from .engine import randn, verdict

__all__ = ["beta_for_curvature", "centered_softplus", "derivatives"]


def centered_softplus(f: Callable) -> bool | None:
    """f(x, beta) → (log(1 + e^{βx}) − log 2)/β, like x in shape and dtype, for a number β > 0 and however large x.
    Solution: ``lcnn_utils.nn.centered_softplus``."""
    settings = [(b, s, d) for b in (3.0, 0.5, 0.01, 1e3) for s in ((7,), (2, 3, 4), ()) for d in ("float32", "float64")]
    inputs: list = [((3 * randn(0, *shape)).to(getattr(torch, dtype)), beta) for beta, shape, dtype in settings]
    inputs.append((torch.tensor([-500.0, -1.0, 0.0, 1.0, 500.0]), 100.0))
    plus, log2 = lambda t: torch.logaddexp(t, torch.zeros_like(t)), math.log(2)
    overflow = "e^{βx} overflows: use F.softplus, torch.logaddexp, or log1p of e^{−β|x|}"
    mistakes = {
        "not centred: too large by log 2/β everywhere; subtract the value at 0": lambda x, b: plus(b * x) / b,
        "the value at 0 is log 2/β, not log 2": lambda x, b: plus(b * x) / b - log2,
        "divide by β": lambda x, b: plus(b * x) - log2,
        "β is not used: this is the one of β = 1": lambda x, b: plus(x) - log2,
        "this is plain softplus of β = 1: neither β nor the centring is there": lambda x, b: plus(x),
        overflow: lambda x, b: ((b * x).exp() + 1).log() / b - log2 / b,
    }
    truth = lambda x, beta: ((plus(beta * x.double()) - log2) / beta).to(x.dtype)
    return verdict(centered_softplus, f, inputs, truth, mistakes, overflow)


def derivatives(f: Callable) -> bool | None:
    """f(x, beta) → the pair (s₀′, s₀″) of the centered softplus, each like x (any shape), for a number β > 0.
    Solution: the first lines of ``lcnn_utils/nn/softplus.py``."""
    tensors = lambda got: isinstance(got, tuple | list) and all(isinstance(one, Tensor) for one in got)
    stacked = lambda x, b: torch.stack(list(got)) if tensors(got := f(x, b)) else got
    pair, s = lambda *both: torch.stack(both), torch.sigmoid
    mistakes = {
        "s₀″ lacks the β of the chain rule": lambda x, b: pair(s(b * x), s(b * x) * s(-b * x)),
        "swapped: s₀′ comes first": lambda x, b: pair(b * s(b * x) * s(-b * x), s(b * x)),
        "the slope is σ(βx), not σ(x)": lambda x, b: pair(s(x), b * s(x) * s(-x)),
        "the slope is σ(βx), not σ(x), so s₀″ has a factor β": lambda x, b: pair(s(x), s(x) * s(-x)),
        "s₀″ lacks the factor 1 − σ(βx)": lambda x, b: pair(s(b * x), b * s(b * x)),
        "β and 1/β cancel in s₀′: it is σ(βx)": lambda x, b: pair(b * s(b * x), b * b * s(b * x) * s(-b * x)),
    }
    first = grad(lambda x, b: activations.centered_softplus(x, b).sum())
    truth = lambda x, beta: pair(first(x, beta), grad(lambda x: first(x, beta).sum())(x))
    inputs = [(3 * randn(1, *s) / w, b) for b in (3.0, 0.5, 0.01, 1e3) for s in ((7,), (2, 3)) for w in (1, b)]
    wild = "e^{βx} overflows: use torch.sigmoid(βx)"
    return verdict(derivatives, stacked, inputs, truth, mistakes, wild, "s₀′ and s₀″, stacked: ")


def beta_for_curvature(f: Callable) -> bool | None:
    """f(c) → the number β at which the largest second derivative of the centered softplus is c > 0.
    That is measured, by differentiating at your β. Solution: the head of ``lcnn_utils.nn.softplus``, s₀″ ≤ β/4."""

    def peak(c: float) -> Any:
        if (got := f(c)) is None or got is ...:
            return got
        beta = float(torch.as_tensor(got).detach())
        x = torch.linspace(-5, 5, 1001).double() / (beta or math.nan)
        return grad(lambda x: torch.sigmoid(beta * x).sum())(x).max()

    truth = lambda c: torch.tensor(c, dtype=torch.float64)
    mistakes = {
        "at 0, s₀″ = β·½·½: a quarter of β is reached, so c itself is too small": lambda c: truth(c / 4),
        "inverted: multiply by 4 where you divide": lambda c: truth(c / 16),
        "at 0, s₀″ = βσ(1 − σ) is β/4, not β/2": lambda c: truth(c / 2),
    }
    inputs, wild = [(c,) for c in (2.5, 0.25, 1.0, 30.0, 0.01)], "β is a finite number above 0"
    return verdict(beta_for_curvature, peak, inputs, truth, mistakes, wild, "largest s₀″ at your β: ")
