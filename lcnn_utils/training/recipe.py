"""A recipe: everything that determines a training run, in one value."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from ..lab import check_choice

INPUTS: dict[str, tuple[tuple[int, ...], int]] = {  # dataset: (shape of a sample, classes)
    "moons": ((2,), 2),
    "digits": ((1, 8, 8), 10),
    "cifar10": ((3, 32, 32), 10),
    "cifar100": ((3, 32, 32), 100),
    "svhn": ((3, 32, 32), 10),
}
DATASETS = tuple(INPUTS)
MODELS = ("mlp", "resnet10", "resnet18", "resnet34", "vgg11")
METHODS = {  # name: (activation, whether its layers are Lipschitz: spectral norms and γ-BatchNorm)
    "standard": ("hard", False),  # softplus β = 1000, the authors' Standard: nearly a ReLU, but with a Hessian
    "lcnn": ("trained", True),  # centered softplus with a trained β
    "gradreg": ("hard", False),
    "lcnn_gradreg": ("trained", True),
    "cure": ("hard", False),
    "softplus_wd": ("softplus", False),  # plain softplus with a fixed β
    "adversarial": ("hard", False),
    "minimal": ("trained", False),
    "relu": ("relu", False),  # everybody's network: ReLU, ordinary residual blocks, BatchNorm with scale and shift
}
ONLY = {  # field: the methods that it makes a difference to; every other field makes one to all
    "beta": ("lcnn", "lcnn_gradreg", "minimal"),
    "gamma": ("lcnn", "lcnn_gradreg"),
    "lambda_beta": ("lcnn", "lcnn_gradreg", "minimal"),
    "lambda_gamma": ("lcnn", "lcnn_gradreg"),
    "lambda_grad": ("gradreg", "lcnn_gradreg", "minimal"),
    "lambda_cure": ("cure",),
    "h": ("cure",),
    "penalty_eval": ("cure",),
    "softplus": ("softplus_wd",),
    "eps": ("adversarial",),
    "attack_steps": ("adversarial",),
    "derivative": ("gradreg", "lcnn_gradreg", "minimal", "cure"),
    "published": ("cure", "adversarial"),
}
SCHEDULES = ("onecycle", "steps")
DERIVATIVES = ("exact", "difference")
ZERO_OR_MORE = ("lambda_beta", "lambda_gamma", "lambda_grad", "lambda_cure", "weight_decay", "momentum", "held_out")
BELOW_ONE = ("momentum", "held_out")
LARGEST = 2**31 - 1  # of whole numbers: numpy and scikit-learn take seeds below 2**32, and splits adds to them


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a training run; equal recipes give equal models (bit for bit on
    one CPU with one number of threads).

    Where the values come from: code-22 and code-23 are the authors' public code of October 2022 and March 2023; "ours"
    was chosen here, and the comment says why. What a method doesn't use is ignored.

    Raises:
        ValueError: an unknown name (the nearest known one is suggested), or a number out of range.
    """

    dataset: str = "digits"
    method: str = "standard"
    model: str = "resnet10"
    width: int = 16
    seed: int = 0
    epochs: int = 30
    batch_size: int = 128  # code-22
    lr: float = 0.1  # code-22
    momentum: float = 0.9  # code-22
    weight_decay: float = 5e-4  # code-22; none on log β and log γ
    schedule: str = "onecycle"  # ours: short schedules; "steps", ×0.1 at 75 % and 87.5 %, is code-22's
    augment: bool = False
    beta: float = 5.0  # code-22: start of a trained β
    softplus: float = 10.0  # code-22: the fixed β of softplus_wd
    gamma: float = 10.0  # code-22: start
    lambda_beta: float = 1e-3  # code-22; code-23 has 1e-2. Its pull is λ·Σ lr/(1 − μ): a λ belongs to a schedule
    lambda_gamma: float = 1e-3  # code-22; code-23 has 1e-2
    lambda_grad: float = 1e-3  # ours, for short schedules; code-22: 6.1e-3 (its 1e5, divided by the batch size squared)
    lambda_cure: float = 6.1e-5  # code-22, effective
    h: float = 1.0  # CURE's step; code-22: 1 from the first step on
    penalty_eval: bool = False  # CURE's penalty with BatchNorm in eval mode, as its authors fine-tune with it
    derivative: str = "exact"  # of penalties on ∇ℓ: by double backward, or by "difference"
    eps: float = 0.1  # code-22: radius of the L2 attack in adversarial training, in pixel units
    attack_steps: int = 3  # code-22
    published: bool = False  # the authors' weaker forms of cure and adversarial: see ``objectives``
    held_out: float = 0.0  # share of the training set to choose λ by, in place of the test set: see ``splits``

    def __post_init__(self) -> None:
        names = dict(dataset=DATASETS, method=tuple(METHODS), model=MODELS, schedule=SCHEDULES, derivative=DERIVATIVES)
        for name, known in names.items():
            check_choice(getattr(self, name), known, name)
        if self.dataset == "moons" and self.model != "mlp":
            raise ValueError(f"moons are points (N, 2), which {self.model} cannot take: use model='mlp'")
        for name, low in (("width", 1), ("epochs", 1), ("batch_size", 1), ("attack_steps", 1), ("seed", 0)):
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= LARGEST:
                raise ValueError(f"{name} must be a whole number from {low} to {LARGEST}, got {value!r}")
        for name in ("augment", "published", "penalty_eval"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name in ("lr", "beta", "softplus", "gamma", "h", "eps", *ZERO_OR_MORE):
            value, top = getattr(self, name), 1 if name in BELOW_ONE else sys.float_info.max
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 <= value < top or (value == 0 and name not in ZERO_OR_MORE):
                bounds = (">= 0" if name in ZERO_OR_MORE else "> 0") + (" and < 1" if name in BELOW_ONE else "")
                raise ValueError(f"{name} must be a finite number {bounds}, got {value!r}")
            object.__setattr__(self, name, float(value) + 0.0)  # 1 == 1.0, −0.0 == 0.0: equal recipes, one state
