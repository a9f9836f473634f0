"""The figures of notebook 04: each takes what ``measurements.lipschitz`` measured and returns a Figure."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor

from .style import BESIDE, CYCLE, METHOD, label_ticks

ESTIMATE = {  # of a norm: (label, line style and marker, colour)
    "scaled": ("reshaped kernel × √windows", "^:", CYCLE[4]),
    "bound": ("certified bound", "s-", CYCLE[2]),
    "power": ("power iteration, 15 steps", "o--", CYCLE[0]),
    "reshaped": ("reshaped kernel (torch's spectral_norm)", "X-.", CYCLE[3]),
}
RULE = {"BatchNorm": ("o", "0.35"), "published": ("v", CYCLE[4]), "per channel (ours)": ("s", CYCLE[2])}
BLOCK = {"sum": ("o-", CYCLE[0]), "average": ("s--", CYCLE[3]), "average + γ-BatchNorm": ("^-.", CYCLE[2])}


def matrices(kernel: Tensor, of_stride: dict[int, Tensor]) -> Figure:
    """A kernel (k, k) and the matrices, by stride, of its convolution: entries as colours, 0 in white."""
    figure, axes = plt.subplots(1, 1 + len(of_stride), figsize=(10, 3.9), width_ratios=(2, *[4] * len(of_stride)))
    top = float(kernel.abs().max())
    shown = {"kernel": kernel} | {f"stride {s}: {len(m)} × {m.shape[1]}": m for s, m in of_stride.items()}
    for axis, (title, values) in zip(axes, shown.items(), strict=True):
        image = axis.imshow(values.numpy(), "RdBu_r", vmin=-top, vmax=top, interpolation="nearest")
        axis.set(title=title, xlabel="input pixel", ylabel="output pixel")
        axis.grid(False)
    for (row, column), value in [((r, c), float(kernel[r, c])) for r in range(len(kernel)) for c in range(len(kernel))]:
        axes[0].text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8,
                     color="white" if abs(value) > 0.6 * top else "black")  # fmt: skip
    axes[0].set(xlabel="", ylabel="", xticks=[], yticks=[])
    figure.colorbar(image, ax=axes, label="weight", shrink=0.8, pad=0.01)
    return figure


def norms(frame: pd.DataFrame) -> Figure:
    """The norm against the image size, and estimates relative to it.
    ``frame``: columns stride, size, kernel, estimate (of ESTIMATE), true, ratio."""
    strides, sizes = sorted(frame.stride.unique()), sorted(frame["size"].unique())
    figure, axes = plt.subplots(1, 1 + len(strides), figsize=(3.9 * (1 + len(strides)), 3.9))
    for stride, style, colour, shift in zip(strides, ("o-", "s--"), CYCLE, (0.96, 1.04), strict=False):
        part = frame[(frame.stride == stride) & (frame.estimate == "bound")].groupby("size").true
        spread = [part.mean() - part.min(), part.max() - part.mean()]
        places = [size * shift for size in sizes]
        axes[0].errorbar(places, part.mean(), spread, fmt=style, color=colour, capsize=3, label=f"stride {stride}")
    axes[0].set(title="true norm ‖A‖₂", ylabel="largest ‖Ax‖₂ / ‖x‖₂", ylim=(0, None))
    for axis, stride in zip(axes[1:], strides, strict=True):
        for name, (label, style, colour) in ESTIMATE.items():
            ratio = frame[(frame.stride == stride) & (frame.estimate == name)].groupby("size").ratio
            spread = [ratio.mean() - ratio.min(), ratio.max() - ratio.mean()]
            axis.errorbar(sizes, ratio.mean(), spread, fmt=style, color=colour, ms=8, elinewidth=1, label=label)
        axis.axhline(1, color="black", linewidth=1)
        axis.set(title=f"stride {stride}", ylim=(0.4, 2.5))
    axes[1].set_ylabel("estimate / true norm")
    for axis in axes:
        axis.set(xscale="log", xlabel="side of the image (pixels)")
        label_ticks(axis, sizes)
    title = f"mean, and range of {frame.kernel.nunique()} kernels"
    axes[0].legend(fontsize=8, loc="lower left", title=title, title_fontsize=8)
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return figure


def power(frame: pd.DataFrame) -> Figure:
    """How far power iteration is below the norm. Columns: kernel, iterations, ratio."""
    figure, axis = plt.subplots(figsize=(6.2, 3.6))
    error = (1 - frame.pivot(index="iterations", columns="kernel", values="ratio")).clip(lower=1e-6)
    axis.plot(error, color="0.8", linewidth=0.5)
    axis.plot(error.median(axis=1), "o-", color=CYCLE[0], label=f"median of {error.shape[1]} random kernels")
    axis.plot(error.max(axis=1), "X--", color=CYCLE[3], label="worst of them")
    axis.axhline(0.01, color="black", linewidth=1, linestyle=":", label="1 %")
    axis.set(xscale="log", yscale="log", ylim=(1e-5, 1), xlabel="power iterations", ylabel="1 − estimate / true norm")
    axis.set_xticks([1, 3, 10, 30, 100], ["1", "3", "10", "30", "100"])
    axis.legend(fontsize=8, loc="lower left")
    return figure


def training_norms(frame: pd.DataFrame, fresh: float) -> Figure:
    """Error of the running σ while training.
    ``frame``: columns step, layer, error. ``fresh``: the classifier's error after one step from a random start."""
    figure, axis = plt.subplots(figsize=(6.6, 3.6))
    error = frame.pivot(index="step", columns="layer", values="error")
    axis.plot(error, color="0.8", linewidth=0.5)
    axis.plot(error.median(axis=1), "o-", ms=4, color=CYCLE[0], label=f"median of {error.shape[1]} layers")
    axis.plot(error.max(axis=1), "X--", ms=5, color=CYCLE[3], label="worst layer")
    axis.axhline(fresh, color="black", linewidth=1, linestyle=":", label="the classifier, from a random start")
    axis.set(yscale="log", ylim=(1e-5, 2), xlabel="training step", ylabel="1 − σ / true norm")
    axis.legend(fontsize=8, loc="lower left")
    return figure


def spectra(frame: pd.DataFrame) -> Figure:
    """Singular values of every layer, a row an operator, a column a method, a colour a block.
    ``frame``: columns method, layer, operator, share, value."""
    methods, operators, layers = (list(frame[column].unique()) for column in ("method", "operator", "layer"))
    block = lambda layer: " ".join(layer.split()[:2])
    blocks, shades = list(dict.fromkeys(map(block, layers))), (*CYCLE[:4], *CYCLE[5:])  # the fifth is near the fourth
    rows, columns = len(operators), len(methods)
    figure, axes = plt.subplots(rows, columns, figsize=(8.8, 4.8), sharex=True, sharey=True, squeeze=False)
    for row, operator in zip(axes, operators, strict=True):
        for axis, method in zip(row, methods, strict=True):
            for layer in layers:
                part = frame[(frame.method == method) & (frame.operator == operator) & (frame.layer == layer)]
                style = ":" if "shortcut" in layer else "--" if layer.endswith("2") else "-"
                colour = shades[blocks.index(block(layer)) % len(shades)]
                axis.plot(part.share, part.value, style, color=colour, label=layer)
            axis.axhline(1, color="black", linewidth=0.8)
            axis.set(yscale="log", ylim=(0.02, 25), title=f"{METHOD[method][0]}: {operator}")
        row[0].set_ylabel("singular value")
    for axis in axes[-1]:
        axis.set_xlabel("share of the singular values at least as large")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return figure


def clips(frame: pd.DataFrame, gamma: float) -> Figure:
    """Slopes of a BatchNorm's channels under three rules. Columns: rule, channel, slope."""
    figure, axis = plt.subplots(figsize=(6.2, 3.4))
    for shift, (rule, (marker, colour)) in zip((-0.15, 0, 0.15), RULE.items(), strict=True):
        part = frame[frame.rule == rule]
        axis.plot(part.channel + shift, part.slope, marker, color=colour, label=rule, ms=7)
    axis.axhline(gamma, color="black", linewidth=1, linestyle="--", label=f"γ = {gamma:g}")
    axis.set(yscale="log", xlabel="channel c", ylabel="slope (output / input)")
    axis.set_xticks(sorted(frame.channel.unique()))
    axis.legend(**BESIDE)
    return figure


def slopes(frame: pd.DataFrame) -> Figure:
    """1/σ of every channel of every BatchNorm. Columns: method, layer, slope, gamma (nan where there is none)."""
    layers = list(frame.layer.unique())
    figure, axis = plt.subplots(figsize=(9, 3.6))
    for shift, method in zip((-0.18, 0.18), frame.method.unique(), strict=False):
        label, colour, marker = METHOD[str(method)]
        part = frame[frame.method == method]
        place = part.layer.map(layers.index) + shift
        axis.plot(place, part.slope, marker, color=colour, ms=4, alpha=0.6, markeredgewidth=0, label=label)
        limit = part.gamma.groupby(place).first().dropna()
        axis.plot(limit, "_", color="black", ms=16, mew=2, label=f"γ of the {label}" if len(limit) else "_")
    axis.set(yscale="log", ylabel="1/σ of a channel")
    axis.set_yticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    axis.set_xticks(range(len(layers)), layers, rotation=35, ha="right", fontsize=8)
    axis.legend(**BESIDE)
    return figure


def gamma(frame: pd.DataFrame) -> Figure:
    """Accuracy, curvature and slope of nets against γ, the first kind of statistics in full lines.
    ``frame``: columns method, statistics, gamma, accuracy, curvature, grad_norm; of a task with ten classes."""
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.5))
    panels = {"accuracy": "test accuracy (%)", "curvature": "median C of the margin\n(1/pixel unit)"}
    panels |= {"grad_norm": "median ‖∇f‖ of the margin\n(1/pixel unit)"}
    for (method, statistics), part in frame.groupby(["method", "statistics"], sort=False):
        label, colour, marker = METHOD[str(method)]
        points = part.groupby("gamma").first()
        solid = statistics == frame.statistics.iloc[0]
        style = dict(color=colour, ms=5, mfc=colour if solid else "white", label=f"{label}, statistics {statistics}")
        for axis, column in zip(axes, panels, strict=True):
            values = points[column] * (100 if column == "accuracy" else 1)
            axis.plot(points.index, values, marker + ("-" if solid else "--"), **style)
    for axis, title in zip(axes, panels.values(), strict=True):
        axis.set(xscale="log", xlabel="γ: largest slope of each BatchNorm", ylabel=title)
        label_ticks(axis, [1, 2, 5, 10, 20])
        axis.set_xlim(points.index.min() / 1.15, points.index.max() * 1.15)
    axes[0].axhline(10, color="black", linewidth=1, linestyle=":")
    axes[0].annotate("chance: 10 %", (points.index.max(), 11), ha="right", va="bottom", fontsize=8)
    for axis in axes[1:]:
        axis.set_yscale("log")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return figure


def residual(frame: pd.DataFrame) -> Figure:
    """Slope and signal of stacks of residual blocks. Columns: block (of BLOCK), seed, blocks, slope, signal, bound."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for block, (style, colour) in BLOCK.items():
        part = frame[frame.block == block].groupby("blocks")
        for axis, column in zip(axes, ("slope", "signal"), strict=True):
            low, middle, high = (getattr(part[column], how)() for how in ("min", "median", "max"))
            axis.fill_between(low.index, low, high, color=colour, alpha=0.2, linewidth=0)
            axis.plot(middle, style, color=colour, ms=5, label=block)
        axes[0].plot(part.bound.first(), color=colour, linewidth=1, linestyle=":")
    axes[0].plot([], [], color="0.4", linewidth=1, linestyle=":", label="bound 2ⁿ (sum), 2^(−n/2) (average)")
    axes[0].set(ylabel="local slope ‖∂zₙ/∂x‖₂")
    axes[1].set(ylabel="signal ‖zₙ‖ / ‖x‖")
    for axis in axes:
        axis.set(yscale="log", xlabel="residual blocks n")
    axes[0].legend(fontsize=8, title=f"median and range of {frame.seed.nunique()} stacks", title_fontsize=8)
    return figure
