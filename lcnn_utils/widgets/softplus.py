"""The explorer of notebook 01: the sharpness β of an activation."""

import ipywidgets as widgets
import torch

from ..figures.style import ACTIVATION
from ..measurements.softplus import activation_frame, composition
from .engine import Picture, beta_slider, explore, log_slider, panels


def beta_explorer() -> widgets.VBox:
    """Value, slope and curvature of ReLU, softplus and centered softplus under β, and their n-fold composition."""
    axes = panels((11, 3.1), 1, 4)
    titles = ("value φ(x)", "slope φ′(x)", "curvature φ″(x)", "φ composed n times")
    lines = {}
    for panel, (axis, title) in enumerate(zip(axes, titles, strict=True)):
        axis.set(title=title, xlabel="input x")
        axis.locator_params(axis="x", nbins=3)
        for name, (label, colour, style) in ACTIVATION.items():
            (lines[name, panel],) = axis.plot([], [], style, color=colour, label=label)
    axes[1].set_ylim(-0.05, 1.1)
    axes[2].set(yscale="log", ylim=(1e-4, 1e3), yticks=[1e-4, 1e-2, 1, 100])
    axes[2].minorticks_off()  # ticks are most of the time of a full redraw
    for axis in (axes[0], axes[3]):
        axis.locator_params(axis="y", nbins=4)
    axes[0].legend(fontsize=8, loc="upper left")
    picture = Picture(list(lines.values()))

    def update(beta: float, span: float, depth: int) -> str:
        bend = torch.linspace(-20, 20, 401, dtype=torch.float64) / beta  # fine enough, and through the peak at 0
        x = torch.cat([torch.linspace(-span, span, 401, dtype=torch.float64), bend.clamp(-span, span)]).unique()
        frame = activation_frame((beta,), x)
        plain, centered = composition(x, beta, depth)
        composed = {"relu": x.relu(), "softplus": plain, "centered": centered}
        for name in ACTIVATION:
            part = frame[frame.activation == name]
            for panel, column in enumerate(("value", "slope", "curvature")):
                lines[name, panel].set_data(part.x, part[column])
            lines[name, 3].set_data(x, composed[name])
        if axes[0].get_xlim() != (-span, span):
            for axis in axes:
                axis.set_xlim(-span, span)
            for axis in (axes[0], axes[3]):
                axis.set_ylim(-0.5 * span, 1.3 * span)
            picture.draw_background()
        plain_at_0, centered_at_0 = (value.item() for value in composition(torch.zeros(1), beta, depth))
        return (
            f"β = {beta:g}: largest curvature <b>{beta / 4:.3g}</b>. For x = 0, after {depth} "
            f"layer{'s' * (depth > 1)}: softplus <b>{plain_at_0:.3g}</b>, centered softplus <b>{centered_at_0:.3g}</b>."
        )

    span = log_slider(4, 0.1, 100, "range of x: ±")
    depth = widgets.IntSlider(1, 1, 20, description="n: layers")
    return explore(picture, update, beta=beta_slider(2), span=span, depth=depth)
