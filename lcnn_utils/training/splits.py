"""What a recipe is trained on and measured on: its dataset's splits, and a part of one that is held out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Generator, Tensor

from .. import data
from ..lab import check_choice, pick_device
from .recipe import Recipe

TRAINING = {"moons": 400, "digits": 1437, "cifar10": 50_000, "cifar100": 50_000, "svhn": 73_257}  # samples to train on
MOONS = {"train": (TRAINING["moons"], 0), "test": (1000, 1_000_000)}  # points, offset of the seed
SPLITS = ("train", "held_out", "test")
SPLIT_SEED = 20_221_128  # of the one permutation that says what is held out, whatever the recipe's seed
PROBES = 16  # training images of the history's curvature
Batch = tuple[Tensor, Tensor]


def held_out(n: int, share: float) -> tuple[Tensor, Tensor]:
    """Of n samples, the numbers of those to train on and of those held out, both in ascending order.

    A fixed permutation decides: the same for all methods and seeds. A larger share holds out the same samples and more.

    Raises:
        ValueError: one of the two parts would be empty.
    """
    count = round(share * n)
    if share and not 0 < count < n:
        raise ValueError(f"held_out={share:g} holds out {count} of {n} samples: leave at least one on each side")
    order = torch.randperm(n, generator=Generator().manual_seed(SPLIT_SEED))
    return order[count:].sort().values, order[:count].sort().values


def images(recipe: Recipe, split: str, device: torch.device | str = "cpu") -> data.Images:
    """A split of the recipe's images as uint8: ``train`` without what is held out, ``held_out``, or ``test``.

    Raises:
        ValueError: an unknown split, or ``held_out`` of a recipe that holds nothing out; and as ``data.load``.
    """
    whole = data.load(recipe.dataset, _source(recipe, split))
    chosen = _chosen(recipe, split, len(whole))
    if chosen is not None:  # on the CPU, so that the device never holds both
        whole = replace(whole, x=whole.x[chosen], y=whole.y[chosen])
    return whole.to(pick_device(device))


def samples(recipe: Recipe, split: str, device: torch.device | str = "cpu") -> Batch:
    """A split as (x, y): images (N, C, H, W) in [0, 1] or points (N, 2), and labels (N,).

    Args:
        split: as for :func:`images`, and with its errors.
    """
    if recipe.dataset != "moons":
        found = images(recipe, split, device)
        return found.float(), found.y
    n, offset = MOONS[_source(recipe, split)]
    x, y = data.two_moons(n, noise=0.15, seed=recipe.seed + offset)
    chosen = _chosen(recipe, split, n)
    return (x.to(device), y.to(device)) if chosen is None else (x[chosen].to(device), y[chosen].to(device))


def measured_split(recipe: Recipe) -> str:
    """The split that a trained net is judged by: ``held_out`` if the recipe holds something out, else ``test``."""
    return "held_out" if recipe.held_out else "test"


def _source(recipe: Recipe, split: str) -> str:
    """The split of the dataset that a recipe's split is, or is a part of."""
    check_choice(split, SPLITS, "split")
    if split == "held_out" and not recipe.held_out:
        raise ValueError("this recipe holds nothing out: give it held_out=0.2, say, or ask for 'test'")
    return "test" if split == "test" else "train"


def _chosen(recipe: Recipe, split: str, n: int) -> Tensor | None:
    """Which of the n samples there belong to a recipe's split; None is all."""
    return held_out(n, recipe.held_out)[split == "held_out"] if recipe.held_out and split != "test" else None


def steps_an_epoch(recipe: Recipe) -> int:
    """Training steps an epoch, the last partial batch left out. Moons: the full batch, 20 times."""
    n = TRAINING[recipe.dataset]
    return 20 if recipe.dataset == "moons" else max(1, (n - round(recipe.held_out * n)) // recipe.batch_size)


def epochs(
    recipe: Recipe, device: torch.device, generator: Generator
) -> tuple[Callable[[], Iterable[Batch]], int, Batch]:
    """What makes an epoch's batches, their number, and the few samples of the history's curvature."""
    if recipe.dataset == "moons":
        points = samples(recipe, "train", device)
        return lambda: [points] * 20, 20, (points[0][:PROBES], points[1][:PROBES])
    kept = images(recipe, "train", device)
    make = lambda: data.batches(kept, recipe.batch_size, augment=recipe.augment, generator=generator, drop_last=True)
    return make, max(1, len(kept) // recipe.batch_size), (kept.x[:PROBES].float() / 255, kept.y[:PROBES])
