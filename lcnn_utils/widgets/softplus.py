"""What moves in notebook 01: the sharpness β of an activation."""

from __future__ import annotations

import ipywidgets as widgets
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..figures.style import ACTIVATION
from ..measurements.softplus import activation_frame, composition
from .engine import Picture, beta_slider, explore, log_slider


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
        frame = activation_frame((beta,), x)
        composed = dict(zip(("softplus", "centered"), composition(x, beta, depth), strict=True))
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
        drift, kept = (value.item() for value in composition(torch.zeros(1), beta, depth))
        return (
            f"Largest curvature: <b>{beta / 4:.3g}</b>. For x = 0, {depth} softplus layer{'s' * (depth > 1)} "
            f"put out <b>{drift:.3g}</b>, centered softplus <b>{kept:.3g}</b>."
        )

    span = log_slider(4, (0.1, 100), "range of x: ±", digits=4)
    depth = widgets.IntSlider(1, min=1, max=20, description="n: layers")
    return explore(picture, update, beta=beta_slider(2.0), span=span, depth=depth)
