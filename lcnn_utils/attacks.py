"""Adversarial points: how far must a sample move before the network is wrong (paper §5, table 2)?

Threat model: white box. The attacker knows the network and its gradients and moves each sample by a step of length at
most ε, in L2 or L∞, inside the box of valid pixels. Pixels lie in [0, 1] and ε is in their unit (the paper's: 0.05 to
0.2 in L2). What an attack finds is an *upper* bound of robustness: finding nothing proves nothing.

References: A. Madry et al., ICLR 2018 (projected gradient ascent, the random start); I. Goodfellow et al., ICLR 2015
(FGSM, one step of it); N. Carlini and D. Wagner, S&P 2017 (the margin loss: cross-entropy has no gradient left where a
network is sure of itself, whether or not it is robust there); F. Croce and M. Hein, ICML 2020 (best iterate, restarts).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .balls import NORMS, Box, _direction, _length, _moved, _project, _random_steps, _scaled
from .curvature import _prepare, evaluating, scalar_of
from .runtime import nearest

LOSSES = ("margin", "ce")
ROUNDING = 64  # ulps of the largest logit by which a prediction must be wrong: other batch sizes round differently
HALVINGS = 12  # of a found step, to its shortest wrong part: 2^-12 of its length


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
        step_size: length of a step; default 2.5·ε/steps, so that every point of the ball can be reached.
        restarts: random starts.
        box: smallest and largest value allowed; None for points that may lie anywhere.
        generator: of the starts (default: seed 0). They are drawn for the whole batch, whoever is fooled already: what
            happens to a sample depends on its place in the batch and on N, not on the other samples.

    Returns:
        Points inside the box and at most ε·(1 + 1e-6) away, as measured in their own dtype.

    Raises:
        ValueError: bad ε, norm, loss, numbers of steps, box, samples or labels, or logits that are not finite.
    """
    nearest(loss, LOSSES, "loss")
    if step_size is not None and not 0 < step_size < math.inf:
        raise ValueError(f"step_size is {step_size}: use a positive number, or None for 2.5 * eps / steps")
    with evaluating(model):
        x, y = _prepare(model, x, y)
        _check(x, norm, box, steps=steps, restarts=restarts)
        eps = _check_eps(eps, x)
        starts = _random_steps(x, eps, norm, restarts, generator)
        return _ascend(model, x, y, eps, starts, norm, loss, steps, step_size, box)[0]


def _ascend(model, x, y, eps, starts, norm, loss, steps, step_size, box) -> tuple[Tensor, Tensor]:
    """PGD from each of the given first steps: the best points seen, like x, and their :func:`_excess` (N,)."""
    best = x.clone()
    with torch.no_grad():
        top = _excess(model(x), y)
    for start in starts:
        alive = ((top <= 0) & (eps > 0)).nonzero().squeeze(1)
        at = _moved(x[alive], start[alive], box)
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
            gradient = torch.autograd.grad(height, at)[0][keep]
            alive, at = alive[keep], at.detach()[keep]
            length = 2.5 * eps[alive] / steps if step_size is None else torch.full_like(eps[alive], step_size)
            moved = at + _scaled(_direction(gradient, norm), length) - x[alive]
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


def minimal_radius(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    norm: str = "l2",
    steps: int = 50,
    restarts: int = 2,
    bisections: int = 10,
    start: float = 0.05,
    box: Box = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """The smallest step found that makes the network wrong about each sample: (its length (N,), the point, like ``x``).

    An upper bound of the distance to the decision boundary, never a certificate. ε is doubled from ``start`` until
    PGD on the margin loss succeeds, then bisected; each step found is cut to the shortest part of it, by bisection
    along it, that still makes the network wrong. The first PGD of each round starts on the way to the best point so
    far (at x while there is none: exact for a linear network), the other restarts anywhere in the ball.

    Args:
        steps, restarts: of each PGD.
        bisections: of ε, once a step has been found (fewer where the bracket is within 0.1 %).
        start: first ε tried, in units of x; it is doubled until the ball holds the whole box, or 20 times without one.

    Other arguments and errors as in :func:`pgd`.

    Returns:
        0 and x where the network is wrong already; infinity and x where nothing was found; else the measured length
        of the returned point's step, and the point, which the network does get wrong.

    Raises:
        RuntimeError: the network contradicts itself about a point, as one that is random in eval mode does.
    """
    if not 0 < start < math.inf:
        raise ValueError(f"start is {start}: the first eps tried must be a positive number")
    generator = generator or torch.Generator().manual_seed(0)
    with evaluating(model):
        x, y = _prepare(model, x, y)
        _check(x, norm, box, steps=steps, restarts=restarts, bisections=bisections)
        with torch.no_grad():
            radius = torch.where(model(x).argmax(1) != y, 0.0, torch.inf).to(x.dtype)
        point, low, halved = x.clone(), torch.zeros_like(radius), torch.zeros_like(y)
        size = 2**20 * start if box is None else (box[1] - box[0]) * (math.sqrt(x[0].numel()) if norm == "l2" else 1)
        for _ in range(max(0, math.ceil(math.log2(size / start))) + 1 + bisections):
            found = radius.isfinite()
            todo = torch.where(found, (halved < bisections) & (radius - low > 1e-3 * radius), low < size)
            eps = torch.where(found, (low + radius) / 2, (2 * low).clamp(min=start)).where(todo, 0)
            starts = [_project(point - x, eps, norm), *_random_steps(x, eps, norm, restarts - 1, generator)]
            ascended, now = _ascend(model, x, y, eps, starts, norm, "margin", steps, None, box)
            won = todo & (now > 0)
            point[won] = _shortened(model, x[won], y[won], ascended[won], box)
            halved += todo & found
            radius[won] = _length(point[won] - x[won], norm)
            low = torch.where(todo & ~won, eps, torch.where(low < radius, low, radius / 2))  # failing proves nothing
        with torch.no_grad():
            right = model(point).argmax(1) == y
    if bool((right & radius.isfinite()).any()):
        raise RuntimeError("the network is right about a point it got wrong before: is it random, even in eval mode?")
    return radius, point


def _shortened(model: nn.Module, x: Tensor, y: Tensor, found: Tensor, box: Box) -> Tensor:
    """The first points on the ways from x to ``found`` (all wrong) that bisection finds wrong; like x."""
    if not len(x):
        return found
    right, wrong = x.new_zeros(len(x)), x.new_ones(len(x))
    point = found
    for _ in range(HALVINGS):
        middle = (right + wrong) / 2
        tried = _moved(x, _scaled(found - x, middle), box)
        with torch.no_grad():
            fooled = _excess(model(tried), y) > 0
        right, wrong = torch.where(fooled, right, middle), torch.where(fooled, middle, wrong)
        point = torch.where(fooled.view(-1, *[1] * (x.dim() - 1)), tried, point)
    return point


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
