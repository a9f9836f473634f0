"""The checks of notebook 05; see :mod:`lcnn_utils.exercises`."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from . import _check, _randn
from .scaling import makespan as makespan
from .scaling import run_key as run_key

__all__ = ["gradient_penalty", "layer_penalty", "lowest_gamma"]


def layer_penalty(f: Callable) -> bool | None:
    """f(log_beta, log_gamma, lambda_beta, lambda_gamma) → λ_β Σ β_l + λ_γ Σ |log γ_l|, a number. log_beta (L,) and
    log_gamma (M,) are what is trained: β = e^{log β}. Solution: ``lcnn_utils.objectives.layer_penalty``.
    """
    truth = lambda log_beta, log_gamma, lambda_beta, lambda_gamma: (
        lambda_beta * log_beta.exp().sum() + lambda_gamma * log_gamma.abs().sum()
    )
    mistakes = {
        "γ is pulled to 1, from both sides: take |log γ|": lambda b, g, lb, lg: lb * b.exp().sum() + lg * g.sum(),
        "the price is on |log γ|, not on γ": lambda b, g, lb, lg: lb * b.exp().sum() + lg * g.exp().sum(),
        "the price is on β itself: exponentiate log β": lambda b, g, lb, lg: lb * b.sum() + lg * g.abs().sum(),
        "β is pulled to 0, not to 1": lambda b, g, lb, lg: lb * b.abs().sum() + lg * g.abs().sum(),
        "sums, not means: each layer has its price": lambda b, g, lb, lg: lb * b.exp().mean() + lg * g.abs().mean(),
        "λ_β and λ_γ are two prices": lambda b, g, lb, lg: lb * (b.exp().sum() + g.abs().sum()),
        "λ_β belongs to β, λ_γ to γ": lambda b, g, lb, lg: lg * b.exp().sum() + lb * g.abs().sum(),
        "no squares": lambda b, g, lb, lg: lb * b.exp().square().sum() + lg * g.square().sum(),
    }
    sizes = [(5, 7, 1e-3, 1e-2), (1, 1, 0.3, 0.0), (9, 2, 0.0, 0.7), (3, 12, 0.5, 0.2)]
    inputs = [(_randn(i, n), 2 * _randn(i + 9, m), lb, lg) for i, (n, m, lb, lg) in enumerate(sizes)]
    return _check(layer_penalty, f, inputs, truth, mistakes)


def gradient_penalty(f: Callable) -> bool | None:
    """f(losses, x) → mean ‖∂ℓₙ/∂xₙ‖², a number that can be differentiated again: losses (N,) were computed from x
    (N, …), each from its own sample. Solution: ``lcnn_utils.objectives.squared_gradient``.
    """

    def gradient(losses: Tensor, x: Tensor) -> Tensor:
        return torch.autograd.grad(losses.sum(), x, create_graph=True, retain_graph=True)[0]

    def task(f: Callable) -> Callable:
        def value_and_derivative(weight: Tensor, samples: Tensor) -> Tensor:
            weight, x = weight.clone().requires_grad_(), samples.clone().requires_grad_()
            losses = torch.logaddexp((x.flatten(1) @ weight).sin().sum(1), torch.zeros(()).to(x))
            value = f(losses, x)
            if not isinstance(value, Tensor):
                return value
            if not value.requires_grad:
                raise RuntimeError("it can't be differentiated again: take the gradient with create_graph=True")
            (derivative,) = torch.autograd.grad(value, weight)
            return torch.cat([value.detach().view(1), derivative.flatten()])

        return value_and_derivative

    def of(change: Callable[[Tensor], Tensor]) -> Callable:
        return task(lambda losses, x: change(gradient(losses, x)))

    mistakes = {
        "mean over the samples, of the sum over a sample's entries": of(lambda g: g.square().mean()),
        "the squared norm": of(lambda g: g.flatten(1).norm(dim=1).mean()),
        "the mean over the samples: divide by N": of(lambda g: g.square().sum()),
        "each loss by itself: the mean loss has gradients N times too small": of(
            lambda g: (g / len(g)).flatten(1).square().sum(1).mean()
        ),
        "sum the losses for the gradient, and don't square the mean": of(
            lambda g: g.flatten(1).norm(dim=1).mean() ** 2
        ),
    }
    truth = of(lambda g: g.flatten(1).square().sum(1).mean())
    shapes = [(4, (3,)), (2, (1, 2, 2)), (7, (2, 3)), (1, (5,))]
    inputs = [(_randn(i, math.prod(s), 3), _randn(i + 20, n, *s)) for i, (n, s) in enumerate(shapes)]
    what = "the penalty, and its derivatives by the weights: "
    return _check(gradient_penalty, task(f), inputs, truth, mistakes, what=what)


def lowest_gamma(f: Callable) -> bool | None:
    """f(gamma, rates, lam, momentum) → the lowest γ that the penalty λ|log γ| alone can pull ``gamma`` down to, 1
    at the lowest, by gradient descent on log γ with the rates (T,), long enough for momentum to count in full.
    Solution: ``lcnn_utils.studies.methods.lowest_gamma``.
    """
    reach = lambda rates, lam, momentum: lam * rates.sum() / (1 - momentum)
    truth = lambda gamma, rates, lam, momentum: (
        (torch.tensor(gamma).double().log() - reach(rates, lam, momentum)).clamp(min=0).exp()
    )
    log = lambda gamma: torch.tensor(gamma).double().log()
    mistakes = {
        "|log γ| stops pulling at γ = 1": lambda gamma, r, lam, m: (log(gamma) - reach(r, lam, m)).exp(),
        "momentum multiplies every step by 1/(1 − μ)": lambda gamma, r, lam, m: (
            (log(gamma) - lam * r.sum()).clamp(min=0).exp()
        ),
        "log γ moves, not γ": lambda gamma, r, lam, m: (torch.tensor(gamma).double() - reach(r, lam, m)).clamp(min=1),
        "this is log γ: exponentiate": lambda gamma, r, lam, m: (log(gamma) - reach(r, lam, m)).clamp(min=0),
        "the sum of the rates, not their mean": lambda gamma, r, lam, m: (
            (log(gamma) - reach(r.mean()[None], lam, m)).clamp(min=0).exp()
        ),
        "the pull's strength is λ, whatever γ is": lambda gamma, r, lam, m: (
            (log(gamma) * (1 - reach(r, lam, m))).clamp(min=0).exp()
        ),
    }
    settings = [(10.0, 50, 1e-2, 0.9), (10.0, 20, 1.0, 0.9), (4.0, 30, 0.05, 0.5), (2.5, 7, 0.1, 0.0)]
    inputs = [(g, 0.1 * _randn(i, n).abs(), lam, m) for i, (g, n, lam, m) in enumerate(settings)]
    return _check(lowest_gamma, f, inputs, truth, mistakes)
