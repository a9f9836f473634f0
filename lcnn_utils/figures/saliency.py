"""The figures of notebook 06: each takes what ``measurements.saliency`` measured and returns a Figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from .attacks import picture
from .style import BY_LABEL, CYCLE, error_bars, legend_below, log_axis, look, looks, series

KIND = {"random": "random η", "worst": "worst η for the gradient"}
TITLE = {  # of the measures, in figures and tables
    "relative_change": "relative change",
    "cosine": "cosine, signed",
    "spearman": "rank correlation",
    "top_overlap": "top overlap",
    "infidelity": "infidelity (share unexplained)",
}


def maps(images: Sequence[np.ndarray], columns: Mapping[str, Sequence[np.ndarray]], titles: Sequence[str]) -> Figure:
    """Images in the first column, signed maps of each in the others, red for the label and blue against it.
    Each map has its own scale, ± its largest size, so that only its pattern is compared.
    ``images``: (H, W) or (H, W, 3) in [0, 1], a row each, called ``titles``. ``columns``: title → a map for each image,
    (H, W) or (H, W, 3), whose channels are summed."""
    size = (1.75 * (1 + len(columns)), 1.9 * len(images))
    figure, axes = plt.subplots(len(images), 1 + len(columns), figsize=size, squeeze=False)
    for row, (image, title) in enumerate(zip(images, titles, strict=True)):
        picture(axes[row, 0], image, title)
        for axis, (name, column) in zip(axes[row, 1:], columns.items(), strict=True):
            values = column[row] if column[row].ndim == 2 else column[row].sum(-1)
            picture(axis, values, name if row == 0 else "", signed=max(float(np.abs(values).max()), 1e-12))
    return figure


def gradient_robustness(panels: Mapping[str, pd.DataFrame], paper: Mapping[str, pd.DataFrame] | None = None) -> Figure:
    """The paper's figure: relative change of the gradient against ‖η‖, with the dashed lines ‖η‖·E[C].
    ``panels``: title → points of one kind of noise, of ``measurements.lines``. ``paper``: title → the published ones,
    of ``measurements.paper_lines``. LCNN's line is wide, to be seen where LCNN + GradReg's lies on it."""
    solid = {label: look(label) for label in BY_LABEL}
    solid["LCNN"] |= dict(linewidth=4, markersize=8, zorder=1.9)
    thin = dict(linewidth=1, marker="", label="_")
    dashed = {label: look(label) | thin | dict(linestyle=(0 if label == "LCNN" else 4, (4, 4))) for label in BY_LABEL}
    frames = dict(panels) | dict(paper or {})
    rows = 1 if len(frames) < 5 else 2
    columns = math.ceil(len(frames) / rows)
    size = (1 + 3.4 * columns, 0.9 + 3.3 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, sharey=True, sharex=True)
    for axis, (title, frame) in zip(axes.flat, frames.items(), strict=False):
        series(axis, frame, "eps", "value", "label", solid)
        series(axis, frame[["label", "eps", "theory"]], "eps", "theory", "label", dashed)
        axis.set(title=title, xscale="log", yscale="log")
    for axis in axes.flat[len(frames) :]:
        axis.remove()
    for axis in axes[-1]:
        axis.set_xlabel("length of the noise ‖η‖₂ (pixel units)")
    for axis in axes[:, 0]:
        axis.set_ylabel("‖∇f(x+η) − ∇f(x)‖ / ‖∇f(x)‖")
    axes[0, 0].plot([], [], "--", color="0.4", linewidth=1, label="‖η‖ · mean C")
    legend_below(figure, columns=5)
    return figure


def by_map(frame: pd.DataFrame, measures: Sequence[str], noise: Sequence[str] = ("random", "worst")) -> Figure:
    """Measures of several nets by kind of map, with intervals; the worst η is the gradient's, put to all of them.
    ``frame``: columns net, map, noise, measure, value, low, high."""
    measured = set(zip(frame.measure, frame.noise, strict=True))
    panels = [(measure, kind) for measure in measures for kind in noise if (measure, kind) in measured]
    figure, axes = plt.subplots(1, len(panels), figsize=(2.2 + 2.6 * len(panels), 3.6), squeeze=False, sharey=True)
    names, nets = list(frame["map"].unique()), list(frame.net.unique())
    for axis, (measure, kind) in zip(axes[0], panels, strict=True):
        panel = frame[(frame.measure == measure) & (frame.noise == kind)]
        for net, part in panel.groupby("net", sort=False):
            place = part["map"].map(names.index) + 0.18 * (nets.index(net) - (len(nets) - 1) / 2)
            errors = error_bars(part.value, part.low, part.high)
            axis.errorbar(part.value, place, xerr=errors, linestyle="none", **look(str(net)))
        axis.set(title=KIND[kind], xlabel=TITLE[measure])
        if measure in ("relative_change", "infidelity"):
            axis.set_xlim(left=0)
    axes[0, 0].set_yticks(range(len(names)), names)
    axes[0, 0].invert_yaxis()
    legend_below(figure)
    return figure


def stable_or_right(frame: pd.DataFrame) -> Figure:
    """Stability against faithfulness: a point a map and net; hollow: the same net with shuffled weights.
    ``frame``: as in :func:`by_map`, and weights; with relative_change and infidelity under random noise."""
    random = frame[frame.noise == "random"]
    wide = random.pivot(index=["net", "map", "weights"], columns="measure", values="value").reset_index()
    figure, axes = plt.subplots(1, wide.net.nunique(), figsize=(9.4, 4.0), squeeze=False, sharex=True, sharey=True)
    known = looks(frame["map"].unique())
    for axis, net in zip(axes[0], frame.net.unique(), strict=True):
        of_net = wide[wide.net == net]
        trained, shuffled = of_net[of_net.weights == "trained"], of_net[of_net.weights == "random"]
        points: dict[str, Any] = dict(linestyle="none", markersize=9, markeredgewidth=1.5)
        hollow: dict[str, Any] = points | dict(markerfacecolor="white", label="_")
        series(axis, trained, "relative_change", "infidelity", "map", known, **points)
        series(axis, shuffled, "relative_change", "infidelity", "map", known, **hollow)
        axis.set(title=look(net)["label"], xlabel="relative change (left: stable)", ylim=(-0.05, 1.02))
        log_axis(axis)
    axes[0, 0].set_ylabel("infidelity (below: tells what\nthe network will do)")
    axes[0, 0].plot([], [], "o", color="0.4", markerfacecolor="white", label="hollow: shuffled weights")
    legend_below(figure)
    return figure


def random_meets(frame: pd.DataFrame) -> Figure:
    """What random directions meet of each Hessian. Columns: spectral, frobenius, measured (loss per pixel unit²)."""
    figure, axis = plt.subplots(figsize=(5, 3.8))
    ends = [frame[["frobenius", "measured"]].min().min(), frame.spectral.max()]
    axis.loglog(ends, ends, ":", color="0.5", linewidth=1)
    axis.loglog(frame.measured, frame.frobenius, "s", color=CYCLE[1], label="‖H‖_F / √d: what theory says")
    axis.loglog(frame.measured, frame.spectral, "o", color=CYCLE[3], label="‖H‖₂: what C is made of")
    axis.set(xlabel="‖Hu‖ of random unit u, measured (root mean square)", ylabel="prediction (loss per pixel unit²)")
    axis.legend()
    return figure
