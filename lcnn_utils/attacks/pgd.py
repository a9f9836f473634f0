"""Projected gradient ascent within ε of each sample, in L2 or L∞ and inside a box: PGD, and its one-step case FGSM.

References: A. Madry et al., ICLR 2018 (PGD, the random start); I. Goodfellow et al., ICLR 2015 (FGSM); N. Carlini and
D. Wagner, S&P 2017 (the margin loss: cross-entropy has no gradient left where a network is sure of itself, whether or
not it is robust there); F. Croce and M. Hein, ICML 2020 (the best point on the way, restarts).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..curvature import length, measuring, prepare, scalar_of
from ..lab import check_choice

NORMS = ("l2", "linf")
LOSSES = ("margin", "ce")
ROUNDING = 512  # ulps by which an attacked prediction must be wrong: other batch sizes round differently
Box = tuple[float, float] | None
UNIT: Box = (0.0, 1.0)  # of pixels


def scale(v: Tensor, by: Tensor) -> Tensor:
    """Each sample of v (N, …) times its number of ``by`` (N,)."""
    return v * by.view(-1, *[1] * (v.dim() - 1))


def direction(gradient: Tensor, norm: str) -> Tensor:
    """Steepest ascent of length 1 along each sample's gradient (0 where that is 0), however small."""
    if norm == "linf":
        return gradient.sign()
    for kind in ("linf", "l2"):  # the squares of 1e-25 vanish in float32
        gradient = scale(gradient, 1 / length(gradient, kind).clamp(min=torch.finfo(gradient.dtype).tiny))
    return gradient


def project(step: Tensor, eps: Tensor, norm: str) -> Tensor:
    """The nearest step of length at most ε (N,)."""
    if norm == "linf":
        bound = eps.view(-1, *[1] * (step.dim() - 1))
        return step.clamp(-bound, bound)
    return scale(step, (eps / length(step, "l2").clamp(min=torch.finfo(step.dtype).tiny)).clamp(max=1))


def move(x: Tensor, step: Tensor, box: Box) -> Tensor:
    """x + step in the box. Rounding, which for small steps at large x would leave the ball, only shortens the step."""
    moved = x + step
    moved = torch.where((moved - x).abs() > step.abs(), torch.nextafter(moved, x), moved)
    return moved if box is None else moved.clamp(*box)


def mirror(x: Tensor, step: Tensor, box: Box) -> Tensor:
    """``step`` with the sign of every entry changed that would leave the box: as long, and x + step is in the box."""
    if box is None:
        return step
    return torch.where((x + step < box[0]) | (x + step > box[1]), -step, step)


def random_steps(x: Tensor, eps: Tensor, norm: str, n: int, generator: torch.Generator | None) -> Iterator[Tensor]:
    """n times a step for each sample, uniform in its ball."""
    generator = generator or torch.Generator().manual_seed(0)
    drawn: dict[str, Any] = dict(generator=generator, dtype=x.dtype, device=generator.device)
    for _ in range(n):
        if norm == "linf":
            step = 2 * torch.rand(x.shape, **drawn) - 1
        else:
            radius = torch.rand(len(x), **drawn) ** (1 / x[0].numel())
            step = scale(direction(torch.randn(x.shape, **drawn), norm), radius)
        yield project(scale(step.to(x.device), eps), eps, norm)


def _uphill(x: Tensor, at: Tensor, gradient: Tensor, length: Tensor, eps: Tensor, norm: str, box: Box) -> Tensor:
    """The point after ``at``: a step along the gradient, back onto the ball around x, and into the box."""
    return move(x, project(at + scale(direction(gradient, norm), length) - x, eps, norm), box)


def ascend(
    objective: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    x: Tensor,
    eps: Tensor,
    starts: Iterable[Tensor],
    *,
    norm: str,
    steps: int,
    box: Box,
    step_size: float | None = None,
    enough: float = math.inf,
) -> tuple[Tensor, Tensor]:
    """Projected ascent from each of the given first steps: the best points seen, like x, and their scores (N,).

    Args:
        objective: (points (n, …), their indices (n,) among x) → (what is climbed, the score that counts), each (n,).
        eps: (N,); a sample with ε = 0 isn't looked at, and has the score −∞.
        starts: steps like x.
        step_size: of every step; default: 2ε at first, falling to 0 along a cosine.
        enough: a score from which on a sample has finished, and costs nothing more.
    """
    best, alive = x.clone(), (eps > 0).nonzero().squeeze(1)
    top = torch.full_like(eps, -torch.inf, dtype=torch.promote_types(x.dtype, torch.float32))
    if len(alive):
        with torch.no_grad():
            top[alive] = objective(x[alive], alive)[1].to(top)
    for start in starts:
        alive = ((top < enough) & (eps > 0)).nonzero().squeeze(1)
        at = move(x[alive], start[alive], box)
        for step in range(steps + 1):
            if not len(alive):
                break
            with torch.set_grad_enabled(step < steps):
                climbed, score = objective(at.requires_grad_(step < steps), alive)
            score = score.detach().to(top)
            better, going = score > top[alive], score < enough
            best[alive[better]], top[alive[better]] = at.detach()[better], score[better]
            if step == steps:
                break
            gradient = torch.autograd.grad(climbed.sum(), at)[0][going]
            alive, at = alive[going], at.detach()[going]
            falling = (1 + math.cos(math.pi * step / steps)) * eps[alive]
            length = falling if step_size is None else torch.full_like(falling, step_size)
            at = _uphill(x[alive], at, gradient, length, eps[alive], norm, box)
    return best, top


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
    box: Box = UNIT,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Projected gradient ascent on the loss within ε of each sample → adversarial points, detached, like ``x``.

    Of all points seen, x itself included, the one with the largest margin loss is kept. A sample is fooled, and has
    finished, where another logit is at least as large as that of its label: a tie counts against the network.

    Args:
        model: maps x to logits (N, K); attacked in eval mode and left as it was.
        x, y: (N, C, H, W) images in [0, 1] or (N, d) points, inside ``box``; their labels (N,), int64.
        eps: largest length of the step, in units of x, one number or one a sample (N,).
        norm: ``l2`` or ``linf``, in which lengths are measured.
        loss: what is climbed: ``margin``, max_{j≠y} z_j − z_y, or ``ce``, cross-entropy.
        step_size: length of each of the ``steps``; default: 2ε at first, falling to 0 along a cosine, which finds more
            than a constant 2.5·ε/steps (notebook 7).
        restarts, random_start: ascents, each from anywhere in the ball; the first from x if ``random_start`` is off.
        box: smallest and largest value allowed; None for points that may lie anywhere.
        generator: of the starts (default: seed 0), which are drawn for the whole batch, whoever is fooled already.

    Raises:
        ValueError: bad ε, norm, loss, numbers of steps, box, samples or labels, or a network that cannot be measured.
    """
    if step_size is not None and not 0 < step_size < math.inf:
        raise ValueError(f"step_size is {step_size}: use a positive number, or None (2 * eps, falling to 0)")
    with measuring(model):
        x, y = prepare(model, x, y)
        radius, objective = check(x, eps, norm, box, steps=steps, restarts=restarts), fooling(model, y, loss)
        starts: Iterable[Tensor] = random_steps(x, radius, norm, restarts - (not random_start), generator)
        starts = starts if random_start else itertools.chain([torch.zeros_like(x)], starts)
        return ascend(objective, x, radius, starts, norm=norm, steps=steps, step_size=step_size, box=box, enough=0)[0]


def fooling(model: nn.Module, y: Tensor, loss: str = "margin") -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The objective of PGD: climb the loss, and keep the point of the largest :func:`margin_loss`."""
    check_choice(loss, LOSSES, "loss")

    def objective(at: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(at)
        climbed = scalar_of(logits, y[index], "loss") if loss == "ce" else -scalar_of(logits, y[index], "margin")
        return climbed, margin_loss(logits.detach(), y[index])

    return objective


def fgsm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float | Tensor,
    *,
    norm: str = "linf",
    loss: str = "ce",
    box: Box = UNIT,
) -> Tensor:
    """The fast gradient sign method: :func:`pgd` with one step of length ε from x (L2: along the gradient)."""
    largest = float(torch.as_tensor(eps, device="cpu").max())  # projected to each sample's ε
    length = largest if 0 < largest < math.inf else 1.0
    return pgd(model, x, y, eps, norm=norm, loss=loss, steps=1, step_size=length, random_start=False, box=box)


def perturb(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    *,
    steps: int,
    step_size: float,
    box: Box = UNIT,
    generator: torch.Generator | None = None,
) -> Tensor:
    """L2 PGD on cross-entropy for training: every sample takes every step, and the last point is returned, like x.

    Nothing is checked, and the model is used in the mode it is in; else as :func:`pgd`.
    """
    radius, length = x.new_full((len(x),), eps), x.new_full((len(x),), step_size)
    at = move(x, next(random_steps(x, radius, "l2", 1, generator)), box)
    for _ in range(steps):
        at.requires_grad_()
        (gradient,) = torch.autograd.grad(scalar_of(model(at), y, "loss").sum(), at)
        at = _uphill(x, at.detach(), gradient, length, radius, "l2", box)
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


def diameter(x: Tensor, norm: str, box: Box) -> float:
    """Length of the longest step inside the box."""
    return math.inf if box is None else (box[1] - box[0]) * (math.sqrt(x[0].numel()) if norm == "l2" else 1)


def check(x: Tensor, eps: float | Tensor, norm: str, box: Box, **counts: int) -> Tensor:
    """ε as one number a sample, (N,), at most the diameter of the box; with norm, x and counts checked, too."""
    check_choice(norm, NORMS, "norm")
    for name, count in counts.items():
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {count!r}")
    if box is not None and not bool(((x >= box[0]) & (x <= box[1])).all()):
        raise ValueError(f"x lies in [{x.min():g}, {x.max():g}], outside the box {box}: clamp it, or use box=None")
    given = eps.detach().cpu() if isinstance(eps, Tensor) else torch.as_tensor(eps, dtype=torch.float64, device="cpu")
    if given.shape not in ((), (len(x),)):
        raise ValueError(f"eps has shape {tuple(given.shape)}: use one number, or one for each sample, ({len(x)},)")
    bad = given[~(given.isfinite() & (given >= 0))]
    if bad.numel():
        raise ValueError(f"eps is {bad.flatten()[0]:g}: lengths are finite and 0 or more, in units of x (8/255, not 8)")
    return given.double().clamp(max=diameter(x, norm, box)).to(x).expand(len(x))
