"""How a network is trained, a recipe (all that determines a run), and the recipes of each method at each scale."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

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
# the paper's, in the order in which to train them
PAPER_METHODS = ("standard", "lcnn", "lcnn_gradreg", "gradreg", "softplus_wd", "adversarial", "cure")
PENALISED = ("gradreg", "lcnn_gradreg", "minimal")  # by their gradient
ONLY: dict[str, tuple[str, ...]] = {  # field: the methods that it makes a difference to; all others make one to all
    "beta": ("lcnn", "lcnn_gradreg", "minimal"),
    "lambda_beta": ("lcnn", "lcnn_gradreg", "minimal"),
    "gamma": ("lcnn", "lcnn_gradreg"),
    "lambda_gamma": ("lcnn", "lcnn_gradreg"),
    "lambda_grad": PENALISED,
    "derivative": (*PENALISED, "cure"),
    "lambda_cure": ("cure",),
    "h": ("cure",),
    "softplus": ("softplus_wd",),
    "eps": ("adversarial",),
    "attack_steps": ("adversarial",),
}
CHOICES = {
    "dataset": DATASETS,
    "method": tuple(METHODS),
    "model": MODELS,
    "schedule": ("onecycle", "steps"),
    "derivative": ("exact", "difference"),
}
AT_LEAST_ONE = ("width", "epochs", "batch_size", "attack_steps")
POSITIVE = ("lr", "beta", "softplus", "gamma", "h", "eps", "max_beta", "max_gamma")  # all other numbers may be 0
BELOW_ONE = ("momentum", "validation_fraction")
LIMITS = {int: 2**31, float: math.inf}  # numpy and scikit-learn take seeds below 2**32, and `samples` adds to them
OF_THE_NET = ("beta", "gamma", "softplus")  # what a method's network starts with, not its objective


def _number(name: str, value: Any, kind: type) -> int | float:
    """A field's value as an int or a float, −0.0 as 0.0: equal recipes have one file. ValueError: out of range."""
    least = 1 if name in AT_LEAST_ONE else 0
    limit = 1 if name in BELOW_ONE else LIMITS[kind]
    is_number = isinstance(value, int | kind) and not isinstance(value, bool)
    if not is_number or not least <= value < limit or (value == 0 and name in POSITIVE):
        what = "a whole number" if kind is int else "a number"
        begin = "above" if name in POSITIVE else "from"
        raise ValueError(f"{name} must be {what} {begin} {least} and below {limit}, got {value!r}")
    return kind(value) + 0


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a network is trained, whatever it is and on whatever data: what :func:`fit` takes as ``**settings``.

    What a method doesn't use is ignored. ValueError: an unknown name, or a value out of range. Sources: code-22 and
    code-23 are the authors' code of October 2022 and March 2023; "ours" the lab's.
    """

    method: str = "lcnn"
    seed: int = 0
    epochs: int = 30
    batch_size: int = 128  # code-22
    lr: float = 0.1  # code-22
    momentum: float = 0.9  # code-22
    weight_decay: float = 5e-4  # code-22; none on log β and log γ
    schedule: str = "onecycle"  # ours: short schedules; "steps", ×0.1 at 75 % and 87.5 %, is code-22's
    augment: bool = False
    lambda_beta: float = 1e-3  # code-22; code-23 has 1e-2. Its pull is λ·Σ lr/(1 − μ): a λ belongs to a schedule
    lambda_gamma: float = 1e-3  # code-22; code-23 has 1e-2
    lambda_grad: float = 1e-3  # ours, for short schedules; code-22: 6.1e-3 (its 1e5, divided by the batch size squared)
    lambda_cure: float = 6.1e-5  # code-22, effective
    h: float = 1.0  # CURE's step; code-22: 1 from the first step on
    derivative: str = "exact"  # of penalties on ∇ℓ: by double backward, or by "difference"
    eps: float = 0.1  # code-22: radius of the L2 attack in adversarial training, in pixel units
    attack_steps: int = 3  # code-22
    max_beta: float | None = None  # ours, to fine-tune: all β and γ end at or below these. The ceilings fall from the
    max_gamma: float | None = None  # largest β and γ at the start, geometrically over the first half; None: no ceiling
    compile: bool | None = None  # by torch.compile; None: where it works on a GPU, recipes' CNNs, first derivatives
    bfloat16: bool | None = None  # mixed precision, but on CPUs that would emulate it; None: on NVIDIA GPUs only

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            name, value, default = field.name, getattr(self, field.name), field.default
            if name in CHOICES:
                check_choice(value, CHOICES[name], name)
            elif isinstance(default, int | float) and not isinstance(default, bool):
                object.__setattr__(self, name, _number(name, value, type(default)))
            elif name in POSITIVE and value is not None:
                object.__setattr__(self, name, _number(name, value, float))
            elif value is not default and type(value) is not bool:
                choices = "True, False or None" if default is None else "True or False"
                raise ValueError(f"{name} must be {choices}, got {value!r}")
        if self.compile and self.derivative == "exact" and self.method in ONLY["derivative"]:
            raise ValueError("compiled code has no second derivatives: use derivative='difference' or compile=None")

    def objective(self) -> dict[str, Any]:
        """What the method's objective is given besides the model and its batch."""
        names = (name for name, methods in ONLY.items() if self.method in methods and name not in OF_THE_NET)
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class Recipe(Training):
    """A training, a dataset and a network: everything that determines a run. Equal recipes give equal models (bit for
    bit on one CPU with one number of threads). ValueError: as :class:`Training`.
    """

    dataset: str = "digits"
    method: str = "standard"
    model: str = "resnet10"
    width: int = 16
    beta: float = 5.0  # code-22: start of a trained β
    softplus: float = 10.0  # code-22: the fixed β of softplus_wd
    gamma: float = 10.0  # code-22: start
    validation_fraction: float = 0.0  # of the training set, to choose λ by instead of the test set

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dataset == "moons" and self.model != "mlp":
            raise ValueError(f"moons are points (N, 2), which {self.model} cannot take: use model='mlp'")


LAB: dict[str, Any] = dict(lambda_beta=1e-2, lambda_gamma=1e-2, lambda_grad=1e-2, eps=0.3)  # λ·Σ lr is what acts
CIFAR: dict[str, Any] = dict(model="resnet18", augment=True, derivative="difference")
SMALL: dict[str, Any] = CIFAR | dict(width=16, epochs=20, lr=0.2, bfloat16=True)  # λ·Σ lr is 0.8; wide: 0.6
WIDE: dict[str, Any] = CIFAR | dict(width=64, epochs=30, batch_size=512, lr=0.4)
IMAGES = ("cifar10", "cifar100", "svhn")
SCALES: dict[str, dict[str, dict[str, Any]]] = {  # scale: dataset: fields
    "lab": {
        "moons": LAB | dict(model="mlp", width=32, epochs=30),
        "digits": LAB | dict(width=8, epochs=8, lambda_cure=3e-3),
    },
    "small": dict.fromkeys(IMAGES, SMALL),
    "wide": dict.fromkeys(IMAGES, WIDE),  # the paper's width
    "paper": dict.fromkeys(IMAGES, CIFAR | dict(width=64, epochs=200, schedule="steps", lambda_grad=6.1e-3)),  # code-22
}


def recipe(dataset: str, method: str, seed: int = 0, scale: str | None = None, **changes: Any) -> Recipe:
    """The recipe of a method at a scale, with ``changes`` of its fields; errors as :class:`Recipe`.

    ``scale``: ``lab`` (moons, digits: seconds on a CPU); for CIFAR and SVHN ``small`` (ResNet-18 of width 16: 40
    minutes and up on a CPU core that computes in bfloat16), ``wide`` (width 64: a minute or two on a large GPU) or
    ``paper`` (width 64, 200 epochs). Default: the first of these that the dataset has.
    """
    check_choice(dataset, DATASETS, "dataset")
    scales = tuple(name for name, table in SCALES.items() if dataset in table)
    scale = check_choice(scale or scales[0], scales, f"scale of {dataset}")
    for name in changes:
        check_choice(name, tuple(field.name for field in dataclasses.fields(Recipe)), "field of a recipe")
    fields: dict[str, Any] = {"dataset": dataset, "method": method, "seed": seed}
    return Recipe(**fields | SCALES[scale][dataset] | changes)
