"""The figures of notebook 02: each takes what ``measurements.curvature`` measured and returns a Figure."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from .style import BESIDE, CLASS_COLOURS, CURVATURE_MAP, CYCLE, MARKERS, METHOD, PALETTE


def moons(frame: pd.DataFrame, points: pd.DataFrame) -> Figure:
    """The paper's Figure 1(a, b): decision regions above, curvature of the margin below, a column a method.
    ``frame``: columns x1, x2 (a full grid), method, margin, curvature, accuracy. ``points``: columns x1, x2, label."""
    methods = list(frame.method.unique())
    size = (3.9 * len(methods) + 0.7, 6.4)
    figure, axes = plt.subplots(2, len(methods), figsize=size, sharex=True, sharey=True, squeeze=False)
    for (top, bottom), method in zip(axes.T, methods, strict=True):
        part = frame[frame.method == method]
        margin = part.pivot(index="x2", columns="x1", values="margin")
        top.contourf(margin.columns, margin.index, margin, levels=[-1e9, 0, 1e9], colors=CLASS_COLOURS, alpha=0.25)
        for label, colour, marker in zip((0, 1), CLASS_COLOURS, ("o", "^"), strict=True):
            cloud = points[points.label == label]
            top.scatter(cloud.x1, cloud.x2, s=9, color=colour, marker=marker, label=f"class {label}", linewidths=0)
        top.set_title(f"{METHOD[method][0]}: test accuracy {part.accuracy.iloc[0]:.1%}")
        image = _curvature_map(bottom, part)
        bottom.set(xlabel="x₁")
        top.grid(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("x₂")
    axes[0, 0].legend(fontsize=8, loc="lower left")
    figure.colorbar(image, ax=axes[1], label="log₁₀ C of the margin (1/unit of x)")
    return figure


def beta_maps(frame: pd.DataFrame) -> Figure:
    """Curvature of a net at several β, its boundary in white. Columns: x1, x2, beta, margin, curvature, accuracy."""
    betas = sorted(frame.beta.unique(), reverse=True)
    size = (3.3 * len(betas) + 0.7, 3.1)
    figure, axes = plt.subplots(1, len(betas), figsize=size, sharex=True, sharey=True, squeeze=False)
    for axis, beta in zip(axes[0], betas, strict=True):
        part = frame[frame.beta == beta]
        image = _curvature_map(axis, part)
        axis.set(title=f"β = {beta:g}: accuracy {part.accuracy.iloc[0]:.1%}", xlabel="x₁")
    axes[0, 0].set_ylabel("x₂")
    figure.colorbar(image, ax=axes, label="log₁₀ C of the margin")
    return figure


def _curvature_map(axis: Axes, part: pd.DataFrame) -> AxesImage:
    """log₁₀ of the curvature on a full grid, and the decision boundary."""
    margin, curvature = (part.pivot(index="x2", columns="x1", values=v) for v in ("margin", "curvature"))
    image = axis.imshow(
        np.log10(curvature.to_numpy() + 1e-12), origin="lower", aspect="auto", vmin=-2, vmax=2.5, cmap=CURVATURE_MAP,
        extent=(part.x1.min(), part.x1.max(), part.x2.min(), part.x2.max()),
    )  # fmt: skip
    axis.contour(margin.columns, margin.index, margin, levels=[0], colors="white", linewidths=1)
    axis.grid(False)
    return image


def curvature_distribution(frame: pd.DataFrame) -> Figure:
    """Distribution of C_f over test images, one curve a seed. Columns: label (of METHOD), seed, curvature, accuracy."""
    figure, axes = plt.subplots(1, 2, figsize=(9.4, 3.6), width_ratios=(3, 2))
    labels = list(frame.label.unique())
    for label in labels:
        for _, part in frame[frame.label == label].groupby("seed"):
            values, share = np.sort(part.curvature), np.arange(1, len(part) + 1) / len(part)
            axes[0].plot(values, share, color=PALETTE[label], alpha=0.8, linewidth=1.3)
    axes[0].set(xscale="log", xlabel="normalised curvature C of the loss (1/pixel unit)")
    axes[0].set_ylabel("share of test images below")
    runs = frame.groupby(["label", "seed"], sort=False)[["curvature", "accuracy"]].mean().reset_index()
    for label in labels:
        part = runs[runs.label == label]
        axes[1].errorbar(
            part.curvature.mean(), 100 * part.accuracy.mean(),
            xerr=part.curvature.std(), yerr=100 * part.accuracy.std(),
            marker=MARKERS[label], color=PALETTE[label], capsize=3, label=label, linestyle="none",
        )  # fmt: skip
    axes[1].set(xscale="log", xlabel="mean C of the test images", ylabel="test accuracy (%)")
    axes[1].set_xlim(min(1, runs.curvature.min() / 2), max(100, runs.curvature.max() * 2))
    axes[1].set_title(f"mean ± standard deviation over {runs.seed.nunique()} seeds", fontsize=9)
    axes[1].legend(fontsize=8)
    return figure


def taylor(frame: pd.DataFrame) -> Figure:
    """Error of the first- and second-order Taylor polynomials against ‖δ‖. Columns: length, order, error."""
    figure, axis = plt.subplots(figsize=(5.6, 3.4))
    for (order, part), marker in zip(frame.groupby("order"), "os", strict=True):
        axis.loglog(part.length, part.error, marker + "-", label=f"order {order}")
        guide = part.error.iloc[0] * (part.length / part.length.iloc[0]) ** (order + 1)  # type: ignore[operator]
        label = "∝ ‖δ‖²" if order == 1 else "∝ ‖δ‖³"
        axis.loglog(part.length, guide, color="0.6", linewidth=1, linestyle=":", label=label)
    axis.set(xlabel="length of the step ‖δ‖ (units of x)", ylabel="|f(x + δ) − Taylor polynomial|")
    axis.legend(fontsize=8)
    return figure


def gradient_and_hessian(frame: pd.DataFrame) -> Figure:
    """‖∇²f‖ against ‖∇f‖ of every image, on lines of equal C. Columns: label (of METHOD), grad_norm, hessian_norm."""
    figure, axis = plt.subplots(figsize=(5.6, 4.0))
    for label, part in frame.groupby("label", sort=False):
        colour, marker = PALETTE[str(label)], MARKERS[str(label)]
        axis.loglog(part.grad_norm, part.hessian_norm, marker, color=colour, ms=3, label=label)
    ends = np.array([frame.grad_norm.min(), frame.grad_norm.max()])
    for c in (1, 10, 100):
        axis.loglog(ends, c * ends, color="0.6", linewidth=1, linestyle=":")
        axis.annotate(f"C = {c}", (ends[1], c * ends[1]), fontsize=8, color="0.35", ha="right", va="bottom")
    axis.set(xlabel="gradient norm ‖∇f‖ (loss per pixel unit)", ylabel="Hessian norm ‖∇²f‖₂")
    axis.legend(fontsize=8)
    return figure


def convergence(frame: pd.DataFrame) -> Figure:
    """Relative error of ‖∇²f‖ against products. Columns: estimator, products, error (of every sample)."""
    figure, axis = plt.subplots(figsize=(8.0, 3.4))
    names = list(frame.estimator.unique())
    import seaborn as sns  # here only: it takes seconds to import

    palette = dict(zip(names, CYCLE, strict=False))
    sns.lineplot(
        frame, x="products", y="error", hue="estimator", style="estimator", palette=palette, markers=True, dashes=False,
        estimator="median", errorbar=("pi", 80), ax=axis,
    )  # fmt: skip
    axis.axhline(0.01, color="0.5", linewidth=1, linestyle="--")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set(yscale="log", ylim=(1e-6, 1.5), xlabel="Hessian-vector products", ylabel="relative error of ‖∇²f‖₂")
    axis.legend(title="median and middle 80 % of samples", **BESIDE)
    return figure
