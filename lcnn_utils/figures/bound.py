"""Figures of notebook 03: the bounds against the truth, layer by layer, and what they certify."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.collections import EllipseCollection
from matplotlib.figure import Figure

from .style import BESIDE, CLASS_COLOURS, CYCLE

BOUND = {  # column of measurements.audit: (label, colour, line style)
    "local": ("(A) local", CYCLE[0], "-"),
    "data_free": ("(B) data-free", CYCLE[1], "--"),
    "normalised": ("(C) normalised", CYCLE[2], "-."),
}


def audit(frame: pd.DataFrame) -> Figure:
    """How far above the truth each bound lies, and where the published one fails. Columns: measurements.audit."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    for column, (label, colour, style) in BOUND.items():
        truth = frame.curvature if column == "normalised" else frame.hessian
        above = np.sort((frame[column] / truth)[truth > 1e-12].dropna())
        left.plot(above, np.arange(1, len(above) + 1) / len(above), style, color=colour, label=label)
    left.axvline(1, color="0.4", linewidth=1, linestyle=":")
    left.set(xscale="log", xlim=(0.3, 1e6), xlabel="bound / exact value", ylabel="share of the points below")
    left.legend(fontsize=8, loc="lower right")
    frame = frame[np.isfinite(frame.curvature) & (frame.kappa > 0)]
    ratio = frame.curvature / frame.published
    for wrong, colour, marker, label in ((False, CYCLE[0], ".", "holds"), (True, CYCLE[3], "X", "fails")):
        part = (ratio > 1) == wrong
        size, label = (7 if wrong else 3), f"{label} ({part.sum()})"
        right.loglog(frame.kappa[part], ratio[part], marker, color=colour, ms=size, label=label)
    for line in (right.axhline, right.axvline):
        line(1, color="0.4", linewidth=1, linestyle=":")
    right.set(ylim=(1e-4, max(10, 2 * ratio.max())), xlim=(0.5 * frame.kappa.quantile(0.01), 2 * frame.kappa.max()))
    right.set(xlabel="largest alignment factor κ over the layers", ylabel="C / published bound")
    right.legend(fontsize=8, title="published bound", title_fontsize=8, loc="upper left")
    return figure


def cancellation(frame: pd.DataFrame) -> Figure:
    """Curvature near a point where slopes cancel. Columns: x and those of measurements.audit."""
    figure, axis = plt.subplots(figsize=(5.8, 3.6))
    axis.loglog(frame.x, frame.curvature, "-", color="k", label="C, exact")
    axis.loglog(frame.x, frame.normalised, "-.", color=CYCLE[2], label="(C), with its κ")
    axis.loglog(frame.x, frame.published, "--", color=CYCLE[3], label="published: Σ β Π‖W‖")
    axis.loglog(frame.x, frame.published_widths, ":", color=CYCLE[3], label="… times the number of units")
    axis.set(xlabel="distance x from the point of cancellation", ylabel="normalised curvature C (1/unit of x)")
    axis.set_ylim(bottom=frame.published.min() / 100)
    axis.legend(fontsize=8)
    return figure


def depth(frame: pd.DataFrame) -> Figure:
    """Growth of bounds and truth with depth. Columns: depth, seed, quantity, value."""
    figure, axis = plt.subplots(figsize=(5.8, 3.6))
    for (quantity, part), colour, style in zip(
        frame.groupby("quantity", sort=False), ("k", CYCLE[0], CYCLE[1]), ("o-", "s-.", "^--"), strict=True
    ):
        stats = part.groupby("depth").value.quantile(np.array([0.1, 0.5, 0.9])).unstack()
        axis.semilogy(stats.index, stats[0.5], style, color=colour, label=str(quantity))
        axis.fill_between(stats.index, stats[0.1], stats[0.9], color=colour, alpha=0.15, linewidth=0)
    axis.set(xlabel="number of hidden layers", ylabel="‖∇²f‖₂ or its bound")
    axis.set_xticks(sorted(frame.depth.unique()))
    axis.legend(fontsize=8, title=f"median, middle 80 % of {frame.seed.nunique()} nets", title_fontsize=8)
    return figure


def _number(value: float) -> str:
    """220 or 1.8·10⁵, for titles."""
    if value < 1e4:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"${mantissa}\\cdot 10^{{{int(exponent)}}}$"


def waterfall(frame: pd.DataFrame) -> Figure:
    """How the layers build up the bound. Columns: net and those of bounds.layer_terms (B)."""
    nets = list(frame.net.unique())
    figure, axes = plt.subplots(2, len(nets), figsize=(4.9 * len(nets), 5.2), sharex="col", squeeze=False)
    for (top, bottom), net in zip(axes.T, nets, strict=True):
        part = frame[(frame.net == net) & frame.beta.notna()]
        share = part.contribution / part.contribution.sum()
        at = range(1, len(part) + 1)
        top.bar(at, share, bottom=share.cumsum() - share, color=CYCLE[1], width=0.7)
        top.step(at, share.cumsum(), where="mid", color="0.4", linewidth=1)
        top.set(title=f"{net}: K = {_number(part.contribution.sum())}", ylim=(0, 1.02))
        bottom.semilogy(at, part.before, "o-", color=CYCLE[0], label="slope x → uᵢ, squared in (B)")
        bottom.semilogy(at, part.beta, "s--", color=CYCLE[1], label="βᵢ")
        rest = part.contribution / (part.beta / 4 * part.before**2)
        bottom.semilogy(at, rest, "^:", color=CYCLE[2], label="reach zᵢ → f")
        bottom.set_xticks(at)
        bottom.set_xlabel("activation, from input to output")
    axes[0, 0].set_ylabel("share of the bound, added up")
    axes[1, 0].set_ylabel("its factors")
    axes[1, 0].legend(fontsize=8)
    return figure


def loss_parts(frame: pd.DataFrame) -> Figure:
    """Where the Hessian of the loss comes from. Columns: net, total, softmax, activations (norms, a row a sample)."""
    figure, axis = plt.subplots(figsize=(8.4, 3.6))
    parts = {"total": "whole ‖∇²ℓ‖", "softmax": "softmax's own part", "activations": "activations' part"}
    nets = list(frame.net.unique())
    for i, (column, label) in enumerate(parts.items()):
        stats = frame.groupby("net", sort=False)[column].quantile(np.array([0.1, 0.5, 0.9])).unstack()
        spread = np.abs(stats[[0.1, 0.9]].to_numpy().T - stats[0.5].to_numpy())
        at = np.arange(len(nets)) + 0.25 * (i - 1)
        colour, marker = (("k", "o"), (CYCLE[0], "s"), (CYCLE[1], "^"))[i]
        axis.errorbar(at, stats[0.5], spread, linestyle="none", marker=marker, color=colour, label=label, capsize=3)
    axis.set_xticks(range(len(nets)), [net.replace(", ", ",\n") for net in nets], fontsize=9)
    axis.set(yscale="log", ylabel="norm (loss per pixel unit²)")
    axis.legend(title="median, middle 80 % of images", **BESIDE)
    return figure


def robust_accuracy(frame: pd.DataFrame, colours: dict[str, tuple[str, str]]) -> Figure:
    """Certified accuracy (below) and accuracy under PGD (above), the truth between them.
    ``frame``: columns net, seed, eps, certified, attacked (shares). ``colours``: (colour, marker) of each net."""
    figure, axis = plt.subplots(figsize=(7.4, 4.0))
    for net, (colour, marker) in colours.items():
        part = frame[frame.net == net]
        for column, style in (("certified", "-"), ("attacked", "--")):
            stats = 100 * part.groupby("eps")[column].agg(["mean", "std"]).fillna(0)
            axis.errorbar(
                stats.index, stats["mean"], stats["std"], linestyle=style, marker=marker, ms=4, color=colour, capsize=2,
                label=net if column == "certified" else None,
            )  # fmt: skip
    for style, label in (("-", "certified: at least"), ("--", "left by PGD: at most")):
        axis.plot([], [], style, color="0.3", label=label)
    axis.set(xlabel="length of the step ε (L2, pixel units)", ylabel="correct test images (%)", ylim=(-2, 102))
    seeds = frame.seed.nunique() if "seed" in frame else 1
    axis.set_title(f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "1 seed", fontsize=9)
    axis.legend(**BESIDE)
    return figure


def radii(frame: pd.DataFrame, colours: dict[str, tuple[str, str]]) -> Figure:
    """Certified radius of each image against PGD's smallest step. Columns: net, certified, attacked."""
    figure, axis = plt.subplots(figsize=(5.2, 4.2))
    shown = frame[(frame.certified > 0) & np.isfinite(frame.attacked)]
    for net, (colour, marker) in colours.items():
        part = shown[shown.net == net]
        axis.loglog(part.attacked, part.certified, marker, ms=3, alpha=0.6, color=colour, label=net)
    ends = np.array([shown.certified.min() / 1.5, shown.attacked.max() * 1.3] if len(shown) else [1e-3, 1])
    axis.fill_between(ends, ends, ends[1], color="0.85", linewidth=0)
    axis.plot(ends, ends, color="0.3", linewidth=1)
    axis.annotate("an attack inside\na certified ball", (ends[0] * 1.2, ends[1] / 1.3), fontsize=8, va="top")
    axis.set(xlim=ends, xlabel="PGD's smallest successful step (L2, pixel units)")
    axis.set(ylim=ends, ylabel="certified radius (L2, pixel units)")
    axis.legend(fontsize=8, loc="lower right")
    return figure


def moons_balls(frame: pd.DataFrame, fields: pd.DataFrame, titles: Sequence[str]) -> Figure:
    """Certified balls on two moons and the steps PGD found, a panel a net; frames of ``measurements.moons_balls``."""
    nets = list(frame.net.unique())
    figure, axes = plt.subplots(1, len(nets), figsize=(5 * len(nets), 4.2), sharex=True, sharey=True, squeeze=False)
    for axis, net, title in zip(axes[0], nets, titles, strict=True):
        margin = fields[fields.net == net].pivot(index="x2", columns="x1", values="margin")
        axis.contourf(margin.columns, margin.index, margin, [-1e9, 0, 1e9], colors=CLASS_COLOURS, alpha=0.2)
        part = frame[frame.net == net].replace(np.inf, np.nan)  # an infinite ball can't be drawn
        balls = EllipseCollection(
            2 * part.certified, 2 * part.certified, np.zeros(len(part)), units="xy", offsets=part[["x1", "x2"]],
            transOffset=axis.transData, facecolors="none", edgecolors="k", linewidths=0.8,
        )  # fmt: skip
        axis.add_collection(balls)
        axis.plot(part[["x1", "found1"]].T, part[["x2", "found2"]].T, "-", color=CYCLE[3], linewidth=0.7)
        axis.plot(part.found1, part.found2, "X", color=CYCLE[3], ms=4, label="PGD's nearest success")
        for label, colour, marker in zip((0, 1), CLASS_COLOURS, "o^", strict=True):
            cloud = part[part.label == label]
            axis.plot(cloud.x1, cloud.x2, marker, color=colour, mec="k", mew=0.5, ms=4, label=f"class {label}")
        axis.set(title=title, xlabel="x₁", aspect="equal")
        axis.grid(False)
    axes[0, 0].plot([], [], "o", mfc="none", mec="k", ms=9, label="certified ball")
    axes[0, 0].set_ylabel("x₂")
    axes[0, 0].legend(fontsize=8, loc="upper right")
    return figure


def layer_knobs(frame: pd.DataFrame) -> Figure:
    """Bound, truth and accuracy when one layer's β or slope is changed, the rest as trained.
    Columns: knob, layer, value, bound, local, truth, accuracy, trained (the knob's trained value). A row a layer, then
    one for accuracy; a column a knob."""
    layers, knobs = list(frame.layer.unique()), list(frame.knob.unique())
    rows, columns = len(layers) + 1, len(knobs)
    size = (4.6 * columns, 2.4 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, sharex="col", sharey="row", squeeze=False)
    lines = {"bound": ("(B), at every x", CYCLE[1], "^--"), "local": ("(A), its largest", CYCLE[0], "s-."),
             "truth": ("largest ‖∇²m‖ of the points", "k", "o-")}  # fmt: skip
    for number, (row, layer) in enumerate(zip(axes, layers, strict=False), 1):
        for axis, last, knob in zip(row, axes[-1], knobs, strict=True):
            part = frame[(frame.layer == layer) & (frame.knob == knob)]
            for column, (label, colour, style) in lines.items():
                axis.loglog(part.value, part[column], style, color=colour, label=label, ms=4)
            axis.axvline(part.trained.iloc[0], color="0.4", linewidth=1, linestyle=":", label="as trained")
            axis.set_title(f"activation {number}", fontsize=9)
            colour, style = (CYCLE[3], CYCLE[4], CYCLE[2])[number % 3], ("o-", "s--", "^-.")[number % 3]
            last.semilogx(part.value, 100 * part.accuracy, style, color=colour, ms=4, label=f"activation {number}")
        row[0].set_ylabel("(1/unit of x²)")
    for axis, knob in zip(axes[-1], knobs, strict=True):
        axis.set(xlabel=knob, ylim=(40, 102))
    axes[-1, 0].set_ylabel("accuracy (%)")
    axes[0, 0].legend(fontsize=7)
    axes[-1, 0].legend(fontsize=8, loc="lower center")
    return figure
