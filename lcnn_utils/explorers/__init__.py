"""Interactive figures: plain computations drawn into one reused figure, behind keyboard-usable sliders.

Every control is made by ``_explore``, which keeps it in ``CONTROLS`` with the picture it redraws, so that a test can
move each one to its ends: Jupyter swallows what a widget callback raises.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Sequence

import contourpy
import ipywidgets as widgets
import numpy as np
import pandas as pd
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from PIL import Image
from torch import Tensor, nn

from .. import studies
from ..figures.style import ACTIVATION, CLASS_COLOURS, CURVATURE_MAP, CYCLE, METHOD
from ..nn import CenteredSoftplus

DRAWING = threading.RLock()  # JupyterLab runs callbacks in threads: one at a time, and again from within itself
CONTROLS: list[tuple[widgets.ValueWidget, widgets.Image]] = []


class Picture:
    """A figure shown as a PNG widget. Only ``moving`` artists are drawn anew, over a stored background."""

    def __init__(self, figure: Figure, moving: Sequence) -> None:
        self.canvas, self.moving = FigureCanvasAgg(figure), moving
        for artist in moving:
            artist.set_animated(True)
        self.canvas.draw()  # lays the figure out, once
        figure.set_layout_engine("none")
        width = int(figure.get_figwidth() * figure.dpi)
        self.image = widgets.Image(format="png", layout={"width": f"{width}px", "max_width": "100%"})
        self.frame()

    def frame(self) -> None:
        """Draw what stands still: needed when axis limits or titles changed."""
        self.canvas.draw()
        self.background = self.canvas.copy_from_bbox(self.canvas.figure.bbox)

    def draw(self) -> None:
        self.canvas.restore_region(self.background)
        for artist in self.moving:
            artist.axes.draw_artist(artist)
        buffer = io.BytesIO()
        Image.fromarray(np.asarray(self.canvas.buffer_rgba())[..., :3]).save(buffer, "png", compress_level=1)
        self.image.value = buffer.getvalue()


def _explore(picture: Picture, update: Callable[..., str], **controls: widgets.ValueWidget) -> widgets.VBox:
    """Controls above a picture above a line of text; ``update(**values)`` changes the artists and returns the text."""
    text = widgets.HTML()

    def changed(_=None) -> None:
        with DRAWING:
            text.value = update(**{name: control.value for name, control in controls.items()})
            picture.draw()

    for control in controls.values():
        control.style.description_width = "11em"
        control.layout.width = "34em"
        control.observe(changed, "value")
        CONTROLS.append((control, picture.image))
    changed()
    return widgets.VBox([*controls.values(), picture.image, text])


def log_slider(
    value: float, ends: tuple[float, float], description: str, *, step: float = 0.1, digits: int = 3
) -> widgets.FloatLogSlider:
    """A slider of the numbers between ``ends`` on a logarithmic scale; ``step`` is in powers of ten."""
    low, high = np.log10(ends)
    look = dict(description=description, readout_format=f".{digits}g")
    return widgets.FloatLogSlider(value, base=10, min=low, max=high, step=step, **look)


def measured_slider(values: np.ndarray, value: float, description: str) -> widgets.FloatLogSlider:
    """A slider over sorted ``values`` > 0, evenly spaced on a logarithmic axis; see :func:`nearest`."""
    step = np.log10(values[-1] / values[0]) / max(len(values) - 1, 1)
    return log_slider(value, (values[0], values[-1]), description, step=step)


def nearest(values: np.ndarray, value: float) -> float:
    """Of ``values`` > 0 the one whose logarithm is nearest."""
    return values[np.abs(np.log(values / value)).argmin()]


def blank(shape: Sequence[int]) -> np.ndarray:
    """A black image for images (C, H, W), as :func:`show` fills it: (H, W) or (H, W, 3)."""
    return np.zeros(shape[1:] if shape[0] == 1 else (*shape[1:], 3))


def show(artist: AxesImage, image: Tensor) -> None:
    """Draw an image (C, H, W) with one channel or three."""
    values = image.detach().cpu()
    artist.set_data(values[0].numpy() if len(values) == 1 else values.permute(1, 2, 0).numpy())


def beta_slider(value: float = 5.0) -> widgets.FloatLogSlider:
    """The one β slider: logarithmic, 0.01 to 1000."""
    return log_slider(value, (0.01, 1000), "β: sharpness", step=0.05, digits=4)


def beta_explorer() -> widgets.VBox:
    """Value, slope and curvature of ReLU, softplus and centered softplus under β, and their n-fold composition."""
    figure = Figure(figsize=(11, 3.1), dpi=90, layout="constrained")
    axes = figure.subplots(1, 4)
    titles = ("value φ(x)", "slope φ′(x)", "curvature φ″(x)", "φ composed n times")
    lines: dict[tuple[str, int], Line2D] = {}
    for panel, (axis, title) in enumerate(zip(axes, titles, strict=True)):
        axis.set(title=title, xlabel="input x")
        for name, (label, colour, style) in ACTIVATION.items():
            lines[name, panel] = axis.plot([], [], style, color=colour, label=label)[0]
    axes[1].set_ylim(-0.05, 1.1)
    axes[2].set(yscale="log", ylim=(1e-4, 1e3))
    axes[2].set_yticks([1e-4, 1e-2, 1, 100])
    axes[2].minorticks_off()  # ticks are most of the time of a full redraw
    for axis in axes:
        axis.locator_params(axis="x", nbins=3)
    for axis in (axes[0], axes[3]):
        axis.locator_params(axis="y", nbins=4)
    axes[0].legend(fontsize=8, loc="upper left")
    picture = Picture(figure, list(lines.values()))
    shown = 0.0

    def update(beta: float, span: float, depth: int) -> str:
        nonlocal shown
        x = torch.linspace(-span, span, 400)
        frame = studies.activation_frame((beta,), x)
        composed = dict(zip(("softplus", "centered"), studies.composition(x, beta, depth), strict=True))
        for name in ACTIVATION:
            part = frame[frame.activation == name]
            for panel, column in enumerate(("value", "slope", "curvature")):
                lines[name, panel].set_data(part.x, part[column])
            lines[name, 3].set_data(x, composed.get(name, x.relu()))
        if span != shown:
            shown = span
            for axis in axes:
                axis.set_xlim(-span, span)
            for axis in (axes[0], axes[3]):
                axis.set_ylim(-0.5 * span, 1.3 * span)
            picture.frame()
        drift, kept = (value.item() for value in studies.composition(torch.zeros(1), beta, depth))
        return (
            f"Largest curvature: <b>{beta / 4:.3g}</b>. For x = 0, {depth} softplus layer{'s' * (depth > 1)} "
            f"put out <b>{drift:.3g}</b>, centered softplus <b>{kept:.3g}</b>."
        )

    span = log_slider(4, (0.1, 100), "range of x: ±", digits=4)
    depth = widgets.IntSlider(1, min=1, max=20, description="n: layers")
    return _explore(picture, update, beta=beta_slider(2.0), span=span, depth=depth)


def moons_explorer(models: dict[str, nn.Module], x: Tensor, y: Tensor, resolution: int = 80) -> widgets.VBox:
    """Decision regions, curvature of the margin and accuracy of trained nets when every β is set by hand.
    ``models``: by method name. ``x, y``: test points (n, 2) and labels (n,). ``resolution``: points a side of the grid.
    """
    named = {METHOD[method][0]: model for method, model in models.items()}
    grid = studies.moons_grid(resolution)
    figure = Figure(figsize=(9.5, 3.7), dpi=90, layout="constrained")
    left, right = figure.subplots(1, 2)
    extent, blank = studies.MOONS_BOX, np.zeros((resolution, resolution))
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
        model = studies.with_beta(named[net], beta)
        margin, curvature = (field.view(resolution, resolution).numpy() for field in studies.moons_fields(model, grid))
        regions.set_data(margin)
        heat.set_data(np.log10(curvature + 1e-12))
        x1, x2 = grid.view(resolution, resolution, 2).permute(2, 0, 1).numpy()
        segments = contourpy.contour_generator(x=x1, y=x2, z=margin, line_type=contourpy.LineType.Separate)
        gap = np.full((1, 2), np.nan)  # between two pieces of the boundary
        pieces = [part for line in segments.lines(0.0) for part in (np.asarray(line), gap)]
        for boundary in boundaries:
            boundary.set_data(*np.vstack([gap, *pieces]).T)
        share = studies.accuracy(model, x, y)
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
    return _explore(picture, update, net=net, beta=beta)


def convergence_explorer(frame: pd.DataFrame) -> widgets.VBox:
    """How estimates of ‖∇²f‖ of one sample approach the exact value, product by product.
    ``frame``: of :func:`studies.convergence_frame`."""
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
    return _explore(picture, update, sample=sample, products=products)
