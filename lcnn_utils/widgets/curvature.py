"""What moves in notebook 02: β of a trained net, and estimates of the Hessian's norm."""

from __future__ import annotations

import contourpy
import ipywidgets as widgets
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor, nn

from ..figures.style import CLASS_COLOURS, CURVATURE_MAP, CYCLE, METHOD
from ..measurements.curvature import MOONS_BOX, moons_fields, moons_grid, with_beta
from ..nn import CenteredSoftplus
from ..training import accuracy
from .engine import Picture, beta_slider, explore


def moons_explorer(models: dict[str, nn.Module], x: Tensor, y: Tensor, resolution: int = 80) -> widgets.VBox:
    """Decision regions, curvature of the margin and accuracy of trained nets when every β is set by hand.
    ``models``: by method name. ``x, y``: test points (n, 2) and labels (n,). ``resolution``: points a side of the grid.
    """
    named = {METHOD[method][0]: model for method, model in models.items()}
    grid = moons_grid(resolution)
    figure = Figure(figsize=(9.5, 3.7), dpi=90, layout="constrained")
    left, right = figure.subplots(1, 2)
    extent, blank = MOONS_BOX, np.zeros((resolution, resolution))
    regions = left.imshow(blank, "coolwarm", origin="lower", extent=extent, aspect="auto", vmin=-4, vmax=4, alpha=0.6)
    heat = right.imshow(blank, CURVATURE_MAP, origin="lower", extent=extent, aspect="auto", vmin=-2, vmax=2.5)
    moving = [regions, heat]
    for label, colour, marker in zip((0, 1), CLASS_COLOURS, ("o", "^"), strict=True):
        moving += left.plot(*x[y == label][:150].T, marker, color=colour, ms=3.5, mec="black", mew=0.3)
    boundaries = [left.plot([], [], "k-", lw=1.5)[0], right.plot([], [], "w-", lw=1.5)[0]]
    left.set(title="sign of the margin (test points on top)", xlabel="x₁", ylabel="x₂")
    right.set(title="curvature of the margin", xlabel="x₁")
    figure.colorbar(heat, ax=right, label="log₁₀ C (1/unit of x)")
    for axis in (left, right):
        axis.grid(False)
        axis.set(xlim=extent[:2], ylim=extent[2:])
    picture = Picture(figure, moving + boundaries)

    trained = {name: [layer.beta.item() for layer in model.modules() if isinstance(layer, CenteredSoftplus)]
               for name, model in named.items()}  # fmt: skip

    def update(net: str, beta: float) -> str:
        model = with_beta(named[net], beta)
        margin, curvature = (field.view(resolution, resolution).numpy() for field in moons_fields(model, grid))
        regions.set_data(margin)
        heat.set_data(np.log10(curvature + 1e-12))
        x1, x2 = grid.view(resolution, resolution, 2).permute(2, 0, 1).numpy()
        segments = contourpy.contour_generator(x=x1, y=x2, z=margin, line_type=contourpy.LineType.Separate)
        gap = np.full((1, 2), np.nan)  # between two pieces of the boundary
        pieces = [part for line in segments.lines(0.0) for part in (np.asarray(line), gap)]
        for boundary in boundaries:
            boundary.set_data(*np.vstack([gap, *pieces]).T)
        share = accuracy(model, x, y)
        median = np.median(curvature)
        return (
            f"{net} (trained with β = {', '.join(f'{value:.4g}' for value in trained[net])}), every β = {beta:.4g}: "
            f"test accuracy <b>{share:.1%}</b>, median C on the grid <b>{median:.3g}</b>, "
            f"largest <b>{curvature.max():.3g}</b>."
        )

    start = {name: float(np.exp(np.mean(np.log(betas)))) for name, betas in trained.items()}
    net = widgets.Dropdown(options=list(named), description="trained net")
    beta = beta_slider(start[net.value])
    net.observe(lambda change: beta.set_trait("value", start[change["new"]]), "value")
    return explore(picture, update, net=net, beta=beta)


def convergence_explorer(frame: pd.DataFrame) -> widgets.VBox:
    """How estimates of ‖∇²f‖ of one sample approach the exact value, product by product.
    ``frame``: of :func:`measurements.curvature.convergence_frame`."""
    figure = Figure(figsize=(7, 3.4), dpi=90, layout="constrained")
    axis = figure.subplots()
    estimators = list(frame.estimator.unique())
    colours, styles = CYCLE[:3], ("o-", "X-", "s--")
    looks = zip(estimators, styles, colours, strict=True)
    lines = [axis.plot([], [], style, color=colour, label=name, ms=5)[0] for name, style, colour in looks]
    axis.axhline(1, color="0.4", linewidth=1, linestyle=":", label="exact (dense Hessian)")
    last = int(frame.products.max())
    axis.set(xlim=(0, last + 1), ylim=(0, 1.25), xlabel="Hessian-vector products", ylabel="estimate / exact ‖∇²f‖₂")
    axis.legend(fontsize=8, loc="lower right")
    picture = Picture(figure, lines)
    ratios = frame.assign(ratio=frame.estimate / frame.exact)
    table = ratios.pivot(index=["sample", "products"], columns="estimator", values="ratio")

    def update(sample: int, products: int) -> str:
        part = table.loc[sample].loc[:products]
        for line, name in zip(lines, estimators, strict=True):
            line.set_data(part.index, part[name])
        errors = ", ".join(f"{name}: <b>{part[name].iloc[-1] - 1:+.2%}</b>" for name in estimators)
        return f"After {products} product{'s' * (products > 1)} — {errors}"

    sample = widgets.IntSlider(0, min=0, max=int(frame["sample"].max()), description="test image number")
    products = widgets.IntSlider(3, min=1, max=last, description="k: products")
    return explore(picture, update, sample=sample, products=products)
