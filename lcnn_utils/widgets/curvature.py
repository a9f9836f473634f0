"""The explorers of notebook 02: β of a trained net, and estimates of the Hessian's norm."""

import contourpy
import ipywidgets as widgets
import numpy as np
import pandas as pd
from torch import Tensor, nn

from ..figures.style import CLASS_COLOURS, CURVATURE_MAP, CYCLE, METHOD
from ..measurements.curvature import MOONS_BOX, moons_fields, moons_grid
from ..nn import CenteredSoftplus, softened
from ..training import accuracy
from .engine import Picture, beta_slider, explore, panels


def moons_explorer(models: dict[str, nn.Module], x: Tensor, y: Tensor, resolution: int = 80) -> widgets.VBox:
    """Decision regions, curvature of the margin and accuracy of trained nets when every β is set by hand.
    ``models``: by method name. ``x, y``: test points (n, 2) and labels (n,). ``resolution``: points a side of the grid.
    """
    grid = moons_grid(resolution)
    x1, x2 = grid.view(resolution, resolution, 2).permute(2, 0, 1).numpy()
    left, right = panels((9.5, 3.7), 1, 2)
    look = dict(origin="lower", extent=MOONS_BOX, aspect="auto")
    empty = np.zeros((resolution, resolution))
    regions = left.imshow(empty, "coolwarm", vmin=-4, vmax=4, alpha=0.6, **look)
    heat = right.imshow(empty, CURVATURE_MAP, vmin=-2, vmax=2.5, **look)
    moving = [regions, heat]
    for label, colour, marker in zip((0, 1), CLASS_COLOURS, ("o", "^"), strict=True):
        moving += left.plot(*x[y == label][:150].T, marker, color=colour, ms=3.5, mec="black", mew=0.3)
    boundaries = [*left.plot([], [], "k-", lw=1.5), *right.plot([], [], "w-", lw=1.5)]
    left.set(title="sign of the margin (test points on top)", xlabel="x₁", ylabel="x₂")
    right.set(title="curvature of the margin", xlabel="x₁")
    right.figure.colorbar(heat, ax=right, label="log₁₀ C (1/unit of x)")
    for axis in (left, right):
        axis.grid(False)
        axis.set(xlim=MOONS_BOX[:2], ylim=MOONS_BOX[2:])
    picture = Picture(moving + boundaries)
    trained = {}
    for method, model in models.items():
        trained[method] = [layer.beta.item() for layer in model.modules() if isinstance(layer, CenteredSoftplus)]

    def update(method: str, beta: float) -> str:
        model = softened(models[method], beta)
        margin, curvature = (field.view(resolution, resolution).numpy() for field in moons_fields(model, grid))
        regions.set_data(margin)
        heat.set_data(np.log10(curvature + 1e-12))
        contours = contourpy.contour_generator(x=x1, y=x2, z=margin, line_type="ChunkCombinedNan")
        points = contours.lines(0.0)[0][0]  # pieces of the boundary, NaN between them; None without any
        if points is None:
            points = np.empty((0, 2))
        for boundary in boundaries:
            boundary.set_data(*points.T)
        betas = ", ".join(f"{value:.4g}" for value in trained[method])
        return (
            f"{METHOD[method][0]} (trained with β = {betas}), every β = {beta:.4g}: test accuracy "
            f"<b>{accuracy(model, x, y):.1%}</b>, median C on the grid <b>{np.median(curvature):.3g}</b>, "
            f"largest <b>{curvature.max():.3g}</b>."
        )

    start = {method: float(np.exp(np.log(betas).mean())) for method, betas in trained.items()}
    net = widgets.Dropdown(options=[(METHOD[method][0], method) for method in models], description="trained net")
    beta = beta_slider(start[net.value], start.values())
    net.observe(lambda change: beta.set_trait("value", start[change["new"]]), "value")
    return explore(picture, update, method=net, beta=beta)


def convergence_explorer(frame: pd.DataFrame) -> widgets.VBox:
    """How estimates of ‖∇²f‖ of one sample approach the exact value, product by product.
    ``frame``: of :func:`measurements.curvature.convergence_frame`."""
    axis = panels((7, 3.4))
    lines = {}
    for name, style, colour in zip(frame.estimator.unique(), ("o-", "X-", "s--"), CYCLE[:3], strict=True):
        (lines[name],) = axis.plot([], [], style, color=colour, label=name, ms=5)
    axis.axhline(1, color="0.4", linewidth=1, linestyle=":", label="exact (dense Hessian)")
    last = int(frame.products.max())
    axis.set(xlim=(0, last + 1), ylim=(0, 1.25), xlabel="Hessian-vector products", ylabel="estimate / exact ‖∇²f‖₂")
    axis.legend(fontsize=8, loc="lower right")
    picture = Picture(list(lines.values()))
    ratios = frame.assign(ratio=frame.estimate / frame.exact)
    table = ratios.pivot(index=["sample", "products"], columns="estimator", values="ratio")

    def update(sample: int, products: int) -> str:
        part = table.loc[sample].loc[:products]
        for name, line in lines.items():
            line.set_data(part.index, part[name])
        errors = ", ".join(f"{name}: <b>{part[name].iloc[-1] - 1:+.2%}</b>" for name in lines)
        return f"After {products} product{'s' * (products > 1)} — {errors}"

    sample = widgets.IntSlider(0, 0, int(frame["sample"].max()), description="image")
    products = widgets.IntSlider(3, 1, last, description="k: products")
    return explore(picture, update, sample=sample, products=products)
