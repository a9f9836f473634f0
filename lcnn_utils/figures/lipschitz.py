"""The figures of notebook 04: each takes what ``measurements.lipschitz`` measured and returns a Figure.
Norms, singular values and slopes are output per input of a layer, without a unit."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from .style import CYCLE, error_bars, legend_below, legend_beside, log_axis, look, medians, percent

ESTIMATE = {  # of a norm: (label, line style and marker, colour)
    "scaled": ("reshaped kernel × √windows", "^:", CYCLE[4]),
    "bound": ("certified bound", "s-", CYCLE[2]),
    "power": ("power iteration, 15 steps", "o--", CYCLE[0]),
    "reshaped": ("reshaped kernel (torch's spectral_norm)", "X-.", CYCLE[3]),
}
RULE = {"BatchNorm": ("o", "0.35"), "published": ("v", CYCLE[4]), "per channel (ours)": ("s", CYCLE[2])}
BLOCK = ("sum", "average", "average + γ-BatchNorm")


def matrices(kernel: Tensor, of_stride: dict[int, Tensor]) -> Figure:
    """A kernel (k, k) and the matrices, by stride, of its convolution: entries as colours, 0 in white."""
    figure, axes = plt.subplots(1, 1 + len(of_stride), figsize=(10, 3.9), width_ratios=(2, *[4] * len(of_stride)))
    top = float(kernel.abs().max())
    shown = {"kernel": kernel} | {f"stride {s}: {len(m)} × {m.shape[1]}": m for s, m in of_stride.items()}
    for axis, (title, values) in zip(axes, shown.items(), strict=True):
        image = axis.imshow(values.numpy(), "RdBu_r", vmin=-top, vmax=top, interpolation="nearest")
        axis.set(title=title, xlabel="input pixel", ylabel="output pixel")
        axis.grid(False)
    for row, values in enumerate(kernel.tolist()):
        for column, value in enumerate(values):
            colour = "white" if abs(value) > 0.6 * top else "black"
            axes[0].text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
    axes[0].set(xlabel="", ylabel="", xticks=[], yticks=[])
    figure.colorbar(image, ax=axes, label="weight", shrink=0.8, pad=0.01)
    return figure


def norms(frame: pd.DataFrame) -> Figure:
    """The norm against the image size, and estimates relative to it, over kernels: means and ranges.
    ``frame``: columns stride, size (pixels), kernel, estimate (of ESTIMATE), true, ratio."""
    strides, sizes = sorted(frame.stride.unique()), sorted(frame["size"].unique())
    figure, axes = plt.subplots(1, 1 + len(strides), figsize=(3.9 * (1 + len(strides)), 3.9))
    bounds = frame[frame.estimate == "bound"]  # the true norm stands beside each estimate
    for stride, style, colour, shift in zip(strides, ("D-", "P--"), ("0.2", "0.55"), (0.96, 1.04), strict=False):
        part = bounds[bounds.stride == stride].assign(size=bounds["size"] * shift)
        _mean_and_range(axes[0], part, "true", fmt=style, color=colour, label=f"stride {stride}")
    axes[0].set(title="true norm ‖A‖₂", ylabel="largest ‖Ax‖₂ / ‖x‖₂", ylim=(0, None))
    for axis, stride in zip(axes[1:], strides, strict=True):
        for name, (label, style, colour) in ESTIMATE.items():
            part = frame[(frame.stride == stride) & (frame.estimate == name)]
            _mean_and_range(axis, part, "ratio", fmt=style, color=colour, markersize=8, elinewidth=1, label=label)
        axis.axhline(1, color="black", linewidth=1)
        axis.set(title=f"stride {stride}", ylabel="estimate / true norm", ylim=(0.4, 2.5))
    for axis in axes:
        axis.set(xscale="log", xlabel="side of the image (pixels)")
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
    axes[0].legend(loc="lower left", title=f"mean, and range of {frame.kernel.nunique()} kernels")
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _mean_and_range(axis: Axes, frame: pd.DataFrame, column: str, **style) -> None:
    values = frame.groupby("size")[column]
    mean = values.mean()
    axis.errorbar(mean.index, mean, error_bars(mean, values.min(), values.max()), **style)


def power(frame: pd.DataFrame) -> Figure:
    """How far power iteration is below the norm. Columns: kernel, iterations, ratio."""
    figure, axis = plt.subplots(figsize=(6.2, 3.6))
    error = (1 - frame.pivot(index="iterations", columns="kernel", values="ratio")).clip(lower=1e-6)
    _median_and_worst(axis, error, "random kernels")
    axis.axhline(0.01, color="black", linewidth=1, linestyle=":", label="1 %")
    axis.set(yscale="log", ylim=(1e-5, 1), xlabel="power iterations", ylabel="1 − estimate / true norm")
    log_axis(axis)
    axis.legend(loc="lower left")
    return figure


def training_norms(frame: pd.DataFrame, fresh: float) -> Figure:
    """Error of the running σ while training.
    ``frame``: columns epoch, layer, error. ``fresh``: the classifier's error after one step from a random start."""
    figure, axis = plt.subplots(figsize=(6.6, 3.6))
    _median_and_worst(axis, frame.pivot(index="epoch", columns="layer", values="error"), "layers")
    axis.axhline(fresh, color="black", linewidth=1, linestyle=":", label="the classifier, from a random start")
    axis.set(yscale="log", ylim=(1e-5, 2), xlabel="training epoch", ylabel="1 − σ / true norm")
    axis.legend(loc="lower left")
    return figure


def _median_and_worst(axis: Axes, error: pd.DataFrame, what: str) -> None:
    """Every column of ``error`` in grey, and their median and largest value."""
    axis.plot(error, color="0.8", linewidth=0.5)
    axis.plot(error.median(axis=1), "o-", color=CYCLE[0], label=f"median of {error.shape[1]} {what}")
    axis.plot(error.max(axis=1), "X--", color=CYCLE[3], label="worst of them")


def spectra(frame: pd.DataFrame) -> Figure:
    """Singular values of every layer, a row an operator, a column a method, a colour a block.
    ``frame``: columns method, layer, operator, share, value."""
    methods, operators = frame.method.unique(), frame.operator.unique()
    colours = (*CYCLE[:4], *CYCLE[5:])  # the fifth is near the fourth
    blocks = list(dict.fromkeys(_block(layer) for layer in frame.layer))
    size = (8.8, 4.8)
    figure, axes = plt.subplots(len(operators), len(methods), figsize=size, sharex=True, sharey=True, squeeze=False)
    for row, operator in zip(axes, operators, strict=True):
        for axis, method in zip(row, methods, strict=True):
            panel = frame[(frame.method == method) & (frame.operator == operator)]
            for layer, part in panel.groupby("layer", sort=False):
                style = ":" if "shortcut" in str(layer) else "--" if str(layer).endswith("2") else "-"
                colour = colours[blocks.index(_block(str(layer))) % len(colours)]
                axis.plot(part.share, part.value, style, color=colour, label=layer)
            axis.axhline(1, color="black", linewidth=0.8)
            axis.set(yscale="log", ylim=(0.02, 25), title=f"{look(str(method))['label']}: {operator}")
        row[0].set_ylabel("singular value")
    for axis in axes[-1]:
        axis.set_xlabel("share of the singular values at least as large")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center")
    return figure


def _block(layer: str) -> str:
    """``block 1 conv 2`` → ``block 1``."""
    return " ".join(layer.split()[:2])


def clips(frame: pd.DataFrame, gamma: float) -> Figure:
    """Slopes of a BatchNorm's channels under three rules. Columns: rule, channel, slope."""
    figure, axis = plt.subplots(figsize=(6.2, 3.4))
    for shift, (rule, (marker, colour)) in zip((-0.15, 0, 0.15), RULE.items(), strict=True):
        part = frame[frame.rule == rule]
        axis.plot(part.channel + shift, part.slope, marker, color=colour, label=rule, markersize=7)
    axis.axhline(gamma, color="black", linewidth=1, linestyle="--", label=f"γ = {gamma:g}")
    axis.set(yscale="log", xlabel="channel c", ylabel="slope (output / input)", xticks=sorted(frame.channel.unique()))
    legend_beside(axis)
    return figure


def gamma(frame: pd.DataFrame) -> Figure:
    """Accuracy, curvature and slope of nets against γ, the first kind of statistics in full lines.
    ``frame``: columns method, statistics, gamma, accuracy (share, of a task with ten classes), curvature, grad_norm."""
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.5))
    panels = {"accuracy": "test accuracy", "curvature": "median C of the margin\n(1/pixel unit)"}
    panels |= {"grad_norm": "median ‖∇f‖ of the margin\n(1/pixel unit)"}
    for axis, (column, title) in zip(axes, panels.items(), strict=True):
        for (method, statistics), part in frame.groupby(["method", "statistics"], sort=False):
            points = part.groupby("gamma")[column].first()
            style = look(str(method))
            style["label"] += f", statistics {statistics}"
            if statistics != frame.statistics.iloc[0]:
                style |= dict(linestyle="--", markerfacecolor="white")
            axis.plot(points, **style)
        axis.set(xlabel="γ: largest slope of each BatchNorm", ylabel=title)
        log_axis(axis)
    axes[0].axhline(0.1, color="black", linewidth=1, linestyle=":")
    axes[0].annotate("chance: 10 %", (frame.gamma.max(), 0.11), ha="right", va="bottom", fontsize=8)
    percent(axes[0])
    axes[1].set_yscale("log")
    axes[2].set_yscale("log")
    legend_below(figure)
    return figure


def residual(frame: pd.DataFrame) -> Figure:
    """Slope and signal of stacks of residual blocks. Columns: block (of BLOCK), seed, blocks, slope, signal, bound."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for axis, column, name in ((left, "slope", "local slope ‖∂zₙ/∂x‖₂"), (right, "signal", "signal ‖zₙ‖ / ‖x‖")):
        medians(axis, frame, "blocks", column, "block", middle=100)
        axis.set(yscale="log", xlabel="residual blocks n", ylabel=name)
    for (_, part), colour in zip(frame.groupby("block", sort=False), CYCLE, strict=False):
        left.plot(part.groupby("blocks").bound.first(), color=colour, linewidth=1, linestyle=":")
    left.plot([], [], color="0.4", linewidth=1, linestyle=":", label="bound")
    left.set_ylim(frame.slope.min() / 10, 1e6)
    left.legend(title=f"median and range of {frame.seed.nunique()} stacks")
    right.get_legend().remove()
    return figure
