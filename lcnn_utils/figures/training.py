"""The figures of notebook 05: each takes what ``measurements.training`` measured and returns a Figure."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from .style import CYCLE, LADDER, METHOD, label_ticks

KIND = {"beta": "β: sharpness of the activations", "gamma": "γ: slope limit of the BatchNorms"}
ARM = tuple(zip(CYCLE, "o^vXsD", strict=True))
LAYERS = "cividis"


def training_curves(histories: dict[str, pd.DataFrame]) -> Figure:
    """Loss, training accuracy and curvature, epoch by epoch. ``histories``: method → what ``training.fit`` returns."""
    panels = {"loss": "cross-entropy", "accuracy": "training accuracy (%)", "curvature": "C of the loss, 16 images"}
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.2))
    for method, history in histories.items():
        label, colour, marker = METHOD[method]
        for axis, column in zip(axes, panels, strict=True):
            values = history[column] * (100 if column == "accuracy" else 1)
            axis.plot(history.epoch, values, color=colour, marker=marker, ms=5, label=label)
    for axis, (column, title) in zip(axes, panels.items(), strict=True):
        axis.set(title=title, xlabel="epoch")
        if column != "accuracy":
            axis.set_yscale("log")
    axes[2].set_ylabel("C (1/pixel unit)")
    axes[0].legend(fontsize=8)
    return figure


def layers(frame: pd.DataFrame) -> Figure:
    """β and γ of every layer over training. Columns: epoch, kind, layer, value (``measurements.layer_frame``)."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    for axis, (kind, title) in zip(axes, KIND.items(), strict=True):
        part = frame[frame.kind == kind]
        last = part.layer.max()
        for index, (layer, line) in enumerate(part.groupby("layer")):
            colour = plt.get_cmap(LAYERS)(index / max(last - 1, 1))
            axis.plot(line.epoch, line.value, color=colour, marker="o", ms=3)
            axis.annotate(f"{layer}", (line.epoch.iloc[-1], line.value.iloc[-1]), (4, -3),
                          textcoords="offset points", fontsize=7)  # fmt: skip
        axis.set(title=title, xlabel="epoch", ylabel=f"{title[0]} of layer 1 (input) to {last} (output)", yscale="log")
        label_ticks(axis, _ticks(part.value), "y")
    return figure


def _ticks(values: pd.Series) -> list[float]:
    inside = [tick for tick in LADDER if values.min() / 1.6 <= tick <= values.max() * 1.6]
    return inside[:: max(1, len(inside) // 7)]


def accuracy_against_curvature(frame: pd.DataFrame) -> Figure:
    """Test accuracy against C, of the loss and of the margin: a point a method, mean ± standard deviation over seeds.
    ``frame``: of ``measurements.runs_frame``."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.3), sharey=True)
    groups = [(METHOD[str(method)], part) for method, part in frame.groupby("method", sort=False)]
    for axis, column in zip(axes, ("curvature", "margin_curvature"), strict=True):
        for (label, colour, marker), part in groups:
            mean, spread = part[["accuracy", column]].mean(), part[["accuracy", column]].std(ddof=1)
            if mean[column] <= 0:
                continue  # a ReLU net's margin is linear almost everywhere
            axis.errorbar(
                mean[column], 100 * mean.accuracy, 100 * spread.accuracy, spread[column], fmt=marker, color=colour,
                ms=9, capsize=3, label=label,
            )  # fmt: skip
        axis.set(xscale="log", xlabel=f"C of the {'margin' if 'margin' in column else 'loss'} (1/pixel unit), mean")
        low, high = axis.get_xlim()
        label_ticks(axis, [tick for tick in LADDER if low < tick < high])
    axes[0].set_ylabel("test accuracy (%)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return figure


def lambdas(frame: pd.DataFrame, layers: pd.DataFrame) -> Figure:
    """What λ does: accuracy and C over seeds, and the trained β and γ of every layer.
    ``frame``: of ``measurements.runs_frame``, runs that differ in λ. ``layers``: of ``measurements.lambda_layers``."""
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.4))
    lams = sorted(frame.lambda_beta.unique())
    at = dict(zip(lams, range(len(lams)), strict=True))
    for axis, column, scale in ((axes[0], "accuracy", 100), (axes[1], "curvature", 1)):
        values = frame.groupby("lambda_beta")[column]
        axis.errorbar(range(len(lams)), scale * values.mean(), scale * values.std(), fmt="s-", color=METHOD["lcnn"][1],
                      capsize=3)  # fmt: skip
    axes[0].set(title="test accuracy (%)", ylim=(0, 105))
    axes[1].set(title="C of the loss (1/pixel unit)", yscale="log")
    for axis, kind in zip(axes[2:], KIND, strict=True):
        part = layers[layers.kind == kind]
        for index, (_, line) in enumerate(part.groupby("layer")):
            colour = plt.get_cmap(LAYERS)(index / max(part.layer.max() - 1, 1))
            axis.plot(line.lambda_.map(at), line.value, color=colour, marker="o", ms=3)
        axis.set(title=f"{KIND[kind][0]}, dark: first layer, bright: last", yscale="log")
    for axis in axes:
        axis.set_xticks(range(len(lams)), [f"{lam:g}" for lam in lams], rotation=45)
        axis.set_xlabel("λ_β = λ_γ")
    for axis, title in zip(axes, "abcd", strict=True):
        axis.set_title(f"({title}) {axis.get_title()}", fontsize=9)
    return figure


def lambda_search(frame: pd.DataFrame, chosen: float) -> Figure:
    """Accuracy on the held-out part, once more near its best, and C, against λ: means ± their standard errors.
    ``frame``: of ``measurements.search_frame``. ``chosen``: the λ to mark, of ``measurements.chosen``."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.9))
    lams, seeds = sorted(frame.lambda_.unique()), frame.seed.nunique()
    means, errors = (100 * getattr(frame.groupby("lambda_").accuracy, name)() for name in ("mean", "sem"))
    panels = {"a": "accuracy", "b": "accuracy", "c": "curvature"}
    for axis, (letter, column) in zip(axes, panels.items(), strict=True):
        groups, scale = frame.groupby("lambda_")[column], 100 if column == "accuracy" else 1
        middle = scale * groups.mean()
        axis.errorbar(lams, middle, scale * groups.sem(), fmt="s-", color=METHOD["lcnn"][1], ms=6, capsize=3)
        axis.plot(chosen, middle[chosen], "o", ms=15, mfc="none", mec="black", mew=1.5, ls="", label=f"λ = {chosen:g}")
        first = min([lam for lam in lams if lam > 0], default=1.0)
        axis.set_xscale("symlog", linthresh=first, linscale=0.4)  # linear from 0 to the first λ above it
        axis.set_xticks(lams, [f"{lam:g}" for lam in lams], rotation=90, fontsize=8)
        axis.set(xlabel="λ_β = λ_γ", xlim=(lams[0] - 0.4 * first if lams[0] == 0 else lams[0] / 1.3, 1.3 * lams[-1]))
        axis.set_title(f"({letter}) " + ("C of the loss" if letter == "c" else "on held-out images"), fontsize=10)
    images, over = f"{frame.images.max():.0f} images", f"± s.e. over {seeds} seeds" if seeds > 1 else "one seed"
    axes[0].set(ylabel=f"accuracy (%), {images}, {over}", ylim=(0, 105))
    axes[0].legend(fontsize=8, loc="lower left", title="chosen", title_fontsize=8)
    best = means[means == means.max()].index[-1]
    axes[1].set(ylabel="accuracy (%), near its best", ylim=(means[best] - 4, means[best] + 1))
    if seeds > 1:
        axes[1].axhspan(means[best] - errors[best], means[best] + errors[best], color="black", alpha=0.12, lw=0,
                        label="the best ± its standard error")  # fmt: skip
        axes[1].legend(fontsize=8, loc="lower left")
    axes[2].set(ylabel=f"C (1/pixel unit), {over}", yscale="log")
    label_ticks(axes[2], _ticks(frame.curvature), "y")
    for axis in axes:
        axis.minorticks_off()
    return figure


def signal(frame: pd.DataFrame) -> Figure:
    """The spread of the signal through the net. Columns: net, layer, spread (``measurements.signal_frame``)."""
    figure, axis = plt.subplots(figsize=(6.6, 3.6))
    for (name, part), (colour, marker) in zip(frame.groupby("net", sort=False), ARM, strict=False):
        axis.plot(part.layer, part.spread, color=colour, marker=marker, label=name)
    axis.set(yscale="log", xlabel="activation, from input (0) to output", ylabel="spread of the signal over images")
    axis.legend(fontsize=8)
    return figure


def cost(frame: pd.DataFrame) -> Figure:
    """Time of a step relative to Standard: median and quartiles over rounds. Columns: method, label, ratio."""
    ratios = frame.groupby("method", sort=False).ratio
    parts = [(str(method), ratio.quantile([0.25, 0.5, 0.75]).tolist()) for method, ratio in ratios]
    parts.sort(key=lambda item: -item[1][1])
    figure, axis = plt.subplots(figsize=(7, 3.6))
    for place, (method, (low, middle, high)) in enumerate(parts):
        axis.barh(place, middle, color=METHOD[method][1], edgecolor="black", linewidth=0.5)
        axis.errorbar(middle, place, xerr=np.array([[middle - low], [high - middle]]), color="black", capsize=3)
        axis.text(high + 0.05, place, f"{middle:.2g}×", va="center", fontsize=9)
    axis.set_yticks(range(len(parts)), [METHOD[method][0] for method, _ in parts])
    axis.axvline(1, color="black", linewidth=1, linestyle=":")
    axis.grid(axis="y", visible=False)
    axis.set(xlabel="time of a training step / Standard's (median, quartiles)", xlim=(0, None))
    return figure
