"""The explorers of notebook 07: PGD's way on two moons, and an attack on an image."""

import ipywidgets as widgets
import numpy as np
import torch
from torch import Tensor, nn

from ..attacks import pgd
from ..curvature import evaluating
from ..figures.attacks import landscape, picture
from ..figures.style import METHOD
from ..measurements.attacks import path
from ..measurements.curvature import MOONS_BOX, moons_fields, moons_grid
from ..measurements.saliency import Scene
from .engine import Picture, explore, log_slider, panels, show

NORMS = [("L2", "l2"), ("L∞", "linf")]


def path_explorer(model: nn.Module, x: Tensor, y: Tensor, resolution: int = 60) -> widgets.VBox:
    """PGD's way from one point of the two moons, under the radius, the number and the length of its steps.
    ``model``: a net of two moons. ``x, y``: points (n, 2) and labels (n,) that it gets right."""
    grid = moons_grid(resolution)
    x1, x2 = grid.view(resolution, resolution, 2).permute(2, 0, 1).numpy()
    margin, _ = moons_fields(model, grid)
    axis = panels((6.4, 4.2))
    loss = -margin.view(resolution, resolution).numpy()  # of the points of class 1
    mesh, boundary = landscape(axis, x1, x2, loss)
    axis.set(xlabel="x₁", ylabel="x₂", xlim=MOONS_BOX[:2], ylim=MOONS_BOX[2:], aspect="equal")
    axis.set_title("blue: the network is right, red: wrong; line: its decision boundary", fontsize=9)
    (ring,) = axis.plot([], [], "k--", lw=1.2)
    (way,) = axis.plot([], [], ".-", color="k", lw=1, ms=5)
    (begin,) = axis.plot([], [], "o", color="white", mec="k", ms=9)
    (end,) = axis.plot([], [], "X", color="gold", mec="k", ms=10)
    angle = np.linspace(0, 2 * np.pi, 200)
    circle = np.stack([np.cos(angle), np.sin(angle)])
    spheres = {"l2": circle, "linf": circle / np.abs(circle).max(0)}

    def update(point: int, norm: str, eps: float, steps: int, length: float) -> str:
        start, label = x[[point]], y[[point]]
        mesh.set_array(loss if label else -loss)
        points = path(model, start, label, eps, norm=norm, steps=steps, step_size=length * eps)
        ring.set_data(*(start.T.numpy() + eps * spheres[norm]))
        way.set_data(*points[1:].T.numpy())
        begin.set_data(*start.T.numpy())
        end.set_data(*points[-1:].T.numpy())
        with torch.no_grad(), evaluating(model):
            fooled = model(points[-1:]).argmax(1).item() != label.item()
        taken = max(len(points) - 2, 0)
        verdict = "<b>wrong</b> at the end." if fooled else "<b>still right</b>, which proves nothing."
        return f"From a random start, {taken} step{'s' * (taken != 1)} of {length * eps:.3g}: the network is {verdict}"

    return explore(
        Picture([mesh, boundary, ring, way, begin, end]), update,
        point=widgets.IntSlider(0, 0, len(x) - 1, description="point number"),
        norm=widgets.Dropdown(options=NORMS, description="norm"),
        eps=widgets.FloatSlider(0.4, min=0.05, max=1.2, step=0.05, description="ε: radius"),
        steps=widgets.IntSlider(10, 1, 40, description="steps"),
        length=log_slider(0.03, 0.01, 3, "step length / ε"),
    )  # fmt: skip


def attack_explorer(scene: Scene, steps: int = 10) -> widgets.VBox:
    """One image under attack: what is added, what each network then sees, and how sure it is.
    ``scene``: networks and images; images that all networks get right are the best choice."""
    left, middle, right, bars = panels((9.6, 3.2), 1, 4, width_ratios=(1, 1, 1, 1.6))
    empty = np.zeros(scene.x.shape[-2:])
    image = picture(left, empty, "image")
    change = picture(middle, empty, "added (grey: nothing)")
    attacked_image = picture(right, empty, "sum")
    places = np.arange(len(scene.classes))
    before = bars.barh(places - 0.2, 0 * places, 0.38, color="0.75", label="image")
    after = bars.barh(places + 0.2, 0 * places, 0.38, color="0.35", label="sum")
    bars.set(xlim=(0, 1), title="probability of each class")
    bars.set_yticks(places, [name[:10] for name in scene.classes], fontsize=8)
    bars.invert_yaxis()
    bars.legend(fontsize=8, loc="lower right")

    def update(method: str, number: int, norm: str, eps: float) -> str:
        model, x, y = scene.nets[method], scene.x[[number]], scene.y[[number]]
        radius = eps if norm == "l2" else eps / 10
        x_adv = pgd(model, x, y, radius, norm=norm, steps=steps) if eps else x
        with torch.no_grad(), evaluating(model):
            p_before, p_after = model(torch.cat([x, x_adv])).softmax(1).tolist()
        delta = (x_adv - x)[0]
        largest = delta.abs().max().item()
        show(image, x[0])
        show(change, 0.5 + delta / (2 * max(largest, 1e-9)))
        show(attacked_image, x_adv[0])
        for bar, probability in zip([*before, *after], p_before + p_after, strict=True):
            bar.set_width(probability)
        label, seen = int(y), int(np.argmax(p_after))
        verdict = "still seen as" if seen == label else "now seen as"
        return (
            f"{METHOD[method][0]}: a {scene.classes[label]}, {verdict} <b>{scene.classes[seen]}</b> "
            f"(<b>{p_after[seen]:.0%}</b> sure; before <b>{p_before[label]:.0%}</b>). Radius {radius:.3g}; the largest "
            f"change of a pixel is <b>{largest:.3g}</b>."
        )

    nets = [(METHOD[method][0], method) for method in scene.nets]
    return explore(
        Picture([image, change, attacked_image, *before, *after]), update,
        method=widgets.Dropdown(options=nets, description="network"),
        number=widgets.IntSlider(0, 0, len(scene.x) - 1, description="image number"),
        norm=widgets.Dropdown(options=NORMS, description="norm"),
        eps=widgets.FloatSlider(0.4, min=0.0, max=2.0, step=0.05, description="ε: radius (L∞: ε/10)"),
    )  # fmt: skip
