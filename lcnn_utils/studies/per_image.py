"""The geometry of stored networks, image by image: what the paper's Table 1 averages, on test and training images."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd
import torch
from torch import Tensor, nn

from ..curvature import geometry
from ..experiments import run
from ..figures.style import METHOD
from ..nn import relu_reading
from ..training import Recipe, samples

COLUMNS = ("grad_norm", "hessian_norm", "curvature", "margin_curvature")


def net_frame(net: nn.Module, x: Tensor, y: Tensor, chunk: int = 100) -> pd.DataFrame:
    """A row an image: grad_norm, hessian_norm, curvature (of the true label's loss), margin_curvature, correct.

    Args:
        x, y: images (N, C, H, W) in [0, 1], labels (N,). chunk: images measured at a time.
    """
    parts = []
    for xs, ys in zip(x.split(chunk), y.split(chunk), strict=True):
        g, margin = (geometry(net, xs, ys, scalar=scalar) for scalar in ("loss", "margin"))
        with torch.no_grad():
            correct = net(xs).argmax(1) == ys
        values = dict(zip(COLUMNS, (g.grad_norm, g.hessian_norm, g.curvature, margin.curvature), strict=True))
        parts.append(pd.DataFrame({k: v.cpu().numpy() for k, v in (values | {"correct": correct}).items()}))
    frame = pd.concat(parts, ignore_index=True)
    return frame.assign(image=range(len(frame)))


def geometry_frame(
    recipes: Iterable[Recipe],
    *,
    images: int = 1000,
    train: int | None = None,
    chunk: int = 100,
    device: torch.device | None = None,
) -> pd.DataFrame:
    """:func:`net_frame` of stored runs on their first test and first training images; Standard as ReLU too (test).

    Args:
        images: of the test split; ``train``: of the training split, default as many. chunk: of :func:`net_frame`.

    Columns added: dataset, method (``relu_reading`` for the same weights read as ReLU), label, seed, split.
    """
    parts = []
    for one in recipes:
        model = run(one, device=device, progress=False).model
        assert model is not None
        readings = {one.method: model} | ({"relu_reading": relu_reading(model)} if one.method == "standard" else {})
        for split, count in {"test": images, "train": train or images}.items():
            x, y = (part[:count] for part in samples(one, split, next(model.parameters()).device))
            for name, net in readings.items():
                if name == one.method or split == "test":
                    frame = net_frame(net, x, y, chunk).assign(dataset=one.dataset, seed=one.seed, split=split)
                    parts.append(frame.assign(method=name, label=METHOD[name][0]))
    return pd.concat(parts, ignore_index=True)
