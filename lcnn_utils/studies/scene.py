"""What notebooks 06 and 07 look at: trained networks and test images, the best that are here without training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .. import data
from ..experiments import SHIPPED, run
from ..figures.style import METHOD
from ..training import Recipe, recipe, run_name, samples

PAPER_NETS = ("standard", "gradreg", "lcnn", "lcnn_gradreg")  # of the paper's gradient-robustness figure


@dataclass(frozen=True, eq=False)
class Scene:
    """Networks by method, and test images (N, C, H, W) in [0, 1] with labels (N,) and names of the classes."""

    dataset: str
    scale: str
    nets: dict[str, nn.Module]
    x: Tensor
    y: Tensor
    classes: tuple[str, ...]

    def first(self, n: int) -> Scene:
        """The same with the first n images."""
        return replace(self, x=self.x[:n], y=self.y[:n])

    def __str__(self) -> str:
        names = ", ".join(METHOD[method][0] for method in self.nets)
        return f"{len(self.x)} test images of {self.dataset}; networks of scale {self.scale!r}: {names}"


def shipped(recipes: Iterable[Recipe]) -> bool:
    """Whether the weights of all these runs are shipped."""
    return all((SHIPPED / f"{run_name(one)}.safetensors").exists() for one in recipes)


def scene(
    device: torch.device, methods: Sequence[str] = PAPER_NETS, seed: int = 0, dataset: str | None = None
) -> Scene:
    """CIFAR-10 where it is on the disk and its networks are shipped, else digits: nothing is trained or downloaded.
    ``dataset``: ``digits`` or ``cifar10`` asks for just that (another: ValueError)."""
    scale = {"digits": "lab", "cifar10": "tiny"}
    if dataset is None:
        here = data.available()["cifar10"] != "missing"
        dataset = "cifar10" if here and shipped(recipe("cifar10", m, seed, "tiny") for m in methods) else "digits"
    if dataset not in scale:
        raise ValueError(f"there are no networks to look at for {dataset!r}: use {' or '.join(map(repr, scale))}")
    recipes = [recipe(dataset, method, seed, scale[dataset]) for method in methods]
    nets = {one.method: run(one, device=device, progress=False).model for one in recipes}
    x, y = samples(recipes[0], "test", device)
    names = data.load(dataset, "test").classes
    return Scene(dataset, scale[dataset], {m: net for m, net in nets.items() if net is not None}, x, y, names)
