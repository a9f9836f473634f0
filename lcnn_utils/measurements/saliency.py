"""What notebook 06 measures: how much maps change, by network and by method."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from .. import data, training
from ..curvature import geometry
from ..experiments import (
    SHIPPED,
    by_seed_and_image,
    geometric_interval,
    published,
    ratio_of_means,
)
from ..lab import LABEL
from ..saliency import stability
from ..training import Recipe, run_name, samples
from .training import trained_net

PAPER_NETS = ("standard", "gradreg", "lcnn", "lcnn_gradreg")  # of the paper's gradient-robustness figure


@dataclass(frozen=True, eq=False)
class Scene:
    """Networks by method, and test images (N, C, H, W) in [0, 1] with labels (N,) and names of the classes."""

    dataset: str
    nets: dict[str, nn.Module]
    x: Tensor
    y: Tensor
    classes: tuple[str, ...]

    def first(self, n: int) -> Scene:
        """The same with the first n images."""
        return replace(self, x=self.x[:n], y=self.y[:n])

    def correct(self) -> Scene:
        """The same with the images that all networks get right."""
        with torch.no_grad():
            right = torch.stack([net(self.x).argmax(1) == self.y for net in self.nets.values()]).all(0)
        return replace(self, x=self.x[right], y=self.y[right])


def shipped(recipes: Iterable[Recipe]) -> bool:
    """Whether the weights of all these runs are shipped."""
    return all((SHIPPED / f"{run_name(recipe)}.safetensors").exists() for recipe in recipes)


def scene(device: torch.device, methods: Sequence[str] = PAPER_NETS, dataset: str | None = None) -> Scene:
    """CIFAR-10 where it is on the disk and its networks are shipped, else digits: nothing is trained or downloaded.
    ``dataset``: ``digits`` or ``cifar10`` asks for just that."""
    if dataset is None:
        on_disk = data.available()["cifar10"] != "missing"
        ready = on_disk and shipped(training.recipe("cifar10", method) for method in methods)
        dataset = "cifar10" if ready else "digits"
    recipes = [training.recipe(dataset, method) for method in methods]
    nets = {recipe.method: trained_net(recipe, device) for recipe in recipes}
    x, y = samples(recipes[0], "test", device)
    return Scene(dataset, nets, x, y, data.load(dataset, "test").classes)


def nets_frame(nets: Mapping[str, nn.Module], x: Tensor, y: Tensor, **options) -> pd.DataFrame:
    """:func:`saliency.stability` of several nets, by method of training: columns net, label added, and curvature, each
    image's C of the same scalar and the trained weights."""
    parts = []
    for method, net in nets.items():
        frame = stability(net, (x, y), **options)
        curvature = geometry(net, x, y, scalar=options.get("scalar", "loss")).curvature.cpu().numpy()
        parts.append(frame.assign(curvature=curvature[frame.image], net=method, label=LABEL[method]))
    return pd.concat(parts, ignore_index=True)


def gradients(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of a stability frame that the paper's figure is about: gradient maps of trained weights."""
    return frame[(frame.method == "gradient") & (frame.weights == "trained")]


def lines(frame: pd.DataFrame) -> pd.DataFrame:
    """A point a net, kind of noise and ε: the relative change of the gradient, its mean with
    :func:`experiments.geometric_interval` over the images that the net gets right in all its seeds.
    Columns net, label, noise, eps, seeds, images, value, low, high, and ``theory``, ε times the mean C."""
    by = ["net", "label", "noise", "eps"]
    rows = []
    for key, part in gradients(frame).groupby(by, sort=False):
        values = by_seed_and_image(part, "relative_change")
        theory = key[-1] * by_seed_and_image(part, "curvature").mean()
        rows.append((*key, *values.shape, *geometric_interval(values), theory))
    return pd.DataFrame(rows, columns=[*by, "seeds", "images", "value", "low", "high", "theory"])


def paper_lines(dataset: str) -> pd.DataFrame:
    """The paper's figure, digitised (± 5 %): columns label, eps, value, theory (dashed; CIFAR-100's of table 1)."""
    rows = published("paper gradient-robustness figure")
    rows = rows[rows.dataset == dataset].rename(columns={"method": "label", "epsilon": "eps", "mean": "value"})
    dashed = published("paper, read off the dashed lines" if dataset == "cifar10" else "paper table 1")
    curvature = dashed[dashed.quantity == "curvature"].set_index("method")["mean"]
    rows["theory"] = rows.eps * rows.label.map(curvature)
    return rows[["label", "eps", "value", "theory"]].reset_index(drop=True)


def stability_ratio(frame: pd.DataFrame, eps: float) -> pd.DataFrame:
    """How much more stable each net's gradient is than Standard's: :func:`experiments.ratio_of_means` of the relative
    changes at ε, random η, over the images that both get right in all seeds. Columns net, label, change (the net's mean
    over images and seeds), ratio, low, high."""
    frame = gradients(frame)
    frame = frame[(frame.noise == "random") & np.isclose(frame.eps, eps)]
    standard = frame[frame.net == "standard"]
    rows = []
    for name, part in frame.groupby("net", sort=False):
        change = part.relative_change.mean()
        rows.append((name, LABEL[str(name)], change, *ratio_of_means(standard, part, "relative_change")))
    return pd.DataFrame(rows, columns=["net", "label", "change", "ratio", "low", "high"])
