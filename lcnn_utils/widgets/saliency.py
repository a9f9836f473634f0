"""The explorer of notebook 06: maps of two networks while noise is added to an image."""

from collections.abc import Sequence

import ipywidgets as widgets
import numpy as np
import torch

from ..attacks import direction, mirror, move
from ..figures.attacks import picture
from ..figures.style import METHOD
from ..measurements.saliency import Scene
from ..saliency import MAPS, compare, explain, worst_step
from .engine import Picture, explore, log_slider, panels, show


def noise_explorer(
    scene: Scene, methods: Sequence[str] = ("gradient", "smoothgrad", "integrated_gradients")
) -> widgets.VBox:
    """An image and its maps of the label's logit by two networks, before and after noise of a chosen length.
    ``scene``: its first two networks are compared, on images that both get right. ``methods``: of
    :func:`saliency.explain`, to choose from; random noise keeps its direction when its length changes, and the worst is
    the gradient's, whatever map is shown."""
    nets = dict(list(scene.nets.items())[:2])
    axes = panels((9.6, 4.3), 2, 1 + len(nets))
    empty = np.zeros(scene.x.shape[-2:])
    image, noisy_image = picture(axes[0, 0], empty, "image"), picture(axes[1, 0], empty, "with noise")
    maps, noisy_maps = {}, {}
    for column, net in enumerate(nets, 1):
        maps[net] = picture(axes[0, column], empty, f"{METHOD[net][0]}: map", signed=1.0)
        noisy_maps[net] = picture(axes[1, column], empty, "with noise", signed=1.0)
    shown = Picture([image, noisy_image, *maps.values(), *noisy_maps.values()])
    generator = torch.Generator().manual_seed(0)
    directions = direction(torch.randn(scene.x.shape, generator=generator), "l2").to(scene.x)

    def update(number: int, method: str, noise: str, length: float) -> str:
        x, y = scene.x[[number]], scene.y[[number]]
        changes = []
        for net, model in nets.items():
            if noise == "worst":
                step = worst_step(model, x, y, length, scalar="logit", steps=5)[0]
            else:
                step = mirror(x, length * directions[[number]], (0.0, 1.0))
            noisy = move(x, step, (0.0, 1.0))
            if net == next(iter(nets)):
                show(image, x[0])
                show(noisy_image, noisy[0])
            before = explain(model, x, y, method)
            after = explain(model, noisy, y, method)
            largest = before.abs().sum(1).max().clamp(min=1e-12)
            show(maps[net], (before[0].sum(0, keepdim=True) / largest).clamp(-1, 1))
            show(noisy_maps[net], (after[0].sum(0, keepdim=True) / largest).clamp(-1, 1))
            result = compare(before, after)
            changes.append(
                f"{METHOD[net][0]}: changed by <b>{result['relative_change'][0]:.0%}</b> of its size, "
                f"cosine <b>{result['cosine'][0]:.3f}</b>"
            )
        whose = " (each network has its own; the picture shows the first's)" if noise == "worst" else ""
        return f"‖η‖ = {length:.3g}{whose} — {'; '.join(changes)}."

    kinds = [("random noise", "random"), ("worst for the gradient", "worst")]
    return explore(
        shown, update,
        number=widgets.IntSlider(0, 0, len(scene.x) - 1, description="image number"),
        method=widgets.Dropdown(options=[(MAPS[method], method) for method in methods], description="map"),
        noise=widgets.Dropdown(options=kinds, description="noise"),
        length=log_slider(0.1, 0.001, 2, "‖η‖: its length"),
    )  # fmt: skip
