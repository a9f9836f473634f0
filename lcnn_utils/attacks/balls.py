"""Steps of bounded length, in L2 or L∞, inside a box: what attacks are made of."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..curvature.hessian import _length

NORMS = ("l2", "linf")
Box = tuple[float, float] | None


def _scaled(v: Tensor, by: Tensor) -> Tensor:
    return v * by.view(-1, *[1] * (v.dim() - 1))


def _direction(gradient: Tensor, norm: str) -> Tensor:
    """Steepest ascent of length 1 (0 for a zero gradient), however small."""
    if norm == "linf":
        return gradient.sign()
    gradient = _scaled(gradient, 1 / _length(gradient, "linf").clamp(min=torch.finfo(gradient.dtype).tiny))
    return _scaled(gradient, 1 / _length(gradient, "l2").clamp(min=torch.finfo(gradient.dtype).tiny))


def _project(step: Tensor, eps: Tensor, norm: str) -> Tensor:
    """The nearest step of length at most ε."""
    if norm == "linf":
        bound = eps.view(-1, *[1] * (step.dim() - 1))
        return step.clamp(-bound, bound)
    return _scaled(step, (eps / _length(step, "l2").clamp(min=torch.finfo(step.dtype).tiny)).clamp(max=1))


def _moved(x: Tensor, step: Tensor, box: Box) -> Tensor:
    """x + step in the box. Rounding, which for small steps at large x would leave the ball, only shortens the step."""
    moved = x + step
    moved = torch.where((moved - x).abs() > step.abs(), torch.nextafter(moved, x), moved)
    return moved if box is None else moved.clamp(*box)


def _folded(x: Tensor, step: Tensor, box: Box) -> Tensor:
    """``step`` with the sign of every entry changed that would leave the box: as long, and x + step is in the box."""
    if box is None:
        return step
    return torch.where((x + step < box[0]) | (x + step > box[1]), -step, step)


def _random_steps(x: Tensor, eps: Tensor, norm: str, n: int, generator: torch.Generator | None) -> Iterator[Tensor]:
    """n times a step for each sample, uniform in its ball."""
    generator = generator or torch.Generator().manual_seed(0)
    where = generator.device
    for _ in range(n):
        if norm == "linf":
            step = 2 * torch.rand(x.shape, generator=generator, dtype=x.dtype, device=where) - 1
        else:
            radius = torch.rand(len(x), generator=generator, dtype=x.dtype, device=where) ** (1 / x[0].numel())
            step = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=where)
            step = _scaled(_direction(step, norm), radius)
        yield _project(_scaled(step.to(x.device), eps), eps, norm)
