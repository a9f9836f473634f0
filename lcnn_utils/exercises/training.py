"""The exercises of notebook 05; :mod:`lcnn_utils.exercises.engine` checks them."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .engine import choice_of, exercise, network, randn


def with_derivatives(value: Any, inputs: list[Tensor]) -> Any:
    """A number and its derivatives by the inputs in one tensor. RuntimeError: it has lost its graph."""
    if isinstance(value, float) or (isinstance(value, Tensor) and not value.requires_grad):
        raise RuntimeError("training can't differentiate what it returns: stay with tensors")
    if not isinstance(value, Tensor) or value.numel() != 1:
        return value
    derivatives = torch.autograd.grad(value, inputs, materialize_grads=True)
    return torch.cat([value.view(1), *(derivative.flatten() for derivative in derivatives)])


trained = lambda *sizes: randn(*sizes).requires_grad_()


@exercise(
    inputs=[(trained(0, 2), trained(9, 3), 1e-3, 1e-2), (trained(2, 9), trained(11, 2), 0.0, 0.7)],
    mistakes={
        "a γ below 1 is to be pulled up, too": lambda b, g, lb, lg: lb * b.exp().sum() + lg * g.sum(),
        "which is penalised, γ or its logarithm?": lambda b, g, lb, lg: lb * b.exp().sum() + lg * g.exp().sum(),
        "which is penalised, β or its logarithm?": lambda b, g, lb, lg: lb * b.sum() + lg * g.abs().sum(),
        "every layer counts in full: is it a mean?": lambda b, g, lb, lg: lb * b.exp().mean() + lg * g.abs().mean(),
        "which weight belongs to which sum?": lambda b, g, lb, lg: lg * b.exp().sum() + lb * g.abs().sum(),
    },
    call=lambda function, b, g, *lambdas: with_derivatives(function(b, g, *lambdas), [b, g]),
    compared="the penalty, then its derivatives by log_beta and log_gamma: ",
)
def layer_penalty(log_beta: Tensor, log_gamma: Tensor, lambda_beta: float, lambda_gamma: float) -> Tensor:
    """f(log_beta, log_gamma, lambda_beta, lambda_gamma) → λ_β Σ β_l + λ_γ Σ |log γ_l|, a number. log_beta (L,) and
    log_gamma (M,) are what is trained: β = e^{log β}. Solution: ``lcnn_utils.training.objectives.layer_penalty``."""
    return lambda_beta * log_beta.exp().sum() + lambda_gamma * log_gamma.abs().sum()


losses_of = lambda matrix: lambda x: (x.flatten(1) @ matrix).sin().logsumexp(1)  # x (N, …) → losses (N,)
slopes = lambda losses, x, again=True: torch.autograd.grad(losses.sum(), x, create_graph=again)[0].flatten(1)


@exercise(
    inputs=[(losses_of(randn(0, 2, 3)), trained(1, 3, 2)), (losses_of(randn(2, 4, 3)), trained(3, 2, 1, 2, 2))],
    mistakes={
        "training differentiates it: where is the graph?": lambda c, x: slopes(c, x, False).square().sum(1).mean(),
        "the penalty is one number, the mean over the samples": lambda c, x: slopes(c, x).square().sum(1),
        "a norm sums over a sample's entries; the mean is over samples": lambda c, x: slopes(c, x).square().mean(),
        "the squared norm: did you take its root?": lambda c, x: slopes(c, x).norm(dim=1).mean(),
        "should a batch twice as large be penalised twice as much?": lambda c, x: slopes(c, x).square().sum(),
        "a mean loss has slopes N times too small": lambda c, x: slopes(c / len(x), x).square().sum(1).mean(),
    },
    call=lambda function, losses, x: with_derivatives(function(losses(x), x), [x]),
    compared="the penalty, then its derivatives by x: ",
)
def gradient_penalty(losses: Tensor, x: Tensor) -> Tensor:
    """f(losses, x) → mean ‖∂ℓₙ/∂xₙ‖², a number that can be differentiated again: losses (N,) were computed from x (N,
    …), each from its own sample. Solution: ``lcnn_utils.training.objectives.squared_gradient``."""
    return slopes(losses, x).square().sum(1).mean()


each_loss = lambda logits, y: F.cross_entropy(logits, y, reduction="none")


def of_terms(combine: Callable, loss: Callable = each_loss) -> Callable:
    """An objective that combines losses, Σ β, Σ |log γ|, gradient penalty, λ_β, λ_γ and λ."""

    def answer(model: nn.Module, x: Tensor, y: Tensor, b: Tensor, g: Tensor, lambdas: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        losses = loss(model(x), y)
        return combine(losses, b.exp().sum(), g.abs().sum(), slopes(losses, x).square().sum(1).mean(), *lambdas)

    return answer


mix = lambda c, b, g, p, lb, lg, l: c.mean() + lb * b + lg * g + l * p


@exercise(
    inputs=[
        (network(0, 2, 2), randn(1, 3, 2), torch.tensor([0, 1, 1]), trained(2, 1), trained(3, 1), randn(4, 3).abs()),
        (network(5, 4, 6, 3), randn(7, 5, 4), torch.arange(5) % 3, trained(8, 2), trained(9, 4), randn(10, 3).abs()),
    ],
    mistakes={
        "does your cross_entropy return a loss for each sample?": of_terms(mix, F.cross_entropy),
        "of the losses the mean is asked for": of_terms(lambda c, *rest: mix(len(c) * c, *rest)),
        "where is the gradient penalty?": of_terms(lambda c, b, g, p, *weights: mix(c, b, g, 0, *weights)),
        "where is the layer penalty?": of_terms(lambda c, b, g, p, *weights: mix(c, 0, 0, p, *weights)),
        "where is cross-entropy itself?": of_terms(lambda c, *rest: mix(0 * c, *rest)),
        "the gradient penalty has a weight, too": of_terms(lambda c, b, g, p, lb, lg, l: mix(c, b, g, p, lb, lg, 1)),
        "in which order are the weights?": of_terms(lambda c, b, g, p, lb, lg, l: mix(c, b, g, p, lg, lb, l)),
        "logits, not probabilities": of_terms(mix, lambda logits, y: each_loss(logits.softmax(1), y)),
    },
    call=lambda function, model, *rest: with_derivatives(function(model, *rest), [*rest[2:4], *model.parameters()]),
    compared="the objective, then its derivatives by log_beta, log_gamma and the weights: ",
)
def objective(model: nn.Module, x: Tensor, y: Tensor, log_beta: Tensor, log_gamma: Tensor, lambdas: Tensor) -> Tensor:
    """f(model, x, y, log_beta, log_gamma, lambdas) → mean ℓₙ + λ_β Σ β_l + λ_γ Σ |log γ_l| + λ mean ‖∂ℓₙ/∂xₙ‖², a
    number: ℓₙ is the cross-entropy of the logits model(x) (N, K) and the labels y (N,); lambdas (3,) are λ_β, λ_γ and
    λ. Solution: ``lcnn_utils.training.objectives.lcnn_gradreg``."""
    x = x.detach().requires_grad_()
    losses = F.cross_entropy(model(x), y, reduction="none")
    penalty = layer_penalty.reference(log_beta, log_gamma, *lambdas[:2])
    return losses.mean() + penalty + lambdas[2] * gradient_penalty.reference(losses, x)


lower = lambda gamma, fall: max(1.0, gamma * math.exp(-fall))  # γ after log γ has fallen


@exercise(
    inputs=[
        (10.0, 0.5 * randn(0, 5).abs(), 1e-2, 0.9),
        (10.0, 0.1 * randn(1, 20).abs(), 1.0, 0.9),
        (4.0, 0.1 * randn(2, 30).abs(), 0.05, 0.5),
    ],
    mistakes={
        "and once γ has come down to 1?": lambda gamma, r, lam, m: gamma * math.exp(-lam * r.sum() / (1 - m)),
        "what does momentum make of every step?": lambda gamma, r, lam, m: lower(gamma, lam * r.sum()),
        "the steps move log γ, not gamma": lambda gamma, r, lam, m: max(1.0, gamma - lam * r.sum() / (1 - m)),
        "this is log γ, but γ is asked for": lambda gamma, r, lam, m: math.log(lower(gamma, lam * r.sum() / (1 - m))),
        "each of the T steps moves log γ": lambda gamma, r, lam, m: lower(gamma, lam * r.mean() / (1 - m)),
        "which way does the penalty move γ?": lambda gamma, r, lam, m: lower(gamma, -lam * r.sum() / (1 - m)),
    },
)
def lowest_gamma(gamma: float, rates: Tensor, lam: float, momentum: float) -> float:
    """f(gamma, rates, lam, momentum) → the lowest γ that the penalty λ|log γ| alone can pull ``gamma`` down to, 1 at
    the lowest, by gradient descent on log γ with the rates (T,), long enough for momentum to count in full.
    Solution: ``check.lowest_gamma??``."""
    fall = lam * rates.sum().item() / (1 - momentum)  # of log γ
    return max(1.0, gamma * math.exp(-fall))


use = choice_of(layer_penalty, gradient_penalty, objective, lowest_gamma)
