"""Is a robust accuracy to be believed? Checks that find gradients which are masked: too flat or too jagged to climb.

An attack that fails proves nothing, as it may have failed for reasons of its own: logits so confident that the loss has
no gradient, outputs that saturate or are rounded, a step too short, gradients that point nowhere. Each check compares
the attack with one that should do no better if its gradients are sound, or asks for what any sound attack achieves.

References: A. Athalye et al., ICML 2018 (obfuscated gradients); N. Carlini et al., *On evaluating adversarial
robustness*, 2019, arXiv:1902.06705 (the list of checks); F. Croce and M. Hein, ICML 2020 (AutoAttack, the referee).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping

import pandas as pd
import torch
from torch import Tensor, nn

from ..curvature import evaluating, measuring, scalar_of
from ..curvature.hessian import _prepare
from ..data import Images, floats
from ..lab import check_choice
from .balls import Box, _moved, _project, _random_steps
from .pgd import LOSSES, _check, _check_eps, fgsm, margin_loss, pgd

SLACK = 0.01  # share of the images by which an attack may beat a better one by luck; one image at least
SHORTFALL = 0.02  # share that a longer attack may find beyond the standard one before that is called too short; one too
FEWEST = 4  # images: one may always fall by luck
COARSE = 1e-4  # of the range of an image's logits: they should be rounded more finely than this


class Scaled(nn.Module):
    """A network whose logits are multiplied by a number: the same decisions, other confidences."""

    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.model(x)


class LogOdds(nn.Module):
    """The log-odds of outputs between two numbers: the same decisions, and steep again where the outputs saturate."""

    def __init__(self, model: nn.Module, low: float, high: float) -> None:
        super().__init__()
        self.model, self.low, self.high = model, low, high

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.model(x)
        tiny = torch.finfo(outputs.dtype).tiny
        return (outputs - self.low).clamp(min=tiny).log() - (self.high - outputs).clamp(min=tiny).log()


def random_search(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float | Tensor,
    *,
    norm: str = "l2",
    queries: int = 200,
    box: Box = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Tensor:
    """The best of ``queries`` points in each sample's ball, found without gradients → points like x.

    The first half are drawn anywhere in the ball; the others near the best so far, and kept where the margin falls.
    Arguments, result and errors as :func:`ascent.pgd`.
    """
    generator = generator or torch.Generator().manual_seed(0)
    with measuring(model):
        x, y = _prepare(model, x, y)
        _check(x, norm, box, queries=queries)
        eps = _check_eps(eps, x, norm, box)
    with evaluating(model), torch.no_grad():
        best, top = x.clone(), margin_loss(model(x), y)
        for number, step in enumerate(_random_steps(x, eps, norm, queries, generator)):
            near = number >= queries / 2
            tried = _moved(x, _project(best - x + step / 2, eps, norm) if near else step, box)
            now = margin_loss(model(tried), y)
            better = (now > top) & (top < 0)
            best[better], top[better] = tried[better], now[better]
    return best


def zero_gradients(model: nn.Module, x: Tensor, y: Tensor, loss: str) -> float:
    """Share of the samples where the loss's gradient is exactly 0 in every entry; ``ce`` as frameworks compute it.

    Arguments and errors as :func:`ascent.pgd`.
    """
    check_choice(loss, LOSSES, "loss")
    with measuring(model):
        x, y = _prepare(model, x, y)
        at = x.detach().clone().requires_grad_()
        logits = model(at)
        ce = loss == "ce"
        f = nn.functional.cross_entropy(logits, y, reduction="sum") if ce else scalar_of(logits, y, "margin").sum()
        (gradient,) = torch.autograd.grad(f, at)
    return (gradient.flatten(1) == 0).all(1).float().mean().item()


def coarse_logits(logits: Tensor, x: Tensor, y: Tensor) -> float:
    """Share of the samples x (N, …) whose logits (N, K) are rounded to more than ``COARSE`` of their range by their
    dtype, or else of those whose margin is, to the last digit, also another one's: whichever is larger."""
    rounding = torch.finfo(logits.dtype).eps * logits.abs().amax(1)
    coarse = (rounding > COARSE * (logits.amax(1) - logits.amin(1))).sum().item() / len(x)
    margins = scalar_of(logits, y, "margin")
    return max(coarse, 1 - len(margins.unique()) / len(x.unique(dim=0)))


def autoattack(model: nn.Module, x: Tensor, y: Tensor, eps: float, *, norm: str = "l2", seed: int = 0) -> Tensor:
    """The points that AutoAttack (standard version, of the package pyautoattack) finds, like x.

    Raises:
        ModuleNotFoundError: pyautoattack isn't installed.
        ValueError: fewer than 10 classes, which its targeted attacks need; else as :func:`ascent.pgd`.
    """
    with measuring(model):
        x, y = _prepare(model, x, y)
        attack_class = _referee(model, x)
        _check(x, norm, (0.0, 1.0))
        _check_eps(eps, x, norm, (0.0, 1.0))
        wanted = {p: p.requires_grad for p in model.parameters()}
        trace = sys.gettrace()
        try:
            for p in wanted:
                p.requires_grad_(False)  # it would leave gradients behind
            with torch.random.fork_rng():  # it seeds the global generator
                name = {"l2": "L2", "linf": "Linf"}[norm]
                attack = attack_class(model, norm=name, eps=eps, seed=seed, device=x.device)
                return attack.run_standard_evaluation(x, y, batch_size=256)[0].detach()
        finally:
            sys.settrace(trace)  # which it turns off
            for p, flag in wanted.items():
                p.requires_grad_(flag)


def _referee(model: nn.Module, x: Tensor):
    """The class AutoAttack, if it is installed and can judge this network."""
    try:
        from pyautoattack import AutoAttack
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "the referee AutoAttack needs pyautoattack: pip install -e '.[dev]', or pip install pyautoattack"
        ) from None
    with torch.no_grad():
        classes = model(x[:1]).shape[1]
    if classes < 10:
        raise ValueError(f"AutoAttack's targeted attacks need 10 classes, the network has {classes}")
    return AutoAttack


def masking_checks(
    model: nn.Module,
    images: Images | tuple[Tensor, Tensor],
    eps: float,
    *,
    norm: str = "l2",
    steps: int = 20,
    restarts: int = 5,
    others: Mapping[str, nn.Module] | None = None,
    referee: bool = False,
    seed: int = 0,
) -> pd.DataFrame:
    """What speaks against a robust accuracy at ε, measured by :func:`ascent.pgd` with the margin loss: a row a check.

    An exact tie counts against the network, as there.

    Args:
        images: a split as ``data.load`` gives it, on the model's device, or (x, y).
        eps: radius of the ball, > 0.
        steps, restarts: of the attack that is checked. From a single start it may run towards the wrong class.
        others: networks, by name, whose adversarial points are tried on this one.
        referee: also let AutoAttack try, which takes some minutes for a thousand images.
        seed: of all starts.

    Returns:
        Columns check (what should hold), value (robust accuracy of the other attack, or a share), standard (that of
        the attack checked), passed (None where a number is only reported).

    Raises:
        ValueError: bad samples, labels, ε, norm or number of steps. ModuleNotFoundError: as :func:`autoattack`.
    """
    x, y = floats(images)
    with measuring(model):
        x, y = _prepare(model, x, y)
        if not 0 < eps < math.inf:
            raise ValueError(f"eps is {eps}: masking is checked at one finite radius above 0")
        if len(x) < FEWEST:
            raise ValueError(f"{len(x)} images say nothing about masking: give at least {FEWEST}, better 100")
        if referee:
            _referee(model, x)
        rows = [*_rows(model, x, y, eps, norm, steps, restarts, others or {}, referee, seed)]
    return pd.DataFrame(rows, columns=["check", "value", "standard", "passed"])


def _rows(model, x, y, eps, norm, steps, restarts, others, referee, seed) -> Iterator[tuple]:
    n = len(x)

    def left(points: Tensor) -> int:
        with torch.no_grad():
            return int((margin_loss(model(points), y) < 0).sum())

    def attack(number: int, target: nn.Module = model, radius: float = eps, **settings) -> Tensor:
        start = torch.Generator().manual_seed(seed + 1000 * number)  # another start each time, so that chance shows
        return pgd(target, x, y, radius, generator=start, **dict(norm=norm, steps=steps, restarts=restarts) | settings)

    slack, shortfall = max(1, int(SLACK * n)), max(1, int(SHORTFALL * n))
    points = attack(0)
    standard = left(points)
    with torch.no_grad():
        clean, moved = model(x), model(points)

    def row(check: str, value: int, passed: bool | None) -> tuple:
        return check, value / n, standard / n, passed

    def weaker(check: str, points: Tensor) -> tuple:
        value = left(points)
        return row(check, value, value >= standard - slack)

    yield weaker("one step (FGSM) is no stronger", fgsm(model, x, y, eps, norm=norm, loss="margin"))
    longer = left(attack(1, steps=5 * steps))
    yield row("5 × the steps: hardly stronger", longer, longer >= standard - shortfall)
    start = torch.Generator().manual_seed(seed)
    yield weaker("search without gradients is no stronger", random_search(model, x, y, eps, norm=norm, generator=start))
    for number, (name, other) in enumerate(others.items(), 2):
        with evaluating(other):
            transferred = attack(number, other)
        yield weaker(f"points made for {name} are no stronger", transferred)
    whole = math.sqrt(x[0].numel()) if norm == "l2" else 1.0
    value = left(attack(len(others) + 2, radius=whole, steps=5 * steps))
    yield row("with the whole box as its ball, nothing survives", value, value == 0)
    value = left(attack(0, Scaled(model, 100.0)))
    yield row("logits × 100 change nothing (margin loss)", value, abs(value - standard) <= slack)
    yield row("the same with cross-entropy", left(attack(0, Scaled(model, 100.0), loss="ce")), None)
    for loss, name in (("margin", "the margin"), ("ce", "cross-entropy")):
        zero = zero_gradients(model, x, y, loss)
        yield (
            f"share of gradients that are exactly 0, {name}",
            zero,
            math.nan,
            zero * n <= slack if loss == "margin" else None,
        )
    low, high = clean.min().item(), clean.max().item()
    if low >= -1 and high <= 1:  # as those of a softmax, a sigmoid or a tanh
        low, high = -1.0 if low < 0 else 0.0, 1.0
    value = left(attack(len(others) + 3, LogOdds(model, low, high)))
    yield row("log-odds of the outputs: hardly stronger", value, value >= standard - shortfall)
    coarse = coarse_logits(clean, x, y)
    yield "share of images whose logits are rounded coarsely", coarse, math.nan, coarse * n <= slack
    ties = (margin_loss(moved, y) == 0).sum().item()
    yield "share of attacked points that are exact ties", ties / n, math.nan, ties <= slack
    if referee:
        value = left(autoattack(model, x, y, eps, norm=norm, seed=seed))
        yield row("AutoAttack: hardly stronger", value, value >= standard - shortfall)
