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

from ..curvature import measuring, scalar_of
from ..curvature.hessian import _prepare
from ..lab import check_choice
from .balls import NORMS, Box, _direction, _moved, _project, _random_steps, _scaled

LOSSES = ("margin", "ce")
ROUNDING = 512  # ulps by which an attacked prediction must be wrong: other batch sizes round differently


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
    largest margin loss is kept. A sample is fooled where another logit is at least as large as that of its label: an
    exact tie, which says nothing for the label, counts against the network, whichever class argmax takes. It has then
    finished and costs nothing more. A gradient of exactly zero (cross-entropy of a confident network) leaves the point
    where it is.

    Args:
        model: maps x to logits (N, K); attacked in eval mode and left as it was.
        x: (N, C, H, W) images in [0, 1] or (N, d) points, inside ``box``.
        y: true labels (N,), int64.
        eps: largest length of the step, one number or one a sample (N,), in units of x. 0 gives x back; beyond the
            box's diameter it is the whole box.
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
        ValueError: bad ε, norm, loss, numbers of steps, box, samples or labels; a network that gives no finite logits,
            cuts the graph, is random, changes x in place, or whose samples change each other's logits.
    """
    with measuring(model):
        x, y = _prepare(model, x, y)
        return _attack(model, x, y, eps, norm=norm, loss=loss, steps=steps, step_size=step_size, restarts=restarts,
                       random_start=random_start, momentum=momentum, box=box, generator=generator)[0]  # fmt: skip


def _attack(
    model, x, y, eps, *, norm="l2", loss="margin", steps=20, step_size=None, restarts=1, random_start=True,
    momentum=0.0, box=(0.0, 1.0), generator=None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """:func:`pgd` of a model in eval mode, x and y already checked: points and margin loss as in :func:`_ascend`."""
    check_choice(loss, LOSSES, "loss")
    if step_size is not None and not 0 < step_size < math.inf:
        raise ValueError(f"step_size is {step_size}: use a positive number, or None (2 * eps, falling to 0)")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum is {momentum}: use a number from 0 (none) to below 1")
    _check(x, norm, box, steps=steps, restarts=restarts)
    eps = _check_eps(eps, x, norm, box)
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
    with measuring(model):
        x, y = _prepare(model, x, y)
        eps = _check_eps(eps, x, check_choice(norm, NORMS, "norm"), box)
        step_size = eps.max().item() or 1.0  # projected to each sample's ε
        return _attack(model, x, y, eps, norm=norm, loss=loss, steps=1, step_size=step_size, random_start=False,
                       box=box)[0]  # fmt: skip


def _ascend(model, x, y, eps, starts, norm, loss, steps, step_size, box, momentum=0.0) -> tuple[Tensor, Tensor]:
    """PGD from each of the given first steps: the best points, like x, and their :func:`margin_loss`, −∞ at ε = 0."""
    best, alive = x.clone(), (eps > 0).nonzero().squeeze(1)
    top = torch.full_like(eps, -torch.inf, dtype=torch.promote_types(x.dtype, torch.float32))
    if len(alive):
        with torch.no_grad():
            top[alive] = margin_loss(model(x[alive]), y[alive]).to(top)
    for start in starts:
        alive = ((top < 0) & (eps > 0)).nonzero().squeeze(1)
        at = _moved(x[alive], start[alive], box)
        velocity = torch.zeros_like(at)
        for step in range(steps + 1):
            if not len(alive):
                break
            with torch.set_grad_enabled(step < steps):
                logits = model(at.requires_grad_(step < steps))
                f = scalar_of(logits, y[alive], "loss") if loss == "ce" else -scalar_of(logits, y[alive], "margin")
                height = f.sum()
            now = margin_loss(logits.detach(), y[alive]).to(top)
            better, keep = now > top[alive], now < 0
            best[alive[better]], top[alive[better]] = at.detach()[better], now[better]
            if step == steps:
                break
            gradient = torch.autograd.grad(height, at)[0][keep]
            alive, at = alive[keep], at.detach()[keep]
            velocity = momentum * velocity[keep] + _direction(gradient, norm)
            ahead = _direction(velocity, norm) if momentum else velocity
            falling = (1 + math.cos(math.pi * step / steps)) * eps[alive]
            longest = 1e4 * eps[alive]  # what is longer leads to the same point, once projected
            length = falling if step_size is None else longest.clamp(max=min(step_size, torch.finfo(eps.dtype).max))
            moved = at + _scaled(ahead, length) - x[alive]
            at = _moved(x[alive], _project(moved, eps[alive], norm), box)
    return best, top


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


def margin_loss(logits: Tensor, y: Tensor) -> Tensor:
    """max_{j≠y} z_j − z_y less what rounding may account for, (N,): 0 or more where the network is wrong.

    An exact tie gives 0; a lead of another class by less than ``ROUNDING`` ulps gives less. These are ulps of the
    logits' range, whatever they have in common, or of the two compared, whatever a class that is ruled out has.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss, size = -scalar_of(logits, y, "margin"), logits.topk(2).values.abs().amax(1)
    rounding = ROUNDING * torch.finfo(logits.dtype).eps * torch.minimum(logits.amax(1) - logits.amin(1), size)
    loss = torch.where(loss == 0, loss, loss - rounding)
    if not bool(loss.isfinite().all()):
        raise ValueError("the network's logits or gradients are not finite here: its weights or inputs are too large")
    return loss


def _check(x: Tensor, norm: str, box: Box, **counts: int) -> None:
    check_choice(norm, NORMS, "norm")
    for name, count in counts.items():
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {count!r}")
    if box is not None and not bool(((x >= box[0]) & (x <= box[1])).all()):
        raise ValueError(
            f"x lies in [{x.min():g}, {x.max():g}], outside the box {box}: clamp it, or use box=None for points that "
            "may lie anywhere"
        )


def _check_eps(eps: float | Tensor, x: Tensor, norm: str, box: Box) -> Tensor:
    """ε as one number a sample, (N,), at most the diameter of the box."""
    given = eps.detach().cpu() if isinstance(eps, Tensor) else torch.as_tensor(eps, dtype=torch.float64, device="cpu")
    given = given.double()
    if given.shape not in ((), (len(x),)):
        raise ValueError(f"eps has shape {tuple(given.shape)}: use one number, or one for each sample, ({len(x)},)")
    bad = given[~(given.isfinite() & (given >= 0))]
    if bad.numel():
        raise ValueError(f"eps is {bad.flatten()[0]:g}: lengths are finite and 0 or more, in units of x (8/255, not 8)")
    largest = torch.finfo(x.dtype).max ** 0.5 / 10  # the squares of longer steps overflow
    if box is not None:
        largest = (box[1] - box[0]) * (math.sqrt(x[0].numel()) if norm == "l2" else 1)
    elif bool((given > largest).any()):
        raise ValueError(f"eps is {given.max():g}: without a box at most {largest:g} in {x.dtype}")
    return given.clamp(max=largest).to(x).expand(len(x))
