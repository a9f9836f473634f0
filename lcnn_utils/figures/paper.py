"""The figures of notebook 08: ours beside the paper's. Each takes what ``measurements.paper`` made ready."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .style import CYCLE, error_bars, legend_below, log_axis, series

HOLDS = "#dcdcdc"
START = {"beta": 5.0, "gamma": 10.0}  # of the trained β and γ (training.Recipe)


def claims(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """A row per claim: the published number and ours with intervals; grey where the claim holds.
    Left, claims on ratios (log axis); right, claims on differences in points. What was not measured has no mark.
    ``tables``: title → of ``claims``, all with the same claims in the same order."""
    in_points = next(iter(tables.values())).value.str.contains("points")
    rows = max(in_points.sum(), (~in_points).sum())
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 1.2 + 0.62 * rows))
    _claims(left, {title: table[~in_points] for title, table in tables.items()}, log=True)
    _claims(right, {title: table[in_points] for title, table in tables.items()}, log=False)
    left.set_xlabel("times")
    log_axis(left)
    right.set_xlabel("percentage points")
    right.axvline(0, color="0.4", linewidth=0.8)
    legend_below(figure, columns=5)
    return figure


def _claims(axis: Axes, tables: dict[str, pd.DataFrame], log: bool) -> None:
    """One half of :func:`claims`."""
    together = pd.concat(tables.values())[["theirs", "ours", "low", "high"]]
    smallest, largest = together.min().min(), together.max().max()
    margin = 0.08 * (largest - smallest)
    ends = (smallest / 1.3, largest * 1.3) if log else (smallest - margin, largest + margin)
    first = next(iter(tables.values()))
    places = np.arange(len(first))
    low, high = first.low_bound.clip(*ends), first.high_bound.clip(*ends)
    axis.barh(places, high - low, left=low, height=0.84, color=HOLDS, zorder=0, label="where the claim holds")
    for number, (title, table) in enumerate(tables.items()):
        colour, heights = CYCLE[(0, 3, 1)[number]], places + 0.25 * number - 0.2
        axis.plot(
            table.theirs, heights, "D", color=colour, markersize=8, markerfacecolor="white", markeredgewidth=1.5,
            label="published",
        )  # fmt: skip
        errors = error_bars(table.ours, table.low, table.high)
        axis.errorbar(table.ours, heights, xerr=errors, fmt="osv"[number], color=colour, label=title)
    names = [f"{textwrap.fill(claim, 34)}\n({rule})" for claim, rule in zip(first.claim, first.rule, strict=True)]
    axis.set_yticks(places, names)
    axis.tick_params(axis="y", labelsize=8)
    axis.set(xlim=ends, ylim=(len(first) - 0.4, -0.6))
    axis.grid(False, axis="y")


def layers(panels: Mapping[str, pd.DataFrame]) -> Figure:
    """β and γ of each layer after training, from input to output: mean over seeds, bars ± their standard deviation.
    ``panels``: title → of ``measurements.trained_layers``."""
    kinds = {"beta": "β: sharpness", "gamma": "γ: slope limit of BatchNorm"}
    figure, axes = plt.subplots(len(panels), 2, figsize=(9.5, 0.6 + 2.7 * len(panels)), squeeze=False)
    for row, (title, frame) in zip(axes, panels.items(), strict=True):
        for axis, (kind, name) in zip(row, kinds.items(), strict=True):
            values = frame[frame.kind == kind].groupby(["label", "layer"], sort=False).value
            points = values.agg(["mean", "std"]).fillna(0).reset_index()
            points = points.assign(low=points["mean"] - points["std"], high=points["mean"] + points["std"])
            series(axis, points, "layer", "mean", "label")
            axis.axhline(START[kind], color="0.5", linestyle=":", linewidth=1, label="start")
            axis.set(title=title, ylabel=name, ylim=(0, 1.08 * max(START[kind], points.high.max())))
            axis.locator_params(axis="x", integer=True)
    axes[-1, 0].set_xlabel("activation, from input to output")
    axes[-1, 1].set_xlabel("BatchNorm, from input to output")
    legend_below(figure)
    return figure


def train_test(panels: Mapping[str, pd.DataFrame]) -> Figure:
    """Mean curvature of each run on training and on test images: a point per run.
    ``panels``: title → of ``measurements.train_test``."""
    figure, axes = plt.subplots(1, len(panels), figsize=(0.4 + 3.6 * len(panels), 4.1), squeeze=False)
    for axis, (title, frame) in zip(axes[0], panels.items(), strict=True):
        values = frame[["train", "test"]].to_numpy()
        ends = (values.min() / 1.3, values.max() * 1.3)
        axis.plot(ends, ends, ":", color="0.5", linewidth=1, label="equal")
        series(axis, frame, "train", "test", "label", linestyle="none", markersize=8)
        axis.set(title=title, xlim=ends, xlabel="mean C, training images (1/pixel unit)")
        axis.set(ylim=ends, ylabel="mean C, test images (1/pixel unit)")
        log_axis(axis, "x")
        log_axis(axis, "y")
    legend_below(figure)
    return figure
