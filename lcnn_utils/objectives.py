"""What each method minimises, and the recipe that says how (paper §3.3).

    LCNN:  cross-entropy + λ_β Σ_l β_l + λ_γ Σ_l |log γ_l|

over the activations' sharpnesses β_l and the BatchNorms' slopes γ_l. Standard minimises cross-entropy alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .activations import CenteredSoftplus
from .lipschitz import LipschitzBatchNorm2d
from .runtime import nearest

DATASETS = ("moons", "digits", "cifar10", "cifar100", "svhn")
MODELS = ("mlp", "resnet10", "resnet18", "resnet34", "vgg11")


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a training run; equal recipes give equal models (bit for bit on
    one CPU with one number of threads).

    λ = 1e-3 is the authors' October 2022 value; their later 1e-2 collapses short schedules, as λ acts through λ·Σ lr.

    Raises:
        ValueError: an unknown name (the nearest known one is suggested), or a number out of range.
    """

    dataset: str = "digits"
    method: str = "standard"
    model: str = "resnet10"
    width: int = 16
    seed: int = 0
    epochs: int = 30
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4  # none on log β and log γ
    augment: bool = False
    beta: float = 5.0  # LCNN's start; Standard is fixed at 1000
    gamma: float = 10.0  # LCNN's start
    lambda_beta: float = 1e-3
    lambda_gamma: float = 1e-3

    def __post_init__(self) -> None:
        nearest(self.dataset, DATASETS, "dataset")
        nearest(self.method, tuple(OBJECTIVES), "method")
        nearest(self.model, MODELS, "model")
        if self.dataset == "moons" and self.model != "mlp":
            raise ValueError(f"moons are points (N, 2), which {self.model} cannot take: use model='mlp'")
        for name, low in (("width", 1), ("epochs", 1), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < low:
                raise ValueError(f"{name} must be a whole number of at least {low}, got {value!r}")
        if type(self.augment) is not bool:
            raise ValueError(f"augment must be True or False, got {self.augment!r}")
        zero_or_more = ("lambda_beta", "lambda_gamma", "weight_decay", "momentum")
        for name in ("lr", "beta", "gamma", *zero_or_more):
            value, top = getattr(self, name), 1 if name == "momentum" else math.inf
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 <= value < top or (value == 0 and name not in zero_or_more):
                bounds = (">= 0" if name in zero_or_more else "> 0") + (" and < 1" if name == "momentum" else "")
                raise ValueError(f"{name} must be a finite number {bounds}, got {value!r}")
            object.__setattr__(self, name, float(value))  # 1 == 1.0: equal recipes have one state


def standard(model: nn.Module, x: Tensor, y: Tensor, recipe: Recipe) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy: x (N, …), y (N,) → (loss, terms to log)."""
    logits = model(x)
    loss = F.cross_entropy(logits, y)
    return loss, {"loss": loss.detach(), "accuracy": (logits.detach().argmax(1) == y).float().mean()}


def lcnn(model: nn.Module, x: Tensor, y: Tensor, recipe: Recipe) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy + λ_β Σ β_l + λ_γ Σ |log γ_l| (paper §3.3): x (N, …), y (N,) → (loss, terms to log)."""
    loss, terms = standard(model, x, y, recipe)
    betas = [m.beta for m in model.modules() if isinstance(m, CenteredSoftplus)]
    slopes = [m.log_gamma.abs() for m in model.modules() if isinstance(m, LipschitzBatchNorm2d)]
    sum_beta, sum_gamma = (torch.stack(v).sum() if v else loss.new_zeros(()) for v in (betas, slopes))
    loss = loss + recipe.lambda_beta * sum_beta + recipe.lambda_gamma * sum_gamma
    return loss, terms | {"sum_beta": sum_beta.detach(), "sum_abs_log_gamma": sum_gamma.detach()}


OBJECTIVES = {"standard": standard, "lcnn": lcnn}
