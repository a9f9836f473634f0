"""Projected gradient ascent on a network's loss, within ε of each sample: PGD, and its one-step case FGSM.

References: A. Madry et al., ICLR 2018 (PGD, the random start); I. Goodfellow et al., ICLR 2015 (FGSM); Y. Dong et al.,
CVPR 2018 (momentum); N. Carlini and D. Wagner, S&P 2017 (the margin loss: cross-entropy has no gradient left where a
network is sure of itself, whether or not it is robust there); F. Croce and M. Hein, ICML 2020 (best iterate, restarts).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .balls import NORMS, Box, _direction, _moved, _project, _random_steps, _scaled
from .curvature import _prepare, evaluating, scalar_of
from .runtime import nearest

LOSSES = ("margin", "ce")
ROUNDING = 64  # ulps of the largest logit by which a prediction must be wrong: other batch sizes round differently


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float | Tensor,
    *,
    norm: str = "l2",
    loss: str = "margin",
    steps: int = 20,
    step_size: float | None = None,
    restarts: int = 1,
    random_start: bool = True,
    momentum: float = 0.0,
    box: Box = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Projected gradient ascent on the loss within ε of each sample → adversarial points, detached, like ``x``.

    Each restart, the first too, begins anywhere in the ball. Of all points seen, x itself included, the one with the
    largest margin loss is kept. A sample that is fooled has finished and costs nothing more. A gradient of exactly zero
    (cross-entropy of a confident network) leaves the point where it is.

    Args:
        model: maps x to logits (N, K); attacked in eval mode and left as it was.
        x: (N, C, H, W) images in [0, 1] or (N, d) points, inside ``box``.
        y: true labels (N,), int64.
        eps: largest length of the step, one number or one a sample (N,), in units of x. 0 gives x back.
        norm: ``l2`` or ``linf``, in which lengths are measured.
        loss: what is climbed: ``margin``, max_{j≠y} z_j − z_y, or ``ce``, cross-entropy.
        steps: gradient steps in each restart.
        step_size: length of each step; default: 2·ε at first, falling to 0 along a cosine, which finds more in as many
            steps than a constant 2.5·ε/steps (notebook 7).
        restarts: random starts.
        random_start: False lets the first ascent begin at x.
        momentum: in [0, 1): a step follows the decaying sum of all directions so far.
        box: smallest and largest value allowed; None for points that may lie anywhere.
        generator: of the starts (default: seed 0). They are drawn for the whole batch, whoever is fooled already: what
            happens to a sample depends on its place in the batch and on N, not on the other samples.

    Returns:
        Points inside the box and at most ε·(1 + 1e-6) away, as measured in their own dtype.

    Raises:
        ValueError: bad ε, norm, loss, numbers of steps, box, samples or labels, or logits that are not finite.
    """
    with evaluating(model):
        x, y = _prepare(model, x, y)
        return _attack(model, x, y, eps, norm=norm, loss=loss, steps=steps, step_size=step_size, restarts=restarts,
                       random_start=random_start, momentum=momentum, box=box, generator=generator)[0]  # fmt: skip


def _attack(
    model, x, y, eps, *, norm="l2", loss="margin", steps=20, step_size=None, restarts=1, random_start=True,
    momentum=0.0, box=(0.0, 1.0), generator=None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """:func:`pgd` of a model in eval mode, x and y already checked: points and excess as in :func:`_ascend`."""
    nearest(loss, LOSSES, "loss")
    if step_size is not None and not 0 < step_size < math.inf:
        raise ValueError(f"step_size is {step_size}: use a positive number, or None (2 * eps, falling to 0)")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum is {momentum}: use a number from 0 (none) to below 1")
    _check(x, norm, box, steps=steps, restarts=restarts)
    eps = _check_eps(eps, x)
    starts: Iterable[Tensor] = _random_steps(x, eps, norm, restarts - (not random_start), generator)
    starts = starts if random_start else itertools.chain([torch.zeros_like(x)], starts)
    return _ascend(model, x, y, eps, starts, norm, loss, steps, step_size, box, momentum)


def fgsm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float | Tensor,
    *,
    norm: str = "linf",
    loss: str = "ce",
    box: Box = (0.0, 1.0),
) -> Tensor:
    """The fast gradient sign method: :func:`pgd` with one step of length ε from x (L2: along the gradient).

    Arguments, result and errors as there; ε may differ from sample to sample.
    """
    with evaluating(model):
        x, y = _prepare(model, x, y)
        eps = _check_eps(eps, x)
    step_size = eps.max().item() or 1.0  # projected to each sample's ε
    return pgd(model, x, y, eps, norm=norm, loss=loss, steps=1, step_size=step_size, random_start=False, box=box)


def _ascend(model, x, y, eps, starts, norm, loss, steps, step_size, box, momentum=0.0) -> tuple[Tensor, Tensor]:
    """PGD from each of the given first steps: the best points seen, like x, and their :func:`_excess`, −∞ at ε = 0."""
    best, top, alive = x.clone(), torch.full_like(eps, -torch.inf), (eps > 0).nonzero().squeeze(1)
    if len(alive):
        with torch.no_grad():
            top[alive] = _excess(model(x[alive]), y[alive])
    for start in starts:
        alive = ((top <= 0) & (eps > 0)).nonzero().squeeze(1)
        at = _moved(x[alive], start[alive], box)
        velocity = torch.zeros_like(at)
        for step in range(steps + 1):
            if not len(alive):
                break
            with torch.set_grad_enabled(step < steps):
                logits = model(at.requires_grad_(step < steps))
                f = scalar_of(logits, y[alive], "loss") if loss == "ce" else -scalar_of(logits, y[alive], "margin")
                height = f.sum()
            now = _excess(logits.detach(), y[alive])
            better, keep = now > top[alive], now <= 0
            best[alive[better]], top[alive[better]] = at.detach()[better], now[better]
            if step == steps:
                break
            gradient = _gradient(height, at)[keep]
            alive, at = alive[keep], at.detach()[keep]
            velocity = momentum * velocity[keep] + _direction(gradient, norm)
            ahead = _direction(velocity, norm) if momentum else velocity
            falling = (1 + math.cos(math.pi * step / steps)) * eps[alive]
            length = falling if step_size is None else torch.full_like(eps[alive], step_size)
            moved = at + _scaled(ahead, length) - x[alive]
            at = _moved(x[alive], _project(moved, eps[alive], norm), box)
    return best, top


def _gradient(height: Tensor, at: Tensor) -> Tensor:
    """∂height/∂at, 0 where the network cuts the graph (a threshold, say)."""
    found = torch.autograd.grad(height, at, allow_unused=True)[0] if height.requires_grad else None
    return torch.zeros_like(at) if found is None else found


def perturb(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    *,
    steps: int,
    step_size: float,
    box: Box = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Tensor:
    """L2 PGD on cross-entropy for training: every sample takes every step, and the last point is returned, like x.

    Nothing is checked, and the model is used in the mode it is in; else as :func:`pgd`.
    """
    radius = x.new_full((len(x),), eps)
    at = _moved(x, next(_random_steps(x, radius, "l2", 1, generator)), box)
    for _ in range(steps):
        at.requires_grad_()
        gradient = torch.autograd.grad(scalar_of(model(at), y, "loss").sum(), at)[0]
        step = at.detach() + step_size * _direction(gradient, "l2") - x
        at = _moved(x, _project(step, radius, "l2"), box)
    return at


def _excess(logits: Tensor, y: Tensor) -> Tensor:
    """Margin loss less what rounding may account for, (N,): positive where the network is wrong beyond doubt."""
    margin = -scalar_of(logits, y, "margin") - ROUNDING * torch.finfo(logits.dtype).eps * logits.abs().amax(1)
    if not bool(margin.isfinite().all()):
        raise ValueError("the network's logits or gradients are not finite here: its weights or inputs are too large")
    return margin


def _check(x: Tensor, norm: str, box: Box, **counts: int) -> None:
    nearest(norm, NORMS, "norm")
    for name, count in counts.items():
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {count!r}")
    if box is not None and not bool(((x >= box[0]) & (x <= box[1])).all()):
        raise ValueError(
            f"x lies in [{x.min():g}, {x.max():g}], outside the box {box}: clamp it, or use box=None for points that "
            "may lie anywhere"
        )


def _check_eps(eps: float | Tensor, x: Tensor) -> Tensor:
    """ε as one number a sample, (N,)."""
    given = torch.as_tensor(eps, dtype=x.dtype, device=x.device).detach()
    if given.shape not in ((), (len(x),)):
        raise ValueError(f"eps has shape {tuple(given.shape)}: use one number, or one for each sample, ({len(x)},)")
    bad = given[~(given.isfinite() & (given >= 0))]
    if bad.numel():
        raise ValueError(f"eps is {bad.flatten()[0]:g}: lengths are finite and 0 or more, in units of x (8/255, not 8)")
    return given.expand(len(x))
