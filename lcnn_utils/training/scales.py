"""The recipes of each scale: from seconds on a CPU to the paper's hours on a GPU."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..lab import check_choice
from .recipe import METHODS, Recipe

LAB: dict[str, dict[str, Any]] = {  # seconds on a CPU; λ larger than on CIFAR, as λ·Σ lr is what acts
    "moons": dict(model="mlp", width=32, epochs=30, lambda_beta=1e-2, lambda_gamma=1e-2, lambda_grad=1e-2, eps=0.3),
    "digits": dict(
        model="resnet10", width=8, epochs=8, lambda_beta=1e-2, lambda_gamma=1e-2, lambda_grad=1e-2, lambda_cure=3e-3,
        eps=0.3,
    ),
}  # fmt: skip
SMALL: dict[str, Any] = dict(
    model="resnet18", width=16, epochs=30, batch_size=512, lr=0.4, augment=True, derivative="difference"
)
WIDE: dict[str, Any] = SMALL | dict(width=64)  # the paper's width, in a minute or two a net on a large GPU
TINY: dict[str, Any] = dict(  # hours on a CPU; λ_β and λ_γ larger, as Σ lr is a third of the small scale's
    model="resnet10", width=8, epochs=8, augment=True, derivative="difference", lambda_beta=3e-3, lambda_gamma=3e-3,
    lambda_grad=6.1e-3,
)  # fmt: skip
PAPER: dict[str, Any] = dict(  # code-22; λ acts through λ·Σ lr, which is ten times that of the small scale
    model="resnet18", width=64, epochs=200, schedule="steps", augment=True, lambda_grad=6.1e-3, derivative="difference"
)
IMAGES = ("cifar10", "cifar100", "svhn")
SCALES: dict[str, dict[str, dict[str, Any]]] = {
    "lab": LAB,
    "small": dict.fromkeys(IMAGES, SMALL),
    "tiny": dict.fromkeys(IMAGES, TINY),
    "wide": dict.fromkeys(IMAGES, WIDE),
    "paper": dict.fromkeys(IMAGES, PAPER),
}


def recipe(dataset: str, method: str, seed: int = 0, scale: str | None = None, **changes: Any) -> Recipe:
    """The recipe of a method at a scale, with ``changes`` of its fields.

    Args:
        scale: ``lab`` (moons, digits: seconds on a CPU), for CIFAR and SVHN ``small`` (ResNet-18 of width 16, on a
            GPU), ``tiny`` (ResNet-10 of width 8, 8 epochs: about ten minutes a net and up on one CPU core), ``wide``
            (width 64) or ``paper`` (width 64, 200 epochs). Default: the first of these that the
            dataset has.

    Raises:
        ValueError: an unknown dataset, method, scale or field (the nearest known one is suggested), a scale that the
            dataset doesn't have, or a value out of range.
    """
    check_choice(dataset, (*LAB, *IMAGES), "dataset")
    check_choice(method, tuple(METHODS), "method")
    has = [name for name, table in SCALES.items() if dataset in table]
    if check_choice(scale or has[0], tuple(SCALES), "scale") not in has:
        raise ValueError(f"{dataset} has no scale {scale!r}: use {' or '.join(map(repr, has))}")
    known = tuple(field.name for field in dataclasses.fields(Recipe))
    for name in changes:
        check_choice(name, known, "field of a recipe")
    fields: dict[str, Any] = {"dataset": dataset, "method": method, "seed": seed}
    return Recipe(**fields | SCALES[scale or has[0]][dataset] | changes)
