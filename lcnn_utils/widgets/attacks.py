"""What moves in notebook 07: PGD's way on two moons, and an attack on an image."""

from __future__ import annotations

import ipywidgets as widgets
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from ..attacks import pgd
from ..curvature import evaluating
from ..figures.attacks import landscape, picture
from ..figures.style import METHOD
from ..measurements.attacks import path
from ..measurements.curvature import MOONS_BOX, moons_fields, moons_grid
from ..measurements.saliency import Scene
from .engine import Picture, blank, explore, log_slider, show


def path_explorer(model: nn.Module, x: Tensor, y: Tensor, resolution: int = 60) -> widgets.VBox:
    """PGD's way from one point of the two moons, under the radius, the number and the length of its steps.
    ``model``: a net of two moons. ``x, y``: points (n, 2) and labels (n,) that it gets right."""
    grid = moons_grid(resolution)
    margin, _ = moons_fields(model, grid)
    x1, x2 = (v.numpy() for v in grid.view(resolution, resolution, 2).permute(2, 0, 1))
    figure = Figure(figsize=(6.4, 4.2), dpi=90, layout="constrained")
    axis = figure.subplots()
    landscape(axis, x1, x2, -margin.view(resolution, resolution).numpy())
    axis.set(xlabel="x₁", ylabel="x₂", xlim=MOONS_BOX[:2], ylim=MOONS_BOX[2:], aspect="equal")
    axis.set_title("logit₀ − logit₁ and the decision boundary", fontsize=9)
    (ring,) = axis.plot([], [], "k--", lw=1.2)
    (way,) = axis.plot([], [], ".-", color="k", lw=1, ms=5)
    (begin,) = axis.plot([], [], "o", color="white", mec="k", ms=9)
    (end,) = axis.plot([], [], "X", color="gold", mec="k", ms=10)
    picture_ = Picture(figure, [ring, way, begin, end])
    turn = np.linspace(0, 2 * np.pi, 200)
    circle = np.stack([np.cos(turn), np.sin(turn)])
    square = circle / np.abs(circle).max(0)

    def update(point: int, norm: str, eps: float, steps: int, length: float) -> str:
        name = "l2" if norm == "L2" else "linf"
        at, label = x[point : point + 1], y[point : point + 1]
        walked = path(model, at, label, eps, norm=name, steps=steps, step_size=length * eps)
        ring.set_data(*(at[0].numpy()[:, None] + eps * (circle if name == "l2" else square)))
        way.set_data(*walked[1:].T.numpy())
        begin.set_data(*at.T.numpy())
        end.set_data(*walked[-1:].T.numpy())
        with torch.no_grad(), evaluating(model):
            wrong = bool((model(walked[-1:]).argmax(1) != label).any())
        taken = max(len(walked) - 2, 0)
        verdict = "<b>wrong</b> at the end." if wrong else "<b>still right</b>, which proves nothing."
        return f"From a random start, {taken} step{'s' * (taken != 1)} of {length * eps:.3g}: the network is {verdict}"

    return explore(
        picture_, update,
        point=widgets.IntSlider(0, min=0, max=len(x) - 1, description="point number"),
        norm=widgets.Dropdown(options=["L2", "L∞"], description="norm"),
        eps=widgets.FloatSlider(0.4, min=0.05, max=1.2, step=0.05, description="ε: radius"),
        steps=widgets.IntSlider(10, min=1, max=40, description="steps"),
        length=log_slider(10**-1.5, (0.01, 10**0.5), "step length / ε"),
    )  # fmt: skip


def attack_explorer(scene: Scene, steps: int = 10) -> widgets.VBox:
    """One image under attack: what is added, what each network then sees, and how sure it is.
    ``scene``: networks and images; images that all networks get right are the best choice."""
    labels = {METHOD[method][0]: net for method, net in scene.nets.items()}
    figure = Figure(figsize=(9.6, 3.2), dpi=90, layout="constrained")
    left, middle, right, bars = figure.subplots(1, 4, width_ratios=(1, 1, 1, 1.6))
    empty = blank(scene.x.shape[1:])
    shown = [picture(left, empty, "image"), picture(middle, empty, "added (red +, blue −)", signed=1.0)]
    shown.append(picture(right, empty, "sum"))
    at = np.arange(len(scene.classes))
    before = bars.barh(at - 0.2, np.zeros(len(at)), 0.38, color="0.75", label="image")
    after = bars.barh(at + 0.2, np.zeros(len(at)), 0.38, color="#332288", label="sum")
    bars.set(xlim=(0, 1), title="probability of each class")
    bars.set_yticks(at, [name[:10] for name in scene.classes], fontsize=8)
    bars.invert_yaxis()
    bars.legend(fontsize=8, loc="lower right")
    view = Picture(figure, [*shown, *before, *after])

    def update(net: str, number: int, norm: str, eps: float) -> str:
        model, x, y = labels[net], scene.x[number : number + 1], scene.y[number : number + 1]
        name, radius = ("l2", eps) if norm == "L2" else ("linf", eps / 10)
        found = pgd(model, x, y, radius, norm=name, steps=steps) if eps else x
        with torch.no_grad(), evaluating(model):
            sure = model(torch.cat([x, found])).softmax(1).cpu().numpy()
        added = (found - x)[0].cpu()
        top = max(added.abs().sum(0).max().item(), 1e-9)
        for artist, image in zip(shown, (x[0], added.sum(0, keepdim=True) / top, found[0]), strict=True):
            show(artist, image)
        for series, values in ((before, sure[0]), (after, sure[1])):
            for bar, value in zip(series, values, strict=True):
                bar.set_width(float(value))
        seen, label = int(sure[1].argmax()), int(y)
        verdict = "still seen as" if seen == label else "now seen as"
        return (
            f"{net}: a {scene.classes[label]}, {verdict} <b>{scene.classes[seen]}</b> ({sure[1][seen]:.0%} sure; "
            f"before {sure[0][label]:.0%}). Radius {radius:.3g} in {norm}; the largest change of a pixel is "
            f"{added.abs().max():.3g}."
        )

    return explore(
        view, update,
        net=widgets.Dropdown(options=list(labels), description="network"),
        number=widgets.IntSlider(0, min=0, max=len(scene.x) - 1, description="image number"),
        norm=widgets.Dropdown(options=["L2", "L∞"], description="norm"),
        eps=widgets.FloatSlider(0.4, min=0.0, max=2.0, step=0.05, description="ε: radius (L∞: ε/10)"),
    )  # fmt: skip
