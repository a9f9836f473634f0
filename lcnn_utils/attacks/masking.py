"""Is a robust accuracy to be believed? Checks that find gradients which are masked: too flat or too jagged to climb.

An attack that fails proves nothing: logits may saturate or be rounded, steps be too short, gradients point nowhere.
Each check compares the attack with one that should do no better, or asks for what any sound attack achieves.

References: A. Athalye et al., ICML 2018 (obfuscated gradients); N. Carlini et al., *On evaluating adversarial
robustness*, 2019, arXiv:1902.06705 (the list of checks); F. Croce and M. Hein, ICML 2020 (AutoAttack, the referee).
"""

from __future__ import annotations

import copy
import importlib
import math
import sys
from collections.abc import Callable, Mapping

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..curvature import measuring, prepare, scalar_of
from ..data import Images, floats
from .pgd import UNIT, check, fgsm, margin_loss, move, pgd, project, random_steps

QUERIES = 200  # of the search without gradients
SLACK = 0.01  # share of the images by which an attack may beat a better one by luck; one image at least
SHORTFALL = 0.02  # share of the images that a longer attack may find beyond the standard one; one image at least
COARSE = 1e-4  # of the range of an image's logits: they should be rounded more finely than this


class Headed(nn.Module):
    """A network with one more function behind its logits."""

    def __init__(self, model: nn.Module, head: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.head = model, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.model(x))


def _log_odds(model: nn.Module, outputs: Tensor) -> nn.Module:
    """A network with the same decisions as this one, but steep again where its outputs saturate."""
    low, high = outputs.min().item(), outputs.max().item()
    if low >= -1 and high <= 1:  # as those of a softmax, a sigmoid or a tanh
        low, high = -1.0 if low < 0 else 0.0, 1.0
    tiny = torch.finfo(outputs.dtype).tiny
    return Headed(model, lambda z: (z - low).clamp(min=tiny).log() - (high - z).clamp(min=tiny).log())


def _search(model: nn.Module, x: Tensor, y: Tensor, eps: float, norm: str, seed: int) -> Tensor:
    """The best of ``QUERIES`` points in each sample's ball, like x: half anywhere, then half near the best so far."""
    radius, generator = check(x, eps, norm, UNIT), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        best, top = x.clone(), margin_loss(model(x), y)
        for number, step in enumerate(random_steps(x, radius, norm, QUERIES, generator)):
            close = number >= QUERIES / 2
            tried = move(x, project(best - x + step / 2, radius, norm) if close else step, UNIT)
            now = margin_loss(model(tried), y)
            better = (now > top) & (top < 0)
            best[better], top[better] = tried[better], now[better]
    return best


def _zero_gradients(model: nn.Module, x: Tensor, y: Tensor, loss: str) -> float:
    """Share of the samples where the loss's gradient is exactly 0 in every entry; ``ce`` as frameworks compute it."""
    x_leaf = x.clone().requires_grad_()
    logits = model(x_leaf)
    f = scalar_of(logits, y, "margin").sum() if loss == "margin" else F.cross_entropy(logits, y, reduction="sum")
    (gradient,) = torch.autograd.grad(f, x_leaf)
    return (gradient.flatten(1) == 0).all(1).float().mean().item()


def _coarse_logits(logits: Tensor, x: Tensor, y: Tensor) -> float:
    """Share of the samples whose logits their dtype rounds to more than ``COARSE`` of their range, or of those whose
    margin is, to the last digit, also another one's: whichever is larger."""
    rounding = torch.finfo(logits.dtype).eps * logits.abs().amax(1)
    coarse = (rounding > COARSE * (logits.amax(1) - logits.amin(1))).sum().item() / len(x)
    margins = scalar_of(logits, y, "margin")
    return max(coarse, 1 - len(margins.unique()) / len(x.unique(dim=0)))


def autoattack(model: nn.Module, x: Tensor, y: Tensor, eps: float, *, norm: str = "l2", seed: int = 0) -> Tensor:
    """The points that AutoAttack finds (standard version, of the package pyautoattack; for 10 classes or more)."""
    from pyautoattack import AutoAttack

    trace = sys.gettrace()  # which it switches off
    with measuring(model), torch.random.fork_rng():  # it seeds the global generator
        x, y = prepare(model, x, y)
        check(x, eps, norm, UNIT)
        if (classes := model(x[:1]).shape[1]) < 10:
            raise ValueError(f"AutoAttack needs 10 classes or more, got {classes}")
        judged = copy.deepcopy(model).requires_grad_(False)  # it would leave gradients behind
        attack = AutoAttack(judged, norm={"l2": "L2", "linf": "Linf"}[norm], eps=eps, seed=seed, device=x.device)
        try:
            return attack.run_standard_evaluation(x, y, batch_size=256)[0].detach()
        finally:
            sys.settrace(trace)


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
    """What speaks against a robust accuracy at ε, measured by :func:`pgd` with the margin loss: a row a check.

    Args:
        images: a split as ``data.load`` gives it, on the model's device, or (x, y).
        steps, restarts: of the attack that is checked. From a single start it may run towards the wrong class.
        others: networks, by name, whose adversarial points are tried on this one; referee: also AutoAttack's (minutes).

    Columns: check (what should hold), value (robust accuracy of the other attack, or a share), standard (that of the
    attack checked), passed (None where a number is only reported). Errors as in :func:`pgd`.
    """
    x, y = floats(images)
    with measuring(model):
        x, y = prepare(model, x, y)
        check(x, eps, norm, UNIT, steps=steps, restarts=restarts)
        if eps <= 0 or len(x) < 4:  # one image may always fall by luck
            raise ValueError(f"{eps=}, {len(x)} images: give a radius above 0 and 4 images, better 100")
        if referee:  # before the other attacks, which take minutes
            importlib.import_module("pyautoattack")
        rows = _rows(model, x, y, eps, norm, steps, restarts, others or {}, referee, seed)
    return pd.DataFrame(rows, columns=["check", "value", "standard", "passed"])


def _rows(model, x, y, eps, norm, steps, restarts, others, referee, seed) -> list[tuple]:
    n = len(x)
    slack, shortfall = max(1, int(SLACK * n)), max(1, int(SHORTFALL * n))

    def attack(number: int, target: nn.Module = model, radius: float = eps, **settings) -> Tensor:
        start = torch.Generator().manual_seed(seed + 1000 * number)  # another start each time, so that chance shows
        return pgd(target, x, y, radius, generator=start, **dict(norm=norm, steps=steps, restarts=restarts) | settings)

    def left(points: Tensor) -> int:
        with torch.no_grad():
            return int((margin_loss(model(points), y) < 0).sum())

    points = attack(0)
    standard = left(points)
    with torch.no_grad():
        clean, moved = model(x), model(points)
    rivals = {  # check: points, and by how many images they may beat the attack that is checked
        "one step (FGSM) is no stronger": (fgsm(model, x, y, eps, norm, "margin"), slack),
        "5 × the steps: hardly stronger": (attack(1, steps=5 * steps), shortfall),
        "search without gradients is no stronger": (_search(model, x, y, eps, norm, seed), slack),
        "log-odds of the outputs: hardly stronger": (attack(len(others) + 3, _log_odds(model, clean)), shortfall),
    }
    for number, (name, other) in enumerate(others.items(), 2):
        rivals[f"points made for {name} are no stronger"] = attack(number, other), slack
    if referee:
        rivals["AutoAttack: hardly stronger"] = autoattack(model, x, y, eps, norm=norm, seed=seed), shortfall
    counts = {name: (left(rival), standard - allowed) for name, (rival, allowed) in rivals.items()}
    rows: list[tuple] = [(name, value / n, standard / n, value >= least) for name, (value, least) in counts.items()]
    whole = left(attack(len(others) + 2, radius=x[0].numel(), steps=5 * steps))  # cut to the box
    rows.append(("with the whole box as its ball, nothing survives", whole / n, standard / n, whole == 0))
    loud = Headed(model, lambda z: 100 * z)
    value = left(attack(0, loud))
    rows.append(("logits × 100 change nothing (margin loss)", value / n, standard / n, abs(value - standard) <= slack))
    rows.append(("the same with cross-entropy", left(attack(0, loud, loss="ce")) / n, standard / n, None))
    shares = {
        "gradients that are exactly 0, the margin": _zero_gradients(model, x, y, "margin"),
        "gradients that are exactly 0, cross-entropy": _zero_gradients(model, x, y, "ce"),
        "images whose logits are rounded coarsely": _coarse_logits(clean, x, y),
        "attacked points that are exact ties": (margin_loss(moved, y) == 0).sum().item() / n,
    }
    for name, share in shares.items():
        passed = None if "cross-entropy" in name else share * n <= slack  # which a sure network may fail
        rows.append((f"share of {name}", share, math.nan, passed))
    return rows
