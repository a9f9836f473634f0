"""The figures of notebook 08: ours beside the paper's. Each takes what ``measurements.paper`` made ready."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .style import CYCLE, MARKERS, PALETTE, label_ticks

HOLDS = "#dcdcdc"
START = {"beta": 5.0, "gamma": 10.0}  # of the trained β and γ (training.Recipe)


def claims(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """A row a claim: the published number and ours with intervals; grey where the claim holds.
    Left, claims on ratios (log axis); right, claims on differences in points. What was not measured has no mark.
    ``tables``: title → of ``claims``, all with the same claims in the same order."""
    first = next(iter(tables.values()))
    panels = [("times", True), ("points", False)]
    rows = {unit: first.index[first.value.str.contains("points") == (unit == "points")] for unit, _ in panels}
    heights = 1.2 + 0.62 * max(len(index) for index in rows.values())
    figure, axes = plt.subplots(1, 2, figsize=(13, heights))
    for axis, (unit, log) in zip(axes, panels, strict=True):
        index = rows[unit]
        ends = _span(axis, [table.loc[index] for table in tables.values()], log)
        lines = list[Any](first.loc[index].itertuples())
        for at, row in enumerate(lines):
            low, high = max(row.low_bound, ends[0]), min(row.high_bound, ends[1])
            axis.add_patch(Rectangle((low, at - 0.42), high - low, 0.84, color=HOLDS, lw=0, zorder=0))
        for number, (title, table) in enumerate(tables.items()):
            part = table.loc[index]
            errors = np.array([part.ours - part.low, part.high - part.ours]).clip(0)
            places, colour = np.arange(len(index)) - 0.2 + 0.25 * number, CYCLE[(0, 3, 1, 2)[number]]
            published = None if number else "published"
            axis.plot(part.theirs, places, "D", mfc="white", mec=colour, ms=8, mew=1.5, label=published)
            axis.errorbar(part.ours, places, xerr=errors, fmt="osv^"[number], color=colour, ms=6,
                          capsize=3, label=title)  # fmt: skip
        axis.set_yticks(range(len(index)), [f"{row.claim}\n({row.rule})" for row in lines])
        axis.tick_params(axis="y", labelsize=8)
        axis.set_ylim(len(index) - 0.4, -0.6)
        axis.grid(False, axis="y")
        axis.set_xlabel("times" if log else "percentage points")
    handles, labels = axes[0].get_legend_handles_labels()
    handles.append(Rectangle((0, 0), 1, 1, color=HOLDS))
    figure.legend(handles, [*labels, "where the claim holds"], loc="outside lower center", ncols=5, fontsize=8)
    return figure


def _span(axis: Axes, parts: list[pd.DataFrame], log: bool) -> tuple[float, float]:
    values = np.concatenate([part[["theirs", "ours", "low", "high"]].to_numpy(float).ravel() for part in parts])
    values = values[np.isfinite(values)]
    if log:
        axis.set_xscale("log")
        ends = values.min() / 1.3, values.max() * 1.3
    else:
        margin = 0.08 * np.ptp(values)
        ends = values.min() - margin, values.max() + margin
        axis.axvline(0, color="0.4", lw=0.8)
    axis.set_xlim(*ends)
    if log:
        label_ticks(axis, [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if ends[0] < t < ends[1]])
    return ends


def cost(panels: Mapping[str, pd.DataFrame]) -> Figure:
    """Seconds of an epoch over Standard's: a point a run, on a log axis, the median seconds written beside.
    ``panels``: title → of ``measurements.cost_frame``."""
    names = list(dict.fromkeys(label for frame in panels.values() for label in frame.label))
    figure, axes = plt.subplots(1, len(panels), figsize=(1.5 + 4.2 * len(panels), 3.6), squeeze=False, sharey=True)
    for axis, (title, frame) in zip(axes[0], panels.items(), strict=True):
        for label, part in frame.groupby("label", sort=False):
            at = names.index(str(label))
            axis.plot(part.ratio, [at] * len(part), MARKERS[str(label)], color=PALETTE[str(label)], ms=8)
            axis.annotate(f"{part.seconds.median():.3g} s", (part.ratio.max(), at), (9, 0), textcoords="offset points",
                          va="center", fontsize=8)  # fmt: skip
        axis.set(title=title, xscale="log", xlabel="time of an epoch / Standard's")
        low, high = frame.ratio.min() / 1.2, frame.ratio.max() * 1.7
        axis.set_xlim(low, high)
        label_ticks(axis, [t for t in (0.25, 0.5, 1, 2, 4, 8, 16) if low < t < high])
    axes[0, 0].set_yticks(range(len(names)), names)
    axes[0, 0].invert_yaxis()
    return figure


def layers(panels: Mapping[str, pd.DataFrame]) -> Figure:
    """β and γ of each layer after training, from input to output: mean over seeds, bars ± their standard deviation.
    ``panels``: title → of ``measurements.trained_layers``."""
    kinds = {"beta": "β: sharpness", "gamma": "γ: slope limit of BatchNorm"}
    figure, axes = plt.subplots(len(panels), 2, figsize=(9.5, 0.6 + 2.7 * len(panels)), squeeze=False)
    for line, (title, frame) in zip(axes, panels.items(), strict=True):
        for axis, (kind, name) in zip(line, kinds.items(), strict=True):
            tops = [START[kind]]
            for label, part in frame[frame.kind == kind].groupby("label", sort=False):
                over = part.groupby("layer").value.agg(["mean", "std"])
                style = dict(color=PALETTE[str(label)], marker=MARKERS[str(label)], ms=5, capsize=2, label=label)
                axis.errorbar(over.index, over["mean"], over["std"].fillna(0), **style)
                tops.append((over["mean"] + over["std"].fillna(0)).max())
            axis.set(title=title, ylabel=name)
            axis.set_ylim(0, 1.08 * max(tops))
            axis.locator_params(axis="x", integer=True)
    for line in axes:
        for axis, start in zip(line, START.values(), strict=True):
            axis.axhline(start, color="0.5", ls=":", lw=1)
    for axis, what in zip(axes[-1], ("activation", "BatchNorm"), strict=True):
        axis.set_xlabel(f"{what}, from input to output")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    handles.append(plt.Line2D([], [], color="0.5", ls=":", lw=1))
    figure.legend(handles, [*labels, "start"], loc="outside lower center", ncols=4, fontsize=8)
    return figure


def train_test(panels: Mapping[str, pd.DataFrame]) -> Figure:
    """Mean curvature of each run on training and on test images: a point a run.
    ``panels``: title → of ``measurements.train_test``."""
    figure, axes = plt.subplots(1, len(panels), figsize=(0.4 + 4.3 * len(panels), 4.4), squeeze=False)
    for axis, (title, frame) in zip(axes[0], panels.items(), strict=True):
        values = frame[["train", "test"]].to_numpy()
        ends = values.min() / 1.3, values.max() * 1.3
        axis.loglog(ends, ends, ":", color="0.5", lw=1, label="equal")
        for label, part in frame.groupby("label", sort=False):
            axis.loglog(part.train, part.test, MARKERS[str(label)], color=PALETTE[str(label)], ms=8, label=label)
        ticks = [t for t in (1, 2, 5, 10, 20, 50, 100, 200, 500) if ends[0] < t < ends[1]]
        for which in "xy":
            label_ticks(axis, ticks, which)
        axis.set(title=title, xlim=ends, ylim=ends, xlabel="mean C, training images", ylabel="mean C, test images")
    handles = dict(zip(*reversed(axes[0, 0].get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8)
    return figure
