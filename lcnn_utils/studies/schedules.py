"""What a penalty weight λ can do in a schedule."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..training import TRAINING as TRAINING
from ..training import Recipe, learning_rate, recipe
from ..training import steps_an_epoch as steps_an_epoch


def rates(one: Recipe) -> Tensor:
    """The learning rate of every step of a recipe's training, (T,)."""
    total = one.epochs * steps_an_epoch(one)
    return torch.tensor([learning_rate(one, step / total) for step in range(total)], dtype=torch.float64)


def lowest_gamma(gamma: float, rates: Tensor, lam: float, momentum: float) -> Tensor:
    """The lowest γ that λ|log γ| alone can pull ``gamma`` ≥ 1 down to, with learning rates (T,).

    Above γ = 1 its gradient for log γ is λ at every step, and a step with momentum μ counts 1/(1 − μ) times in the end:
    so log γ falls by λ Σ lr/(1 − μ) at most. Where that is enough to reach γ = 1, the answer is 1: there the pull turns
    round (momentum carries γ a little below, for a while).
    """
    return (math.log(gamma) - lam * rates.sum() / (1 - momentum)).clamp(min=0).exp()


def course_recipe() -> Recipe:
    """What the course project trained: code-23's defaults (both λ = 1e-2) for 50 epochs."""
    return recipe("cifar10", "lcnn", scale="paper", epochs=50, lambda_beta=1e-2, lambda_gamma=1e-2)


def published_schedules() -> dict[str, Recipe]:
    """LCNN trainings to compare: the authors' of two years, the course project's, and three of ours on digits."""
    authors = {"authors, October 2022": 1e-3, "authors, March 2023": 1e-2}
    weights = lambda lam: dict(lambda_beta=lam, lambda_gamma=lam)
    found = {name: recipe("cifar10", "lcnn", 0, "paper", **weights(lam)) for name, lam in authors.items()}
    found["course project, CIFAR-10"] = course_recipe()
    return found | {
        f"digits, λ = {lam:g}": recipe("digits", "lcnn", 0, "lab", **weights(lam)) for lam in (0.01, 0.1, 0.3)
    }
