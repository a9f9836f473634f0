"""What moves in notebook 06: maps of two networks while noise is added to an image."""

from __future__ import annotations

from collections.abc import Sequence

import ipywidgets as widgets
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ..attacks import direction, mirror, move
from ..figures.attacks import picture
from ..figures.style import METHOD
from ..measurements.saliency import Scene
from ..saliency import MAPS, compare, explain, worst_step
from .engine import Picture, blank, explore, log_slider, show


def noise_explorer(scene: Scene, methods: Sequence[str] = ("gradient", "smoothgrad", "integrated_gradients")):
    """An image and its maps of the label's logit by two networks, before and after noise of a chosen length.
    ``scene``: its first two networks are compared, on images that both get right. ``methods``: of
    :func:`saliency.explain`, to choose from; random noise keeps its direction when its length changes."""
    nets = dict(list(scene.nets.items())[:2])
    figure = Figure(figsize=(9.6, 4.3), dpi=90, layout="constrained")
    axes = figure.subplots(2, 1 + len(nets))
    empty = blank(scene.x.shape[1:])
    shown = [[picture(axes[0, 0], empty, "image"), picture(axes[1, 0], empty, "with noise")]]
    for column, name in enumerate(nets, 1):
        titles = (f"{METHOD[name][0]}: map", "with noise")
        shown.append([picture(a, empty, t, signed=1.0) for a, t in zip(axes[:, column], titles, strict=True)])
    view = Picture(figure, [artist for pair in shown for artist in pair])
    labels = {MAPS[method]: method for method in methods}
    drawn = direction(torch.randn(scene.x.shape, generator=torch.Generator().manual_seed(0)), "l2").to(scene.x)

    def step(net: str, number: int, length: float, kind: str) -> Tensor:
        x, y = scene.x[number : number + 1], scene.y[number : number + 1]
        if kind == "worst":
            return worst_step(nets[net], x, y, length, scalar="logit", steps=5)[0]
        return mirror(x, length * drawn[number : number + 1], (0.0, 1.0))

    def update(number: int, map_: str, noise: str, length: float) -> str:
        x, y = scene.x[number : number + 1], scene.y[number : number + 1]
        kind = "worst" if noise.startswith("worst") else "random"
        told = []
        for column, net in enumerate(nets, 1):
            moved = move(x, step(net, number, length, kind), (0.0, 1.0))
            if column == 1:
                show(shown[0][0], x[0])
                show(shown[0][1], moved[0])
            before, after = (explain(nets[net], at, y, labels[map_])[0] for at in (x, moved))
            top = before.abs().sum(0).max().clamp(min=1e-12)
            for artist, map_now in zip(shown[column], (before, after), strict=True):
                show(artist, (map_now.sum(0, keepdim=True) / top).clamp(-1, 1))
            found = compare(before[None], after[None])
            change, cosine = found["relative_change"][0], found["cosine"][0]
            told.append(f"{METHOD[net][0]}: changed by <b>{change:.0%}</b> of its size, cosine <b>{cosine:.3f}</b>")
        own = " (each network has its own; the picture shows the first's)" if kind == "worst" else ""
        return f"‖η‖ = {length:.3g}{own} — " + "; ".join(told) + "."

    return explore(
        view, update,
        number=widgets.IntSlider(0, min=0, max=len(scene.x) - 1, description="image number"),
        map_=widgets.Dropdown(options=list(labels), description="map"),
        noise=widgets.Dropdown(options=["random noise", "worst noise found"], description="noise"),
        length=log_slider(0.1, (0.001, 10**0.3), "‖η‖: its length"),
    )  # fmt: skip
