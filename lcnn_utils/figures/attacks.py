"""The figures of notebook 07: each takes what ``measurements.attacks`` measured and returns a Figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Circle, Rectangle

from .style import CYCLE, legend_below, look, looks, percent, series

NORM = {"l2": "L2", "linf": "L∞"}
MARGIN_MAP = "RdBu_r"


def paths(panels: Sequence[dict]) -> Figure:
    """PGD's way on two moons, a panel each. ``panels``: dicts of title, x1, x2 (coordinates of a grid), loss (its
    values there, rows x2), path (points, 2), eps, norm."""
    figure, axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 3.7), squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        path, eps = panel["path"], panel["eps"]
        landscape(axis, panel["x1"], panel["x2"], panel["loss"])
        _ball(axis, path[0], eps, panel["norm"])
        axis.plot(*path.T, "-", color="k", linewidth=1)
        axis.plot(*path[1:-1].T, ".", color="k", label="on the way")
        axis.plot(*path[0], "o", color="white", markeredgecolor="k", markersize=9, label="x")
        axis.plot(*path[-1], "X", color="gold", markeredgecolor="k", markersize=10, label="end")
        left, bottom = path[0] - 1.5 * eps
        axis.set(xlim=(left, left + 3 * eps), ylim=(bottom, bottom + 3 * eps), aspect="equal")
        axis.set(title=panel["title"], xlabel="x₁", ylabel="x₂")
    axes[0, 0].legend(loc="lower left")
    return figure


def landscape(axis: Axes, x1: np.ndarray, x2: np.ndarray, loss: np.ndarray) -> tuple[QuadMesh, Artist]:
    """The margin loss on a grid, wrong side red, and the decision boundary."""
    pale = 1.3 * float(np.abs(loss).max())
    mesh = axis.pcolormesh(x1, x2, loss, cmap=MARGIN_MAP, vmin=-pale, vmax=pale, shading="gouraud")
    boundary = axis.contour(x1, x2, loss, levels=[0], colors="k", linewidths=1.5)
    axis.grid(False)
    return mesh, boundary


def _ball(axis: Axes, centre: np.ndarray, eps: float, norm: str) -> None:
    """The ball of radius ε around a point of the plane."""
    style: dict[str, Any] = dict(fill=False, edgecolor="k", linestyle="--", linewidth=1.2)
    if norm == "l2":
        axis.add_patch(Circle(tuple(centre), eps, **style))
    else:
        axis.add_patch(Rectangle(tuple(centre - eps), 2 * eps, 2 * eps, **style))


def step_sizes(frame: pd.DataFrame) -> Figure:
    """What PGD leaves by the rule for its steps' length. Columns: rule, eps (L2, pixel units), accuracy (share)."""
    figure, axis = plt.subplots(figsize=(6, 3.5))
    series(axis, frame, "eps", "accuracy", "rule", looks(frame.rule.unique()), linestyle="-")
    axis.set(xlabel="ε (L2, pixel units)", ylabel="accuracy left", ylim=(-0.03, 1.03))
    percent(axis)
    axis.legend(title="length of a step")
    return figure


def logit_scale(frame: pd.DataFrame) -> Figure:
    """Accuracy left by each loss when logits are multiplied. Columns: loss, scale, accuracy, low, high (shares)."""
    figure, axis = plt.subplots(figsize=(5.6, 3.5))
    losses = {"ce": dict(label="cross-entropy", color=CYCLE[4], marker="o"),
              "margin": dict(label="margin loss", color=CYCLE[5], marker="s")}  # fmt: skip
    series(axis, frame, "scale", "accuracy", "loss", losses)
    axis.set(xscale="log", xlabel="logits multiplied by", ylabel="accuracy left by PGD", ylim=(-0.03, 1.03))
    percent(axis)
    axis.legend(title="PGD climbs", loc="lower right")
    return figure


def curves(panels: Mapping[str, pd.DataFrame], paper: pd.DataFrame | None = None) -> Figure:
    """Accuracy against ε, a line a method, a panel each. ``panels``: title → frame of ``measurements.over_seeds``
    (one norm). ``paper``: columns label, eps, accuracy, sd (in %): a last panel with the published values."""
    count = len(panels) + (paper is not None)
    figure, axes = plt.subplots(1, count, figsize=(1.5 + 3.6 * count, 4.3), squeeze=False, sharey=True)
    for axis, (title, frame) in zip(axes[0], panels.items(), strict=False):
        for method, part in frame.groupby("method", sort=False):
            style = look(str(method))
            axis.fill_between(part.eps, part.low, part.high, color=style["color"], alpha=0.12, linewidth=0)
            axis.plot(part.eps, part.accuracy, **style)
        axis.set(title=title, xlabel=f"ε ({NORM[frame.norm.iloc[0]]}, pixel units)")
    if paper is not None:
        shares = paper.assign(
            accuracy=paper.accuracy / 100,
            low=(paper.accuracy - paper.sd) / 100,
            high=(paper.accuracy + paper.sd) / 100,
        )
        series(axes[0, -1], shares, "eps", "accuracy", "label")
        axes[0, -1].set(title="published: CIFAR-100, ResNet-18", xlabel="ε (L2, pixel units)")
    for axis in axes[0]:
        axis.locator_params(axis="x", nbins=4)
    axes[0, 0].set(ylabel="accuracy left by PGD", ylim=(-0.03, 1.03))
    percent(axes[0, 0])
    legend_below(figure)
    return figure


def examples(rows: Sequence[dict], classes: Sequence[str]) -> Figure:
    """Images, what an attack adds, and the sum, a row each.
    ``rows``: dicts of title, image, found (H, W) or (H, W, 3), before, after (class), confidence (of ``after``)."""
    figure, axes = plt.subplots(len(rows), 3, figsize=(6.2, 2.4 * len(rows)), squeeze=False)
    for (image, added, found), row in zip(axes, rows, strict=True):
        difference = row["found"] - row["image"]
        top = max(float(np.abs(difference).max()), 1e-9)
        picture(image, row["image"], f"{row['title']}\nfrom: {classes[row['before']]}")
        picture(added, 0.5 + difference / (2 * top), f"added: black −{top:.2f}, white +{top:.2f}")
        picture(found, row["found"], f"seen as {classes[row['after']]}\n({row['confidence']:.0%} sure)")
    return figure


def picture(axis: Axes, image: np.ndarray, title: str = "", signed: float | None = None) -> AxesImage:
    """An image (H, W) or (H, W, 3) in [0, 1], or a signed map in ± ``signed``: red for, blue against."""
    if signed is not None:
        image = image if image.ndim == 2 else image.sum(-1)
        shown = axis.imshow(image, MARGIN_MAP, vmin=-signed, vmax=signed, interpolation="nearest")
    else:
        shown = axis.imshow(image, "gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set_title(title, fontsize=8)
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
    return shown
