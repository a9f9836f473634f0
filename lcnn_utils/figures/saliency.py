"""The figures of notebook 06: each takes what ``measurements.saliency`` measured and returns a Figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from .attacks import picture
from .style import CYCLE, MARKERS, METHOD, PALETTE, label_ticks

KIND = {"random": "random η", "worst": "worst η found"}
TITLE = {
    "relative_change": "relative change",
    "cosine": "cosine, signed",
    "spearman": "rank correlation",
    "top_overlap": "overlap of the top tenth",
    "ssim": "SSIM",
    "infidelity": "infidelity (share unexplained)",
    "sensitivity_max": "sensitivity (largest change)",
}


def maps(images: Sequence[np.ndarray], columns: Mapping[str, Sequence[np.ndarray]], titles: Sequence[str]) -> Figure:
    """Images in the first column, signed maps of each in the others, red for the label and blue against it.
    Each map has its own scale, ± its largest size, so that only its pattern is compared.
    ``images``: (H, W) or (H, W, 3) in [0, 1], a row each, called ``titles``. ``columns``: title → a map for each image,
    (H, W) or (H, W, 3), whose channels are summed."""
    figure, axes = plt.subplots(len(images), 1 + len(columns), figsize=(1.75 * (1 + len(columns)), 1.9 * len(images)))
    axes = np.asarray(axes).reshape(len(images), -1)
    for number, (line, image, title) in enumerate(zip(axes, images, titles, strict=True)):
        picture(line[0], image, title)
        for axis, (name, column) in zip(line[1:], columns.items(), strict=True):
            values = column[number] if column[number].ndim == 2 else column[number].sum(-1)
            picture(axis, values, name if number == 0 else "", signed=max(float(np.abs(values).max()), 1e-12))
    return figure


def gradient_robustness(panels: Mapping[str, pd.DataFrame], paper: Mapping[str, pd.DataFrame] | None = None) -> Figure:
    """The paper's figure: relative change of the gradient against ‖η‖, with the dashed lines ‖η‖·E[C].
    ``panels``: title → points of one kind of noise, of ``measurements.lines``. ``paper``: title → columns label,
    eps, value: the published curves, digitised."""
    paper = paper or {}
    count = len(panels) + len(paper)
    rows = 1 if count < 5 else 2
    columns = math.ceil(count / rows)
    size = (1 + 3.4 * columns, 0.9 + 3.3 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, sharey=True, sharex=True)
    places = axes.flatten()
    for axis in places[count:]:
        axis.remove()
    for axis, (title, frame) in zip(places, panels.items(), strict=False):
        for label, part in frame.groupby("label", sort=False):
            errors = np.array([part.value - part.low, part.high - part.value]).clip(0)
            colour = PALETTE[str(label)]
            axis.errorbar(part.eps, part.value, errors, marker=MARKERS[str(label)], ms=5, color=colour, capsize=2,
                          label=label)  # fmt: skip
            axis.plot(part.eps, part.theory, "--", color=colour, lw=1)
        axis.set_title(title, fontsize=9)
    for axis, (title, frame) in zip(places[len(panels) :], paper.items(), strict=False):
        for label, part in frame.groupby("label", sort=False):
            axis.plot(part.eps, part.value, marker=MARKERS[str(label)], ms=5, color=PALETTE[str(label)])
        axis.set_title(title, fontsize=9)
    for axis in places[:count]:
        axis.set(xscale="log", yscale="log")
    for axis in axes[-1]:
        axis.set_xlabel("length of the noise ‖η‖₂ (pixel units)")
    for axis in axes[:, 0]:
        axis.set_ylabel("‖∇f(x+η) − ∇f(x)‖ / ‖∇f(x)‖")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    handles.append(plt.Line2D([], [], color="0.4", ls="--", lw=1))
    labels.append("‖η‖ · mean C")
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8)
    return figure


def by_map(frame: pd.DataFrame, measures: Sequence[str], noise: Sequence[str] = ("random", "worst")) -> Figure:
    """Measures of several nets by method of explanation: medians over images with 95 % intervals.
    ``frame``: of ``measurements.by_map``, of trained weights."""
    panels = [(m, k) for m in measures for k in noise if len(frame[(frame.measure == m) & (frame.noise == k)])]
    figure, axes = plt.subplots(1, len(panels), figsize=(2.2 + 2.6 * len(panels), 3.6), squeeze=False, sharey=True)
    names = list(dict.fromkeys(frame["map"]))
    nets = list(dict.fromkeys(frame.net))
    for axis, (measure, kind) in zip(axes[0], panels, strict=True):
        for index, net in enumerate(nets):
            part = frame[(frame.net == net) & (frame.measure == measure) & (frame.noise == kind)].set_index("map")
            part = part.reindex(names)
            label, colour, marker = METHOD[str(net)]
            at = np.arange(len(names)) + 0.18 * (index - (len(nets) - 1) / 2)
            errors = np.array([part.value - part.low, part.high - part.value]).clip(0)
            axis.errorbar(part.value, at, xerr=errors, fmt=marker, color=colour, ms=6, capsize=2, label=label)
        axis.set_title(f"{TITLE[measure]}, {KIND[kind]}", fontsize=9)
        if measure in ("relative_change", "infidelity", "sensitivity_max"):
            axis.set_xlim(left=0)
    axes[0, 0].set_yticks(range(len(names)), names)
    axes[0, 0].invert_yaxis()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return figure


def stable_or_right(frame: pd.DataFrame) -> Figure:
    """Steadiness against faithfulness: a point a map and net; hollow: the same net with shuffled weights.
    ``frame``: of ``measurements.by_map`` with relative_change and infidelity under random noise."""
    wide = frame[frame.noise == "random"].pivot(
        index=["net", "map", "weights"], columns="measure", values="value"
    ).reset_index()  # fmt: skip
    figure, axes = plt.subplots(1, wide.net.nunique(), figsize=(9.4, 4.0), squeeze=False, sharex=True, sharey=True)
    names = list(dict.fromkeys(frame["map"]))
    for axis, net in zip(axes[0], dict.fromkeys(frame.net), strict=True):
        part = wide[wide.net == net]
        for name, colour, marker in zip(names, (*CYCLE, "0.3", "k"), "osDvXP^*", strict=False):
            for weights, face in (("trained", colour), ("random", "white")):
                point = part[(part["map"] == name) & (part.weights == weights)]
                axis.plot(point.relative_change, point.infidelity, marker, ms=9, mfc=face, mec=colour, mew=1.5,
                          ls="none", label=name if weights == "trained" else None)  # fmt: skip
        axis.set(xscale="log", ylim=(-0.05, 1.02), title=METHOD[str(net)][0], xlabel="relative change (left: steady)")
    low, high = axes[0, 0].get_xlim()
    ticks = [t for t in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3) if low < t < high]
    for axis in axes[0]:
        label_ticks(axis, ticks)
    axes[0, 0].set_ylabel("infidelity (below: tells what\nthe network will do)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    handles.append(plt.Line2D([], [], marker="o", mfc="white", mec="0.4", mew=1.5, ls="none"))
    figure.legend(handles, [*labels, "hollow: shuffled weights"], loc="outside lower center", ncols=4, fontsize=8)
    return figure


def random_meets(frame: pd.DataFrame) -> Figure:
    """What random directions meet of each Hessian. Columns: spectral, frobenius, measured."""
    figure, axis = plt.subplots(figsize=(5, 3.8))
    ends = [frame[["frobenius", "measured"]].min().min(), frame.spectral.max()]
    axis.loglog(ends, ends, ":", color="0.5", lw=1)
    axis.loglog(frame.measured, frame.frobenius, "s", color=CYCLE[1], ms=5, label="‖H‖_F / √d: what theory says")
    axis.loglog(frame.measured, frame.spectral, "o", color=CYCLE[3], ms=5, label="‖H‖₂: what C is made of")
    axis.set(xlabel="‖Hu‖ of random unit u, measured (root mean square)", ylabel="prediction")
    axis.legend(fontsize=8)
    return figure
