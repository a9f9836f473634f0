"""What notebook 04 measures: the convolutions and BatchNorms of a net, and what a limit γ of their slopes does."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from ..curvature import geometry
from ..lab import track
from ..nn import LipschitzBatchNorm2d
from ..training import accuracy
from .curvature import layer_calls

STATISTICS = ("as trained", "measured again")  # of the BatchNorms, when γ is changed


def layer_name(name: str) -> str:
    """What a module of ``nn.resnet`` is: "stem", "block 2 conv 1", "block 2 shortcut", "classifier"."""
    block, *path = name.split(".")
    if not path:
        return "stem" if block == "0" else "classifier"
    first = path == ["branch", "0"]
    part = "shortcut" if path[0] == "shortcut" else "conv 1" if first else "conv 2"
    return f"block {int(block) - 2} {part}"


def conv_layers(model: nn.Module, x: Tensor) -> dict[str, tuple[nn.Conv2d, Any, tuple[int, ...]]]:
    """By name, each convolution of a ``nn.resnet``, the BatchNorm after it, and its input's shape for images x."""
    names = {module: name for name, module in model.named_modules()}
    calls = layer_calls(model, x[:1], (nn.Conv2d, nn.BatchNorm2d, LipschitzBatchNorm2d))
    layers = {}
    for (conv, images, _), (norm, _, _) in zip(calls[::2], calls[1::2], strict=True):
        layers[layer_name(names[conv])] = (conv, norm, tuple(images.shape[1:]))
    return layers


@torch.no_grad()
def with_gamma(model: nn.Module, gamma: float, images: Tensor | None = None) -> nn.Module:
    """A copy of ``model`` in eval mode whose γ-BatchNorms have the slope limit ``gamma``.
    With ``images`` (N, C, H, W) their statistics are measured again on these, from the first layer to the last;
    otherwise they stay as they were."""
    model, hooks = copy.deepcopy(model).eval(), []

    def measure(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        var, mean = torch.var_mean(inputs[0], (0, 2, 3))
        norm.get_buffer("running_mean").copy_(mean)
        norm.get_buffer("running_var").copy_(var)

    for layer in model.modules():
        if isinstance(layer, LipschitzBatchNorm2d):
            layer.gamma = gamma
            hooks.append(layer.register_forward_pre_hook(measure))
    if images is not None:
        model(images)
    for hook in hooks:
        hook.remove()
    return model


def gamma_frame(
    models: dict[str, nn.Module], gammas: Iterable[float], test: tuple[Tensor, Tensor], train: Tensor, images: int
) -> pd.DataFrame:
    """What a common γ does to trained nets with γ-BatchNorms, with their statistics and with those of ``train`` images.
    Columns: method, statistics (of STATISTICS), gamma, layer, slope (of that BatchNorm); accuracy on ``test`` (x, y);
    curvature, grad_norm: medians of the margin's C and ‖∇f‖ over its first ``images``."""
    x, y = test
    parts = []
    for (method, model), gamma, statistics in track(list(itertools.product(models.items(), gammas, STATISTICS)), "γ"):
        net = with_gamma(model, gamma, None if statistics == "as trained" else train)
        slopes = {layer: norm.lipschitz_constant().item() for layer, (_, norm, _) in conv_layers(net, x).items()}
        g = geometry(net, x[:images], y[:images], scalar="margin", tol=0.05)
        values = dict(curvature=g.curvature.median().item(), grad_norm=g.grad_norm.median().item())
        values |= dict(gamma=gamma, accuracy=accuracy(net, x, y))
        frame = pd.DataFrame({"layer": list(slopes), "slope": list(slopes.values())} | values)
        parts.append(frame.assign(method=method, statistics=statistics))
    return pd.concat(parts, ignore_index=True)
