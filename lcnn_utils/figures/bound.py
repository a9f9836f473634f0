"""The figures of notebook 03: the bounds against the truth, layer by layer, and what they certify."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.collections import EllipseCollection
from matplotlib.figure import Figure

from .style import CYCLE, class_points, decision_regions, legend_beside, medians, percent

BOUND = {  # column of measurements.audit: (label, colour, line style)
    "local": ("(A) local", CYCLE[0], "-"),
    "data_free": ("(B) data-free", CYCLE[1], "--"),
    "normalised": ("(C) normalised", CYCLE[2], "-."),
}


def audit(frame: pd.DataFrame) -> Figure:
    """How far above the truth each bound lies, and where that on the poster fails. Columns: measurements.audit."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    for column, (label, colour, style) in BOUND.items():
        truth = frame.curvature if column == "normalised" else frame.hessian
        above = (frame[column] / truth)[truth > 1e-12].dropna()
        left.ecdf(above, color=colour, linestyle=style, label=label)
    left.axvline(1, color="0.4", linewidth=1, linestyle=":")
    left.set(xscale="log", xlim=(0.3, 1e6), xlabel="bound / exact value", ylabel="share of the points below")
    left.legend(loc="lower right")
    frame = frame[np.isfinite(frame.curvature) & (frame.kappa > 0)]
    ratio = frame.curvature / frame.published
    holds, fails = ratio <= 1, ratio > 1
    right.loglog(frame.kappa[holds], ratio[holds], ".", color=CYCLE[0], markersize=3, label=f"holds ({holds.sum()})")
    right.loglog(frame.kappa[fails], ratio[fails], "X", color=CYCLE[3], markersize=7, label=f"fails ({fails.sum()})")
    right.axhline(1, color="0.4", linewidth=1, linestyle=":")
    right.axvline(1, color="0.4", linewidth=1, linestyle=":")
    right.set(xlabel="largest alignment factor κ over the layers", ylabel="C / bound printed on the poster")
    right.set(ylim=(1e-4, max(10, 2 * ratio.max())), xlim=(0.5 * frame.kappa.quantile(0.01), 2 * frame.kappa.max()))
    right.legend(title="the poster's bound", loc="upper left")
    return figure


def cancellation(frame: pd.DataFrame) -> Figure:
    """Curvature near a point where slopes cancel. Columns: x and those of measurements.audit."""
    figure, axis = plt.subplots(figsize=(5.8, 3.6))
    axis.loglog(frame.x, frame.curvature, "-", color="k", label="C, exact")
    axis.loglog(frame.x, frame.normalised, "-.", color=CYCLE[2], label="(C), with its κ")
    axis.loglog(frame.x, frame.published, "--", color=CYCLE[3], label="on the poster: Σ β Π‖W‖")
    axis.loglog(frame.x, frame.published_widths, ":", color=CYCLE[3], label="… times the number of units")
    axis.set(xlabel="distance x from the point of cancellation", ylabel="normalised curvature C (1/unit of x)")
    axis.set_ylim(bottom=frame.published.min() / 100)
    axis.legend()
    return figure


def depth(frame: pd.DataFrame) -> Figure:
    """Growth of bounds and truth with depth. Columns: depth, seed, quantity, value (1/unit of x²)."""
    figure, axis = plt.subplots(figsize=(5.8, 3.6))
    medians(axis, frame, "depth", "value", "quantity")
    axis.set(yscale="log", xlabel="number of hidden layers", ylabel="‖∇²f‖₂ or its bound (1/unit of x²)")
    axis.set_xticks(sorted(frame.depth.unique()))
    axis.legend(title=f"median, middle 80 % of {frame.seed.nunique()} nets")
    return figure


def waterfall(frame: pd.DataFrame) -> Figure:
    """How the layers build up the bound. Columns: net and those of bounds.layer_terms (B)."""
    nets = frame.net.unique()
    figure, axes = plt.subplots(2, len(nets), figsize=(4.9 * len(nets), 5.2), sharex="col", squeeze=False)
    for (top, bottom), net in zip(axes.T, nets, strict=True):
        part = frame[(frame.net == net) & frame.beta.notna()]
        number = range(1, len(part) + 1)
        share = part.contribution / part.contribution.sum()
        top.bar(number, share, bottom=share.cumsum() - share, color=CYCLE[1], width=0.7)
        top.step(number, share.cumsum(), where="mid", color="0.4", linewidth=1)
        top.set(title=f"{net}: K = {part.contribution.sum():.3g}")
        top.set(ylabel="share of the bound, added up", ylim=(0, 1.02))
        reach = part.contribution / (part.beta / 4 * part.before**2)
        bottom.semilogy(number, part.before, "o-", color=CYCLE[0], label="slope x → uᵢ, squared in (B)")
        bottom.semilogy(number, part.beta, "s--", color=CYCLE[1], label="βᵢ")
        bottom.semilogy(number, reach, "^:", color=CYCLE[2], label="reach zᵢ → f")
        bottom.set(xticks=number, xlabel="activation, from input to output", ylabel="its factors")
    axes[1, 0].legend()
    return figure


def robust_accuracy(frame: pd.DataFrame, colours: dict[str, tuple[str, str]]) -> Figure:
    """Certified accuracy (below) and accuracy under PGD (above), the truth between them.
    ``frame``: columns net, seed, eps, certified, attacked (shares). ``colours``: (colour, marker) of each net."""
    figure, axis = plt.subplots(figsize=(7.4, 4.0))
    for net, (colour, marker) in colours.items():
        groups = frame[frame.net == net].groupby("eps")
        for column, style, label in (("certified", "-", net), ("attacked", "--", None)):
            mean, deviation = groups[column].mean(), groups[column].std()
            axis.errorbar(mean.index, mean, deviation, color=colour, marker=marker, linestyle=style, label=label)
    axis.plot([], [], "-", color="0.3", label="certified: at least")
    axis.plot([], [], "--", color="0.3", label="left by PGD: at most")
    axis.set(xlabel="length of the step ε (L2, pixel units)", ylabel="correct test images", ylim=(-0.03, 1.03))
    percent(axis)
    seeds = frame.seed.nunique() if "seed" in frame else 1
    axis.set_title(f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "1 seed")
    legend_beside(axis)
    return figure


def moons_balls(frame: pd.DataFrame, fields: pd.DataFrame, titles: Sequence[str]) -> Figure:
    """Certified balls on two moons and the steps PGD found, a panel a net; frames of ``measurements.moons_balls``."""
    nets = frame.net.unique()
    figure, axes = plt.subplots(1, len(nets), figsize=(5 * len(nets), 4.2), sharex=True, sharey=True, squeeze=False)
    for axis, net, title in zip(axes[0], nets, titles, strict=True):
        decision_regions(axis, fields[fields.net == net])
        part = frame[frame.net == net].replace(np.inf, np.nan)  # an infinite ball can't be drawn
        diameter = 2 * part.certified
        balls = EllipseCollection(
            diameter, diameter, np.zeros(len(part)), units="xy", offsets=part[["x1", "x2"]],
            transOffset=axis.transData, facecolors="none", edgecolors="k", linewidths=0.8,
        )  # fmt: skip
        axis.add_collection(balls)
        axis.plot(part[["x1", "found1"]].T, part[["x2", "found2"]].T, "-", color=CYCLE[3], linewidth=0.7)
        axis.plot(part.found1, part.found2, "X", color=CYCLE[3], markersize=4, label="PGD's nearest success")
        class_points(axis, part, markersize=4, markeredgecolor="k", markeredgewidth=0.5)
        axis.set(title=title, xlabel="x₁", aspect="equal")
    axes[0, 0].plot([], [], "o", markerfacecolor="none", markeredgecolor="k", markersize=9, label="certified ball")
    axes[0, 0].set_ylabel("x₂")
    axes[0, 0].legend(loc="upper right")
    return figure
