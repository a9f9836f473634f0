"""The figures of notebook 02: each takes what ``measurements.curvature`` measured and returns a Figure."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from .style import CURVATURE_MAP, accuracy_points, class_points, decision_regions, legend_beside, look, medians, series


def moons(frame: pd.DataFrame, points: pd.DataFrame) -> Figure:
    """The paper's Figure 1(a, b): decision regions above, curvature of the margin below, a column a method.
    ``frame``: columns x1, x2 (a full grid), method, margin, curvature, accuracy. ``points``: columns x1, x2, label."""
    methods = frame.method.unique()
    size = (3.9 * len(methods) + 0.7, 6.4)
    figure, axes = plt.subplots(2, len(methods), figsize=size, sharex=True, sharey=True, squeeze=False)
    for (top, bottom), method in zip(axes.T, methods, strict=True):
        part = frame[frame.method == method]
        decision_regions(top, part)
        class_points(top, points, markersize=3)
        top.set_title(f"{look(method)['label']}: test accuracy {part.accuracy.iloc[0]:.1%}")
        image = _curvature_map(bottom, part)
        bottom.set_xlabel("x₁")
    for axis in axes[:, 0]:
        axis.set_ylabel("x₂")
    axes[0, 0].legend(loc="lower left")
    figure.colorbar(image, ax=axes[1], label="log₁₀ C of the margin (1/unit of x)")
    return figure


def beta_maps(frame: pd.DataFrame) -> Figure:
    """Curvature of a net at several β, its boundary in white. Columns: x1, x2, beta, margin, curvature, accuracy."""
    betas = sorted(frame.beta.unique(), reverse=True)
    size = (2.6 * len(betas) + 0.7, 2.6)
    figure, axes = plt.subplots(1, len(betas), figsize=size, sharex=True, sharey=True, squeeze=False)
    for axis, beta in zip(axes[0], betas, strict=True):
        part = frame[frame.beta == beta]
        image = _curvature_map(axis, part)
        axis.set(title=f"β = {beta:g}: accuracy {part.accuracy.iloc[0]:.1%}", xlabel="x₁")
    axes[0, 0].set_ylabel("x₂")
    figure.colorbar(image, ax=axes, label="log₁₀ C of the margin\n(1/unit of x)")
    return figure


def _curvature_map(axis: Axes, part: pd.DataFrame) -> AxesImage:
    """log₁₀ of the curvature on a full grid, and the decision boundary."""
    margin = part.pivot(index="x2", columns="x1", values="margin")
    curvature = part.pivot(index="x2", columns="x1", values="curvature")
    extent = (part.x1.min(), part.x1.max(), part.x2.min(), part.x2.max())
    logarithm = np.log10(curvature + 1e-12)
    image = axis.imshow(logarithm, CURVATURE_MAP, aspect="auto", vmin=-2, vmax=2.5, origin="lower", extent=extent)
    axis.contour(margin.columns, margin.index, margin, levels=[0], colors="white", linewidths=1)
    axis.grid(False)
    return image


def curvature_distribution(frame: pd.DataFrame) -> Figure:
    """Distribution of C_f over test images, one curve for each seed, and its means against accuracy.
    ``frame``: columns label (of METHOD), seed, curvature (1/pixel unit), accuracy (share)."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.4, 3.6), width_ratios=(3, 2))
    for (label, _), part in frame.groupby(["label", "seed"], sort=False):
        left.ecdf(part.curvature, color=look(str(label))["color"], alpha=0.8, linewidth=1.3)
    left.set(xscale="log", xlabel="normalised curvature C of the loss (1/pixel unit)")
    left.set_ylabel("share of test images below")
    runs = frame.groupby(["label", "seed"], sort=False)[["curvature", "accuracy"]].mean().reset_index()
    accuracy_points(right, runs, "curvature", "label")
    right.set(xscale="log", xlabel="mean C of the test images (1/pixel unit)")
    right.set_xlim(min(1, runs.curvature.min() / 2), max(100, runs.curvature.max() * 2))
    right.set_title(f"mean ± standard deviation over {runs.seed.nunique()} seeds")
    right.legend()
    return figure


def taylor(frame: pd.DataFrame) -> Figure:
    """Error of the first- and second-order Taylor polynomials against ‖δ‖. Columns: length, order, error."""
    figure, axis = plt.subplots(figsize=(5.6, 3.4))
    for order, colour, marker, power in ((1, "black", "o", "²"), (2, "0.45", "s", "³")):
        part = frame[frame.order == order]
        axis.loglog(part.length, part.error, marker + "-", color=colour, label=f"order {order}")
        guide = part.error.iloc[0] * (part.length / part.length.iloc[0]) ** (order + 1)
        axis.loglog(part.length, guide, ":", color="0.6", linewidth=1, label=f"∝ ‖δ‖{power}")
    axis.set(xlabel="length of the step ‖δ‖ (units of x)", ylabel="|f(x + δ) − Taylor polynomial|")
    axis.legend()
    return figure


def what_predicts_c(frame: pd.DataFrame) -> Figure:
    """C of the loss of every image against the doubt 1 − p, and against its softmax part p‖∇m‖.
    Columns: label (of METHOD), curvature, doubt, softmax."""
    figure, axes = plt.subplots(1, 2, figsize=(9.0, 3.6), sharey=True)
    for axis, column in zip(axes, ("doubt", "softmax"), strict=True):
        series(axis, frame, column, "curvature", "label", linestyle="none", markersize=3)
        axis.set(xscale="log", yscale="log")
    axes[1].axline((10, 10), (20, 20), color="0.4", linewidth=1, linestyle=":", label="C = p‖∇m‖")
    axes[0].set(xlabel="doubt 1 − p", ylabel="C of the loss (1/pixel unit)")
    axes[1].set(xlabel="softmax part p‖∇m‖ (1/pixel unit)")
    axes[1].legend()
    return figure


def convergence(frame: pd.DataFrame) -> Figure:
    """Relative error of ‖∇²f‖ against products. Columns: estimator, products, error (of every sample)."""
    figure, axis = plt.subplots(figsize=(8.0, 3.4))
    medians(axis, frame, "products", "error", "estimator")
    axis.axhline(0.01, color="0.5", linewidth=1, linestyle="--")
    axis.locator_params(axis="x", integer=True)
    axis.set(yscale="log", ylim=(1e-6, 1.5), xlabel="Hessian-vector products", ylabel="relative error of ‖∇²f‖₂")
    legend_beside(axis, "median and middle 80 % of samples")
    return figure
