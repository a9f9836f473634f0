"""What each method minimises.

Every objective is a function of (model in training mode, x (N, …), y (N,)) and its own few hyper-parameters, by name,
that returns the loss of the batch and the terms to log. ``fit`` also tells it ``progress``, how far training has come
(0 to 1), and the ``generator`` of random starts. ℓ is the cross-entropy of one sample's true label, gₙ the input
gradient of the batch's Σℓ at sample n. Penalties on gradients are exact, by a second backward pass, or (``derivative``)
a "difference" along a direction, which also runs compiled. Only a step's first pass moves running statistics, and all
draw the same masks of dropout.

References: S. Srinivas et al., NeurIPS 2022, arXiv:2206.07144; H. Drucker, Y. LeCun, IEEE TNN 3 (1992) and C. Finlay,
A. Oberman, arXiv:1905.11468 (GradReg, exact and by differences); S.-M. Moosavi-Dezfooli et al., CVPR 2019,
arXiv:1811.09716 (CURE); A.-K. Dombrowski et al., Pattern Recognition 121 (2022) (softplus and weight decay); A. Madry
et al., ICLR 2018 (adversarial training).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm

from ..attacks import perturb
from ..curvature import evaluating
from ..data import check_images
from ..nn import CenteredSoftplus, LipschitzBatchNorm2d, SpectralNorm, beta_of

STEP = 1e-2  # of differences: the root mean square over the samples of how far they move; C. Finlay and A. Oberman's h
Terms = tuple[Tensor, dict[str, Tensor]]
Network = Callable[[Tensor], Tensor]


def standard(model: nn.Module, x: Tensor, y: Tensor, **_: Any) -> Terms:
    """Cross-entropy: mean ℓ. (``softplus_wd`` and ``relu`` too: only their nets differ.)"""
    logits = model(x)
    loss = F.cross_entropy(logits, y)
    return loss, {"loss": loss.detach(), "accuracy": (logits.detach().argmax(1) == y).float().mean()}


def lcnn(model: nn.Module, x: Tensor, y: Tensor, *, lambda_beta: float, lambda_gamma: float = 0.0, **_: Any) -> Terms:
    """mean ℓ + λ_β Σ_l β_l + λ_γ Σ_l |log γ_l|, over activations and γ-BatchNorms."""
    loss, terms = standard(model, x, y)
    penalty, sums = layer_penalty(model, lambda_beta, lambda_gamma)
    return loss + penalty, terms | sums


def gradreg(
    model: nn.Module, x: Tensor, y: Tensor, *, lambda_grad: float, derivative: str = "exact", **_: Any
) -> Terms:
    """mean ℓ + λ_grad · mean ‖gₙ‖² (GradReg), with BatchNorm in training mode: in eval mode shrinking a weight would
    flatten the function of the running statistics, which lag behind, but not the one being trained."""
    x, again = x.detach().requires_grad_(), repeated(model, x)
    loss, terms = standard(model, x, y)
    loss, squared = squared_gradient(model, x, y, loss, derivative, again=again)
    return loss + lambda_grad * squared, terms | {"squared_gradient": squared.detach()}


def lcnn_gradreg(
    model: nn.Module, x: Tensor, y: Tensor, *, lambda_beta: float, lambda_gamma: float = 0.0, **gradient: Any
) -> Terms:
    """:func:`gradreg` with the penalties of :func:`lcnn`. In a net without Lipschitz layers this is ``minimal``."""
    loss, terms = gradreg(model, x, y, **gradient)
    penalty, sums = layer_penalty(model, lambda_beta, lambda_gamma)
    return loss + penalty, terms | sums


def cure(
    model: nn.Module, x: Tensor, y: Tensor, *, lambda_cure: float, h: float = 1.0, derivative: str = "exact",
    progress: float = 1.0, **_: Any,
) -> Terms:  # fmt: skip
    """mean ℓ + λ_cure · mean ‖∇ℓ(x + hz) − ∇ℓ(x)‖², z = sign(g)/‖sign(g)‖ (CURE).

    The step grows linearly from a tenth of h to all of it in the first half of training, as its authors raise it. In
    code-22 it is fixed, and the penalty's passes move the running statistics too.
    """
    x, again = x.detach().requires_grad_(), repeated(model, x)
    loss, terms = standard(model, x, y)
    h *= 0.1 + 0.9 * min(progress / 0.5, 1.0)
    loss, change = gradient_change(model, x, y, loss, h, derivative, again=again)
    return loss + lambda_cure * change, terms | {"gradient_change": change.detach()}


def adversarial(
    model: nn.Module, x: Tensor, y: Tensor, *, eps: float, attack_steps: int = 3, generator: Generator | None = None,
    **_: Any,
) -> Terms:  # fmt: skip
    """mean ℓ(x + δ), with δ from ``attack_steps`` steps of L2 PGD on ℓ within ε, each of length 2.5 ε/steps.

    The attack knows the true labels, and the net is in eval mode meanwhile. In code-22 it takes steps of 0.01 away from
    the *predicted* labels, in training mode, so that it moves BatchNorm's statistics: mostly noise.
    ValueError: images (N, C, H, W) that are not in [0, 1]; points (N, d) may lie anywhere.
    """
    box = None if x.dim() == 2 else (0.0, 1.0)
    if box:
        check_images(x)
    length = 2.5 * eps / attack_steps
    with evaluating(model):
        moved = perturb(model, x, y, eps, steps=attack_steps, step_size=length, box=box, generator=generator)
    return standard(model, moved, y)


OBJECTIVES: dict[str, Callable[..., Terms]] = {
    "standard": standard,
    "lcnn": lcnn,
    "gradreg": gradreg,
    "lcnn_gradreg": lcnn_gradreg,
    "cure": cure,
    "softplus_wd": standard,
    "adversarial": adversarial,
    "minimal": lcnn_gradreg,
    "relu": standard,
}


def layer_penalty(model: nn.Module, lambda_beta: float, lambda_gamma: float) -> Terms:
    """λ_β Σ_l β_l + λ_γ Σ_l |log γ_l|, and the two sums."""
    log_betas: list[Tensor] = [m.log_beta for m in model.modules() if isinstance(m, CenteredSoftplus)]
    log_gammas: list[Tensor] = [m.log_gamma for m in model.modules() if isinstance(m, LipschitzBatchNorm2d)]
    zero = next(model.parameters()).new_zeros(())
    sum_beta = beta_of(torch.stack(log_betas)).sum() if log_betas else zero
    sum_gamma = torch.stack(log_gammas).abs().sum() if log_gammas else zero
    sums = {"sum_beta": sum_beta.detach(), "sum_abs_log_gamma": sum_gamma.detach()}
    return lambda_beta * sum_beta + lambda_gamma * sum_gamma, sums


def squared_gradient(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: Tensor,
    derivative: str = "exact",
    step: float = STEP,
    again: Network | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss again, and mean ‖gₙ‖² = N ‖∇loss‖², with ``loss`` = mean ℓ as computed from x: differentiable scalars.

    As a difference: ‖∇loss‖ is the slope along d = ∇loss/‖∇loss‖ in the space of the whole batch. A change of the
    weights that turns ∇loss leaves that slope, the largest of all, as it is to first order, so d needs no derivative.
    ``again`` is the model with the masks of dropout that ``loss`` was computed with.
    """
    loss, gradient = _with_gradient(model, x, loss, derivative)
    if derivative == "exact":
        return loss, len(x) * gradient.square().sum()
    with statistics_at_rest(model):
        moved = F.cross_entropy((again or model)(x.detach() + step * _direction(gradient)), y)
    return loss, ((moved - loss) / step).square()


def gradient_change(
    model: nn.Module, x: Tensor, y: Tensor, loss: Tensor, h: float, derivative: str = "exact", step: float = STEP,
    again: Network | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss again, and mean ‖∇ℓ(x + hz) − ∇ℓ(x)‖², with each sample's own z; as a difference: of the slopes at both
    places along the direction in which the whole batch's gradient changed. ``loss`` and ``again`` as in
    :func:`squared_gradient`."""
    exact, cross_entropy = derivative == "exact", lambda images: F.cross_entropy((again or model)(images), y)
    loss, gradient = _with_gradient(model, x, loss, derivative)
    z = F.normalize(gradient.detach().sign().flatten(1), dim=1, eps=1e-30).view_as(x)
    there = (x + h * z).detach().requires_grad_()
    with statistics_at_rest(model):
        change = torch.autograd.grad(cross_entropy(there), there, create_graph=exact)[0] - gradient
        if exact:
            return loss, len(x) * change.square().sum()
        shift = step * _direction(change)
        slope, slope_there = (
            (cross_entropy(place + shift) - cross_entropy(place - shift)) / (2 * step)  # off by O(step²)
            for place in (x.detach(), there.detach())
        )
    return loss, (slope_there - slope).square()


def _with_gradient(model: nn.Module, x: Tensor, loss: Tensor, derivative: str) -> tuple[Tensor, Tensor]:
    """A ``loss`` computed from x, and its gradient in x: "exact" with a graph of its own. For a "difference" without;
    as the same pass gives the gradients in the weights, a linear function with these then replaces the loss's graph."""
    if derivative == "exact":
        return loss, torch.autograd.grad(loss, x, create_graph=True)[0]
    weights = [p for p in model.parameters() if p.requires_grad]
    gradient, *slopes = torch.autograd.grad(loss, [x, *weights], materialize_grads=True)
    flat, slope = (torch.cat([t.flatten() for t in tensors]) for tensors in (weights, slopes))
    return loss.detach() + ((flat - flat.detach()) * slope).sum(), gradient


def _direction(gradient: Tensor) -> Tensor:
    """The direction of a batch's gradient (N, …), of length √N: samples of length 1 in the root mean square."""
    return math.sqrt(len(gradient)) * gradient / torch.linalg.vector_norm(gradient).clamp(min=1e-30)


def repeated(model: nn.Module, x: Tensor) -> Network:
    """``model`` with the random numbers (masks of dropout) that it would draw for x now, in every call."""
    gpus = [x.device] if x.is_cuda else []
    generators = [torch.default_generator, *[torch.cuda.default_generators[gpu.index] for gpu in gpus]]
    states = [generator.get_state() for generator in generators]

    def again(x: Tensor) -> Tensor:
        with torch.random.fork_rng(gpus):
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
            return model(x)

    return again


@contextmanager
def statistics_at_rest(model: nn.Module) -> Iterator[None]:
    """Let passes in training mode leave norms' running statistics and spectral norms' directions alone."""
    held: list[tuple[nn.Module, str, Any]] = []
    for m in model.modules():
        if isinstance(m, SpectralNorm | _SpectralNorm):
            held.append((m, "training", False))
        if isinstance(m, _NormBase) and m.training:
            held += [(m, "momentum", 0.0), (m, "track_running_stats", False)]
    before = [getattr(m, name) for m, name, _ in held]
    for m, name, value in held:
        setattr(m, name, value)
    try:
        yield
    finally:
        for (m, name, _), value in zip(held, before, strict=True):
            setattr(m, name, value)
