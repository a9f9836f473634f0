"""The exercises of notebook 05; :mod:`lcnn_utils.exercises.engine` checks them."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .engine import choice_of, exercise, randn


def with_derivatives(value: Any, inputs: Sequence[Tensor]) -> Any:
    """A number and its derivatives by the inputs in one tensor. RuntimeError: it has lost its graph."""
    if isinstance(value, float) or (isinstance(value, Tensor) and not value.requires_grad):
        raise RuntimeError("training can't differentiate what it returns")
    if not isinstance(value, Tensor) or value.numel() != 1:
        return value
    derivatives = torch.autograd.grad(value, inputs, materialize_grads=True)
    return torch.cat([value.view(1), *(derivative.flatten() for derivative in derivatives)])


def penalty_by_logs(function: Callable, log_beta: Tensor, log_gamma: Tensor, *lambdas: float) -> Any:
    logs = [log_beta.requires_grad_(), log_gamma.requires_grad_()]
    return with_derivatives(function(*logs, *lambdas), logs)


@exercise(
    inputs=[
        (randn(0, 2), 2 * randn(9, 3), 1e-3, 1e-2),
        (randn(1, 1), 2 * randn(10, 1), 0.3, 0.0),
        (randn(2, 9), 2 * randn(11, 2), 0.0, 0.7),
    ],
    mistakes={
        "a γ below 1 is to be pulled up: what is log_gamma there?": lambda b, g, lb, lg: (
            lb * b.exp().sum() + lg * g.sum()
        ),
        "which is penalised, γ or its logarithm? log_gamma is one of the two": lambda b, g, lb, lg: (
            lb * b.exp().sum() + lg * g.exp().sum()
        ),
        "which is penalised, β or its logarithm? log_beta is one of the two": lambda b, g, lb, lg: (
            lb * b.sum() + lg * g.abs().sum()
        ),
        "β is to be pulled to 0, not to 1": lambda b, g, lb, lg: lb * b.abs().sum() + lg * g.abs().sum(),
        "every layer counts in full: did you take a mean?": lambda b, g, lb, lg: (
            lb * b.exp().mean() + lg * g.abs().mean()
        ),
        "lambda_beta and lambda_gamma are two weights": lambda b, g, lb, lg: lb * (b.exp().sum() + g.abs().sum()),
        "which weight belongs to which sum?": lambda b, g, lb, lg: lg * b.exp().sum() + lb * g.abs().sum(),
        "there is no square in it": lambda b, g, lb, lg: lb * b.exp().square().sum() + lg * g.square().sum(),
        "stay with tensors: training differentiates the penalty by log_beta and log_gamma": lambda b, g, lb, lg: (
            lb * b.exp().sum() + lg * g.abs().sum()
        ).item(),
    },
    call=penalty_by_logs,
    compared="the penalty, then its derivatives by log_beta and log_gamma: ",
)
def layer_penalty(log_beta: Tensor, log_gamma: Tensor, lambda_beta: float, lambda_gamma: float) -> Tensor:
    """f(log_beta, log_gamma, lambda_beta, lambda_gamma) → λ_β Σ β_l + λ_γ Σ |log γ_l|, a number. log_beta (L,) and
    log_gamma (M,) are what is trained: β = e^{log β}. Solution: ``lcnn_utils.training.objectives.layer_penalty``."""
    return lambda_beta * log_beta.exp().sum() + lambda_gamma * log_gamma.abs().sum()


def penalty_by_x(function: Callable, losses: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    x.requires_grad_()
    return with_derivatives(function(losses(x), x), [x])


network = lambda matrix: lambda x: (x.flatten(1) @ matrix).sin().logsumexp(1)  # x (N, …) → losses (N,)
slopes = lambda losses, x, again=True: torch.autograd.grad(losses.sum(), x, create_graph=again)[0].flatten(1)


@exercise(
    inputs=[(network(randn(0, 2, 3)), randn(1, 3, 2)), (network(randn(2, 4, 3)), randn(3, 2, 1, 2, 2))],
    mistakes={
        "training differentiates the penalty once more: the gradient needs a graph of its own": lambda losses, x: (
            slopes(losses, x, False).square().sum(1).mean()
        ),
        "the penalty is one number, the mean over the samples": lambda losses, x: slopes(losses, x).square().sum(1),
        "a norm sums over a sample's entries; the mean is over the samples only": lambda losses, x: (
            slopes(losses, x).square().mean()
        ),
        "the squared norm: did you take its root?": lambda losses, x: slopes(losses, x).norm(dim=1).mean(),
        "should a batch twice as large be penalised twice as much?": lambda losses, x: slopes(losses, x).square().sum(),
        "the mean loss has slopes N times too small, in squares N²": lambda losses, x: (
            slopes(losses / len(x), x).norm() ** 2 / len(x)
        ),
        "the mean loss has slopes N times too small: of what do you take the gradient?": lambda losses, x: (
            slopes(losses / len(x), x).square().sum()
        ),
        "the square of the mean is not the mean of the squares": lambda losses, x: (
            slopes(losses, x).norm(dim=1).mean() ** 2
        ),
    },
    call=penalty_by_x,
    compared="the penalty, then its derivatives by x: ",
)
def gradient_penalty(losses: Tensor, x: Tensor) -> Tensor:
    """f(losses, x) → mean ‖∂ℓₙ/∂xₙ‖², a number that can be differentiated again: losses (N,) were computed from x (N,
    …), each from its own sample. Solution: ``lcnn_utils.training.objectives.squared_gradient``."""
    return slopes(losses, x).square().sum(1).mean()


def small_net(seed: int, *sizes: int) -> nn.Sequential:
    """Random linear maps with a softplus between them, in float64."""
    layers = [nn.Linear(*pair, bias=False, dtype=torch.float64) for pair in itertools.pairwise(sizes)]
    for number, layer in enumerate(layers):
        layer.weight.data = randn(seed + number, *layer.weight.shape)
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.Softplus(5))][:-1])


def objective_by_weights(
    function: Callable, model: nn.Module, x: Tensor, y: Tensor, log_beta: Tensor, log_gamma: Tensor, lambdas: Tensor
) -> Any:
    wanted = [log_beta.requires_grad_(), log_gamma.requires_grad_(), *model.parameters()]
    return with_derivatives(function(model, x, y, log_beta, log_gamma, lambdas), wanted)


def of_terms(combine: Callable[..., Any], scale: Callable = lambda logits: logits, reduction: str = "none") -> Callable:
    """An objective that combines losses, Σ β, Σ |log γ|, gradient penalty, λ_β, λ_γ and λ."""

    def answer(model: nn.Module, x: Tensor, y: Tensor, b: Tensor, g: Tensor, lambdas: Tensor) -> Any:
        x = x.detach().requires_grad_()
        losses = F.cross_entropy(scale(model(x)), y, reduction=reduction)
        penalty = slopes(losses, x).square().sum(1).mean()
        return combine(losses, b.exp().sum(), g.abs().sum(), penalty, *lambdas)

    return answer


mix = lambda c, b, g, p, lb, lg, l: c.mean() + lb * b + lg * g + l * p


@exercise(
    inputs=[
        (small_net(0, 2, 2), randn(1, 3, 2), torch.tensor([0, 1, 1]), randn(2, 1), randn(3, 1), randn(4, 3).abs()),
        (small_net(5, 4, 6, 3), randn(7, 5, 4), torch.arange(5) % 3, randn(8, 2), randn(9, 4), randn(10, 3).abs()),
    ],
    mistakes={
        "one loss a sample goes into gradient_penalty: is that what your cross_entropy returns?": of_terms(
            mix, reduction="mean"
        ),
        "of the losses the mean is asked for": of_terms(lambda c, *rest: mix(c, *rest) - c.mean() + c.sum()),
        "one number for the whole batch": of_terms(lambda c, *rest: mix(c, *rest) - c.mean() + c),
        "where is the gradient penalty?": of_terms(lambda c, b, g, p, lb, lg, l: mix(c, b, g, p, lb, lg, 0)),
        "where is the layer penalty?": of_terms(lambda c, b, g, p, lb, lg, l: mix(c, b, g, p, 0, 0, l)),
        "where is cross-entropy itself?": of_terms(lambda c, *rest: mix(c, *rest) - c.mean()),
        "the gradient penalty has a weight, too": of_terms(lambda c, b, g, p, lb, lg, l: mix(c, b, g, p, lb, lg, 1)),
        "in which order are the three weights in lambdas?": of_terms(
            lambda c, b, g, p, lb, lg, l: mix(c, b, g, p, lg, lb, l)
        ),
        "cross_entropy wants logits, not probabilities": of_terms(mix, lambda logits: logits.softmax(1)),
        "stay with tensors: training differentiates the objective": of_terms(lambda *parts: mix(*parts).item()),
    },
    call=objective_by_weights,
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
        "what does momentum make of every step, in the long run?": lambda gamma, r, lam, m: lower(gamma, lam * r.sum()),
        "the steps move log γ, not gamma": lambda gamma, r, lam, m: max(1.0, gamma - lam * r.sum() / (1 - m)),
        "this is log γ, but γ is asked for": lambda gamma, r, lam, m: math.log(lower(gamma, lam * r.sum() / (1 - m))),
        "each of the T steps moves log γ: do they add up?": lambda gamma, r, lam, m: lower(
            gamma, lam * r.mean() / (1 - m)
        ),
        "it pulls equally hard wherever γ is: what is the slope of |log γ| against log γ?": lambda gamma, r, lam, m: (
            lower(gamma, math.log(gamma) * lam * r.sum() / (1 - m))
        ),
        "how hard it pulls depends on lam": lambda gamma, r, lam, m: lower(gamma, r.sum() / (1 - m)),
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
