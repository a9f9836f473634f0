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
LOSSES = {"margin": ("margin", -1), "ce": ("loss", 1)}  # what is climbed: a scalar of the logits, up or down
ROUNDING = 512  # ulps by which an attacked prediction must be wrong: other batch sizes round differently
Box = tuple[float, float] | None
UNIT: Box = (0.0, 1.0)  # of pixels
# points, their indices among x, which ascent (0: only x is looked at) → climbed, score: (n,)
Objective = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


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
    low, high = box or (-math.inf, math.inf)
    return torch.where((x + step < low) | (x + step > high), -step, step)


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


def _uphill(x: Tensor, x_adv: Tensor, gradient: Tensor, length: Tensor, eps: Tensor, norm: str, box: Box) -> Tensor:
    """The point after ``x_adv``: a step along the gradient, back onto the ball around x, and into the box."""
    return move(x, project(x_adv + scale(direction(gradient, norm), length) - x, eps, norm), box)


def ascend(
    objective: Objective, x: Tensor, eps: Tensor, starts: Iterable, norm: str, steps: int, box: Box, step_size=None
) -> tuple[Tensor, Tensor]:
    """The loop of :func:`pgd`, from each of ``starts`` (steps like x): the best points seen and their scores (N,).

    A sample whose score reaches 0 has finished; one with ε = 0 isn't looked at, and has the score −∞.
    """
    best, top = x.clone(), torch.full_like(eps, -torch.inf, dtype=torch.promote_types(x.dtype, torch.float32))
    for number, start in enumerate(itertools.chain([torch.zeros_like(x)], starts)):
        last = steps if number else 0  # x itself is only looked at
        index = ((top < 0) & (eps > 0)).nonzero().squeeze(1)
        x_adv = move(x[index], start[index], box)
        for step in range(last + 1):
            if not len(index):
                break
            with torch.set_grad_enabled(step < last):
                climbed, score = objective(x_adv.requires_grad_(step < last), index, number)
            score = score.detach().to(top)
            better, going = score > top[index], score < 0
            best[index[better]], top[index[better]] = x_adv.detach()[better], score[better]
            if step < last:
                gradient = torch.autograd.grad(climbed.sum(), x_adv)[0][going]
                index, x_adv = index[going], x_adv.detach()[going]
                falling = (1 + math.cos(math.pi * step / steps)) * eps[index]
                length = falling if step_size is None else torch.full_like(falling, step_size)
                x_adv = _uphill(x[index], x_adv, gradient, length, eps[index], norm, box)
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
        model, x, y: of logits (N, K), left as it was; images (N, C, H, W) or points (N, d); labels (N,), int64.
        eps: largest length of the step in the ``norm`` (``l2`` or ``linf``), in units of x; a number, or (N,).
        loss: what is climbed: ``margin``, max_{j≠y} z_j − z_y, or ``ce``, cross-entropy. The margin follows the class
            that leads on the way, whose boundary need not be the nearest; so its second start climbs z_j − z_y for the
            runner-up j at x, the third for the next class, and so on.
        step_size: of each of the ``steps``; default: 2ε at first, falling to 0 along a cosine (notebook 7 says why).
        restarts, random_start: ascents, each from anywhere in the ball; the first from x if ``random_start`` is off.
        box: smallest and largest value allowed; None for points that may lie anywhere.
        generator: of the starts (default: seed 0), which are drawn for the whole batch, whoever is fooled already.

    ValueError: bad input, or a network that cannot be measured.
    """
    if step_size is not None and not 0 < step_size < math.inf:
        raise ValueError(f"step_size is {step_size}: use a positive number, or None (2 * eps, falling to 0)")
    with measuring(model):
        x, y = prepare(model, x, y)
        radius = check(x, eps, norm, box, steps=steps, restarts=restarts)
        drawn = random_steps(x, radius, norm, restarts - (not random_start), generator)
        starts = drawn if random_start else itertools.chain([torch.zeros_like(x)], drawn)
        return ascend(fooling(model, x, y, loss), x, radius, starts, norm, steps, box, step_size)[0]


def fooling(model: nn.Module, x: Tensor, y: Tensor, loss: str = "margin") -> Objective:
    """The objective of :func:`pgd`: climb the loss, and keep the point of the largest :func:`margin_loss`."""
    scalar, sign = LOSSES[check_choice(loss, tuple(LOSSES), "loss")]
    with torch.no_grad():
        others = model(x).scatter(1, y[:, None], -torch.inf)
    rivals = others.argsort(1, descending=True)[:, :-1]  # the other classes, the nearest logit first

    def objective(x_adv: Tensor, index: Tensor, ascent: int) -> tuple[Tensor, Tensor]:
        logits, label = model(x_adv), y[index]
        score = margin_loss(logits.detach(), label)
        if loss == "ce" or ascent < 2:
            return sign * scalar_of(logits, label, scalar), score
        rival = rivals[index, (ascent - 2) % rivals.shape[1]]
        return (logits.gather(1, rival[:, None]) - logits.gather(1, label[:, None])).squeeze(1), score

    return objective


def fgsm(
    model: nn.Module, x: Tensor, y: Tensor, eps: float | Tensor, norm: str = "linf", loss: str = "ce", box: Box = UNIT
) -> Tensor:
    """The fast gradient sign method: :func:`pgd` with one step of length ε from x (L2: along the gradient)."""
    return pgd(model, x, y, eps, norm=norm, loss=loss, steps=1, random_start=False, box=box)  # 2ε, cut to ε


def perturb(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, *, steps: int, step_size: float, box: Box = UNIT, generator=None
) -> Tensor:
    """L2 PGD on cross-entropy for training: the last point, nothing is checked, the model is in whatever mode it is."""
    radius, length = x.new_full((len(x),), eps), x.new_full((len(x),), step_size)
    x_adv = move(x, next(random_steps(x, radius, "l2", 1, generator)), box)
    for _ in range(steps):
        x_adv.requires_grad_()
        (gradient,) = torch.autograd.grad(scalar_of(model(x_adv), y, "loss").sum(), x_adv)
        x_adv = _uphill(x, x_adv.detach(), gradient, length, radius, "l2", box)
    return x_adv


def margin_loss(logits: Tensor, y: Tensor) -> Tensor:
    """max_{j≠y} z_j − z_y less what rounding may account for, (N,): 0 or more where the network is wrong, or tied.

    That is ``ROUNDING`` ulps of the logits' range, or of the two largest, whichever is smaller.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss, size = -scalar_of(logits, y, "margin"), logits.topk(2).values.abs().amax(1)
    rounding = ROUNDING * torch.finfo(logits.dtype).eps * torch.minimum(logits.amax(1) - logits.amin(1), size)
    loss = torch.where(loss == 0, loss, loss - rounding)
    if not bool(loss.isfinite().all()):
        raise ValueError("the network's logits or gradients are not finite here: its weights or inputs are too large")
    return loss


def check(x: Tensor, eps: float | Tensor, norm: str, box: Box, **counts: int) -> Tensor:
    """ε as one number a sample, (N,), at most the longest step in the box; with norm, x and counts checked, too."""
    check_choice(norm, NORMS, "norm")
    for name, count in counts.items():
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {count!r}")
    if box is not None and not bool(((x >= box[0]) & (x <= box[1])).all()):
        raise ValueError(f"x lies in [{x.min():g}, {x.max():g}], outside the box {box}: clamp it, or use box=None")
    given = eps.detach().cpu() if isinstance(eps, Tensor) else torch.as_tensor(eps, dtype=torch.float64, device="cpu")
    if given.shape not in ((), (len(x),)) or not bool((given.isfinite() & (given >= 0)).all()):
        raise ValueError(f"eps is {eps}: use a length in units of x (8/255, not 8), or one for each sample ({len(x)},)")
    longest = math.inf if box is None else (box[1] - box[0]) * (math.sqrt(x[0].numel()) if norm == "l2" else 1)
    return given.double().clamp(max=longest).to(x).expand(len(x))
