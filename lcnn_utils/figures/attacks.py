"""The figures of notebook 07: each takes what ``measurements.attacks`` measured and returns a Figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle

from .style import CYCLE, MARKERS, METHOD, PALETTE

NORM = {"l2": "L2", "linf": "L∞"}
MARGIN_MAP = "RdBu_r"


def paths(panels: Sequence[dict]) -> Figure:
    """PGD's way on two moons, a panel each. ``panels``: dicts of title, x1, x2 (coordinates of a grid), loss (its
    values there, rows x2), path (points, 2), eps, norm."""
    figure, axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 3.7), squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        landscape(axis, panel["x1"], panel["x2"], panel["loss"])
        axis.add_patch(ball(panel["path"][0], panel["eps"], panel["norm"]))
        axis.plot(*panel["path"].T, "-", color="k", lw=1)
        axis.plot(*panel["path"][1:-1].T, ".", color="k", ms=5, label="on the way")
        axis.plot(*panel["path"][0], "o", color="white", mec="k", ms=9, label="x")
        axis.plot(*panel["path"][-1], "X", color="gold", mec="k", ms=10, label="end")
        axis.set_title(panel["title"], fontsize=9)
        (left, bottom), reach = panel["path"][0] - 1.5 * panel["eps"], 3 * panel["eps"]
        axis.set(xlabel="x₁", aspect="equal", xlim=(left, left + reach), ylim=(bottom, bottom + reach))
    axes[0, 0].set_ylabel("x₂")
    axes[0, 0].legend(fontsize=8, loc="lower left")
    return figure


def landscape(axis: Axes, x1: np.ndarray, x2: np.ndarray, loss: np.ndarray) -> None:
    """The margin loss on a grid, wrong side red, and the decision boundary."""
    top = float(np.abs(loss).max())
    axis.contourf(x1, x2, loss, levels=np.linspace(-top, top, 25), cmap=MARGIN_MAP, alpha=0.75)
    axis.contour(x1, x2, loss, levels=[0], colors="k", linewidths=1.5)
    axis.grid(False)


def ball(centre: np.ndarray, eps: float, norm: str) -> Circle | Rectangle:
    """The ball of radius ε around a point of the plane."""
    look: dict[str, Any] = dict(fill=False, ec="k", ls="--", lw=1.2)
    if norm == "l2":
        return Circle((centre[0], centre[1]), eps, **look)
    return Rectangle((centre[0] - eps, centre[1] - eps), 2 * eps, 2 * eps, **look)


def step_sizes(frame: pd.DataFrame) -> Figure:
    """What PGD leaves by the rule for its steps' length. Columns: rule, eps, accuracy."""
    figure, axis = plt.subplots(figsize=(6, 3.5))
    for (rule, part), colour, marker in zip(frame.groupby("rule", sort=False), CYCLE, "osvX", strict=False):
        axis.plot(part.eps, 100 * part.accuracy, marker=marker, color=colour, label=rule)
    axis.set(xlabel="ε (L2, pixel units)", ylabel="accuracy left (%)", ylim=(-3, 103))
    axis.legend(fontsize=8, title="length of a step", title_fontsize=8)
    return figure


def logit_scale(frame: pd.DataFrame) -> Figure:
    """Accuracy left by each loss when logits are multiplied. Columns: loss, scale, accuracy, low, high."""
    figure, axis = plt.subplots(figsize=(5.6, 3.5))
    looks = {"ce": ("cross-entropy", CYCLE[3], "o"), "margin": ("margin loss", CYCLE[0], "s")}
    for loss, (label, colour, marker) in looks.items():
        part = frame[frame.loss == loss]
        errors = 100 * np.array([part.accuracy - part.low, part.high - part.accuracy])
        axis.errorbar(part.scale, 100 * part.accuracy, errors, marker=marker, color=colour, capsize=3, label=label)
    axis.set(xscale="log", xlabel="logits multiplied by", ylabel="accuracy left by PGD (%)", ylim=(-3, 103))
    axis.legend(fontsize=8, title="PGD climbs", title_fontsize=8, loc="lower right")
    return figure


def curves(panels: Mapping[str, pd.DataFrame], paper: pd.DataFrame | None = None) -> Figure:
    """Accuracy against ε, a line a method, a panel each. ``panels``: title → frame of ``measurements.over_seeds``
    (one norm). ``paper``: columns label, eps, accuracy, spread (in %): a last panel with the published values."""
    count = len(panels) + (paper is not None)
    figure, axes = plt.subplots(1, count, figsize=(1.5 + 3.6 * count, 4.3), squeeze=False, sharey=True)
    for axis, (title, frame) in zip(axes[0], panels.items(), strict=False):
        for method, part in frame.groupby("method", sort=False):
            label, colour, marker = METHOD[str(method)]
            axis.fill_between(part.eps, 100 * part.low, 100 * part.high, color=colour, alpha=0.12, lw=0)
            axis.plot(part.eps, 100 * part.accuracy, marker=marker, ms=5, color=colour, label=label)
        axis.set(title=title, xlabel=f"ε ({NORM[frame.norm.iloc[0]]}, pixel units)")
        axis.locator_params(axis="x", nbins=4)
    if paper is not None:
        axis = axes[0, -1]
        for name, part in paper.groupby("label", sort=False):
            colour, marker = PALETTE[str(name)], MARKERS[str(name)]
            axis.errorbar(part.eps, part.accuracy, part.spread, marker=marker, ms=5, color=colour, capsize=2,
                          label=name)  # fmt: skip
        axis.set(title="published: CIFAR-100, ResNet-18", xlabel="ε (L2, pixel units)")
        axis.locator_params(axis="x", nbins=4)
    axes[0, 0].set(ylabel="accuracy left by PGD (%)", ylim=(-3, 103))
    known = {label: handle for axis in axes[0] for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(known.values(), known, loc="outside lower center", ncols=4, fontsize=8)
    return figure


def examples(rows: Sequence[dict], classes: Sequence[str]) -> Figure:
    """Images, what an attack adds, and the sum, a row each.
    ``rows``: dicts of title, image, found (H, W) or (H, W, 3), before, after (class), confidence (of ``after``)."""
    figure, axes = plt.subplots(len(rows), 3, figsize=(6.2, 2.4 * len(rows)), squeeze=False)
    for line, row in zip(axes, rows, strict=True):
        added = row["found"] - row["image"]
        top = max(float(np.abs(added).max()), 1e-9)
        picture(line[0], row["image"], f"{row['title']}\nfrom: {classes[row['before']]}")
        picture(line[1], added, f"added, from −{top:.2f} to {top:.2f}", signed=top)
        picture(line[2], row["found"], f"seen as {classes[row['after']]}\n({row['confidence']:.0%} sure)")
    return figure


def picture(axis: Axes, image: np.ndarray, title: str = "", signed: float | None = None):
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
