"""The figures of notebook 05: each takes what ``measurements.training`` measured and returns a Figure."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from .style import (
    CYCLE,
    MARKS,
    accuracy_points,
    legend_below,
    legend_beside,
    log_axis,
    look,
    looks,
    percent,
    series,
    shades,
)

KIND = {"beta": "β: sharpness of the activations", "gamma": "γ: slope limit of the BatchNorms"}
ARM = tuple(zip(CYCLE, MARKS, strict=True))


def training_curves(histories: dict[str, pd.DataFrame]) -> Figure:
    """Loss, training accuracy and curvature, epoch by epoch. ``histories``: method → what ``training.fit`` returns."""
    columns = {"loss": "cross-entropy", "accuracy": "training accuracy", "curvature": "C of the loss (1/pixel unit)"}
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.2))
    for axis, (column, name) in zip(axes, columns.items(), strict=True):
        for method, history in histories.items():
            axis.plot(history.epoch, history[column], **look(method))
        axis.set(xlabel="epoch", ylabel=name)
    axes[0].set_yscale("log")
    percent(axes[1])
    axes[2].set(yscale="log", title="mean of 16 images")
    axes[0].legend()
    return figure


def layers(frame: pd.DataFrame) -> Figure:
    """β and γ of every layer, a line an epoch. Columns: epoch, kind, layer, value (``measurements.layer_frame``)."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    for axis, (kind, title) in zip(axes, KIND.items(), strict=True):
        part = frame[frame.kind == kind]
        series(axis, part, "layer", "value", "epoch", shades(part.epoch), marker="o", markersize=4)
        axis.set(title=title, xlabel="layer, from input (1) to output", ylabel=title[0], xticks=part.layer.unique())
    legend_beside(axes[1], "epoch")
    return figure


def accuracy_against_curvature(frame: pd.DataFrame) -> Figure:
    """Test accuracy against C, of the loss and of the margin: a point a method, mean ± standard deviation over seeds.
    ``frame``: of ``measurements.runs_frame``."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.3), sharey=True)
    for axis, column, name in zip(axes, ("curvature", "margin_curvature"), ("loss", "margin"), strict=True):
        curved = frame[frame[column] > 0]  # a ReLU net's margin is linear almost everywhere
        accuracy_points(axis, curved, column, "method")
        axis.set_xlabel(f"C of the {name} (1/pixel unit), mean")
        log_axis(axis)
    legend_below(figure)
    return figure


def lambdas(frame: pd.DataFrame, layers: pd.DataFrame) -> Figure:
    """What λ does: accuracy and C over seeds (mean ± standard deviation), and the trained β and γ of every layer.
    ``frame``: of ``measurements.runs_frame``, runs that differ in λ. ``layers``: of ``measurements.trained_layers``."""
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.4))
    lams = sorted(frame.lambda_beta.unique())
    place = {lam: index for index, lam in enumerate(lams)}
    runs = frame.groupby("lambda_beta")
    for axis, column in zip(axes, ("accuracy", "curvature"), strict=False):
        mean, deviation = runs[column].mean(), runs[column].std()
        axis.errorbar(mean.index.map(place), mean, deviation, **look("lcnn"))
    axes[0].set(title="(a)", ylabel="test accuracy", ylim=(0, 1.05))
    percent(axes[0])
    axes[1].set(title="(b)", ylabel="C of the loss (1/pixel unit)")
    layers = layers.assign(place=layers.lambda_.map(place))
    for axis, kind, letter in zip(axes[2:], KIND, "cd", strict=True):
        part = layers[layers.kind == kind]
        series(axis, part, "place", "value", "layer", shades(part.layer), marker="o", markersize=3)
        axis.set(title=f"({letter}) dark: first layer, bright: last", ylabel=f"{KIND[kind][0]} of each layer")
    for axis in axes[1:]:
        log_axis(axis, "y")
    for axis in axes:
        axis.set_xticks(range(len(lams)), [f"{lam:g}" for lam in lams], rotation=45)
        axis.set_xlabel("λ_β = λ_γ")
    return figure


def signal(frame: pd.DataFrame) -> Figure:
    """The signal through the net: its standard deviation over images.
    Columns: net, layer, sd (``measurements.signal_frame``)."""
    figure, axis = plt.subplots(figsize=(6.6, 3.6))
    series(axis, frame, "layer", "sd", "net", looks(frame.net.unique()), linestyle="-")
    axis.set(yscale="log", xlabel="activation, from input (0) to output", ylabel="standard deviation over images")
    axis.legend()
    return figure


def cost(panels: Mapping[str, pd.DataFrame]) -> Figure:
    """Time of a step relative to Standard: median and quartiles over rounds. ``panels``: title → steps timed in turn,
    columns method, ratio."""
    count = len(panels)
    figure, axes = plt.subplots(1, count, figsize=(1.5 + 5.5 * count, 3.6), squeeze=False, sharey=True)
    names = list(dict.fromkeys(method for frame in panels.values() for method in frame.method))
    for axis, (title, frame) in zip(axes[0], panels.items(), strict=True):
        for place, method in enumerate(names):
            low, middle, high = frame.ratio[frame.method == method].quantile([0.25, 0.5, 0.75])
            error = [[middle - low], [high - middle]]
            axis.barh(place, middle, color=look(method)["color"], edgecolor="black", linewidth=0.5, xerr=error)
            axis.text(high + 0.05, place, f"{middle:.2g}×", va="center", fontsize=9)
        axis.axvline(1, color="black", linewidth=1, linestyle=":")
        axis.grid(axis="y", visible=False)
        axis.set(title=title, xlabel="time of a training step / Standard's (median, quartiles)", xlim=(0, None))
    axes[0, 0].set_yticks(range(len(names)), [look(method)["label"] for method in names])
    axes[0, 0].invert_yaxis()
    return figure
