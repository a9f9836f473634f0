"""The step of a given length that changes a network's gradient most: the worst case of gradient robustness."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..attacks.balls import Box, _direction, _length, _moved, _project, _scaled
from ..attacks.pgd import _check, _check_eps
from ..curvature import geometry, measuring, scalar_of
from ..curvature.premises import _prepare


def worst_step(
    model: nn.Module,
    x: Tensor,
    y: Tensor | None,
    eps: float,
    *,
    scalar: str = "loss",
    steps: int = 10,
    box: Box = (0.0, 1.0),
    starts: Iterable[Tensor] | None = None,
    batch_size: int = 256,
) -> tuple[Tensor, Tensor]:
    """Projected ascent on ‖∇f(x + η) − ∇f(x)‖ over ‖η‖₂ ≤ ε → (η like x, that change (N,)), the best seen.

    It begins at the best of the ``starts``. What is found is a lower bound of the true worst case.

    Args:
        steps: of the ascent, the first of length ε, falling to 0.
        starts: steps like x, which are scaled to length ε (those of length 0 stay). Default: :func:`curved_ways`.
        box: smallest and largest value that x + η may have; None: any.

    Other arguments and errors as in :func:`curvature.geometry`.
    """
    with measuring(model):
        x, y = _prepare(model, x, y, precise=True)
        _check(x, "l2", box, steps=steps, batch_size=batch_size)
        radius = _check_eps(eps, x, "l2", box)
        starts = curved_ways(model, x, y, scalar=scalar, batch_size=batch_size) if starts is None else starts
        candidates = [_scaled(_direction(start, "l2"), radius) for start in starts]
        parts = []
        for at in torch.arange(len(x), device=x.device).split(batch_size):
            parts.append(_climb(model, x[at], y[at], radius[at], [c[at] for c in candidates], scalar, steps, box))
    return torch.cat([eta for eta, _ in parts]), torch.cat([change for _, change in parts])


def curved_ways(
    model: nn.Module, x: Tensor, y: Tensor, *, scalar: str = "loss", batch_size: int = 256
) -> tuple[Tensor, Tensor]:
    """± the top eigenvector of each sample's Hessian, like x: the worst steps in the limit ε → 0, where the gradient
    changes by ε‖∇²f‖. Arguments and errors as in :func:`curvature.geometry`."""
    v = geometry(model, x, y, scalar=scalar, tol=0.1, batch_size=batch_size).direction
    return v, -v


def _gradient(model: nn.Module, x: Tensor, y: Tensor, scalar: str, graph: bool = False) -> Tensor:
    found = torch.autograd.grad(scalar_of(model(x), y, scalar).sum(), x, create_graph=graph, materialize_grads=True)
    return found[0]


def _climb(model, x, y, eps, candidates, scalar, steps, box) -> tuple[Tensor, Tensor]:
    """The best step found, like x, and the change of the gradient, (N,)."""
    here = _gradient(model, x.clone().requires_grad_(), y, scalar)
    best, top = torch.zeros_like(x), torch.zeros_like(eps)

    def note(moved: Tensor, change: Tensor) -> None:
        better = change > top
        best[better], top[better] = (moved - x)[better], change[better]

    for candidate in candidates:
        at = _moved(x, candidate, box).requires_grad_()
        change = _length(_gradient(model, at, y, scalar) - here, "l2")
        note(at.detach(), change)
    eta = best.clone()
    for step in range(steps):
        at = _moved(x, eta, box).requires_grad_()
        change = _length(_gradient(model, at, y, scalar, graph=True) - here, "l2")
        uphill = torch.zeros_like(at)  # where the gradient is the same all around: a ReLU network's margin
        if change.requires_grad:
            (uphill,) = torch.autograd.grad(change.sum(), at, materialize_grads=True)
        note(at.detach(), change.detach())
        length = 0.5 * (1 + math.cos(math.pi * step / steps)) * eps
        eta = _project(eta + _scaled(_direction(uphill, "l2"), length), eps, "l2").detach()
    at = _moved(x, eta, box).requires_grad_()
    note(at.detach(), _length(_gradient(model, at, y, scalar) - here, "l2"))
    return best, top
