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
    size = (3.3 * len(betas) + 0.7, 3.1)
    figure, axes = plt.subplots(1, len(betas), figsize=size, sharex=True, sharey=True, squeeze=False)
    for axis, beta in zip(axes[0], betas, strict=True):
        part = frame[frame.beta == beta]
        image = _curvature_map(axis, part)
        axis.set(title=f"β = {beta:g}: accuracy {part.accuracy.iloc[0]:.1%}", xlabel="x₁")
    axes[0, 0].set_ylabel("x₂")
    figure.colorbar(image, ax=axes, label="log₁₀ C of the margin (1/unit of x)")
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
    """Distribution of C_f over test images, one curve a seed, and its means against accuracy.
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
    for order, marker, power in ((1, "o", "²"), (2, "s", "³")):
        part = frame[frame.order == order]
        axis.loglog(part.length, part.error, marker + "-", label=f"order {order}")
        guide = part.error.iloc[0] * (part.length / part.length.iloc[0]) ** (order + 1)
        axis.loglog(part.length, guide, ":", color="0.6", linewidth=1, label=f"∝ ‖δ‖{power}")
    axis.set(xlabel="length of the step ‖δ‖ (units of x)", ylabel="|f(x + δ) − Taylor polynomial|")
    axis.legend()
    return figure


def gradient_and_hessian(frame: pd.DataFrame) -> Figure:
    """‖∇²f‖ against ‖∇f‖ of every image, on lines of equal C. Columns: label (of METHOD), grad_norm, hessian_norm."""
    figure, axis = plt.subplots(figsize=(5.6, 4.0))
    series(axis, frame, "grad_norm", "hessian_norm", "label", linestyle="none", markersize=3)
    ends = np.array([frame.grad_norm.min(), frame.grad_norm.max()])
    for c in (1, 10, 100):
        axis.plot(ends, c * ends, ":", color="0.6", linewidth=1)
        axis.annotate(f"C = {c}", (ends[1], c * ends[1]), fontsize=8, color="0.35", ha="right", va="bottom")
    axis.set(xscale="log", xlabel="gradient norm ‖∇f‖ (loss per pixel unit)")
    axis.set(yscale="log", ylabel="Hessian norm ‖∇²f‖₂ (loss per pixel unit²)")
    axis.legend()
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
