"""Why narrow networks learn little of CIFAR-100: their classifier has norm 1, as in the authors' code, so their logits
hardly differ. `python benchmarks/classifier.py [METHOD ...]`, ten minutes a line; it needs CIFAR-100 on the disk.
"""

from __future__ import annotations

import math
import sys

import torch
from common import write
from torch import Tensor, nn

from lcnn_utils import data
from lcnn_utils.figures.style import METHOD
from lcnn_utils.lab import one_thread
from lcnn_utils.training import accuracy, build, fit, recipe, samples

NARROW = dict(model="resnet10", width=8, epochs=8, lr=0.1, lambda_beta=3e-3, lambda_gamma=3e-3)


class Scale(nn.Module):
    """The logits times a trained number: the margins' C stays, the loss's does not."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, logits: Tensor) -> Tensor:
        return logits * self.log_scale.exp()


def main(*methods: str) -> None:
    one_thread()
    train, rows, n = data.load("cifar100", "train"), [], 1000
    for method in methods or ("standard", "lcnn"):
        settings = recipe("cifar100", method, **NARROW)
        x, y = samples(settings, "test")
        norm, free, scaled = (build(settings) for _ in range(3))
        free[-1] = nn.Linear(free[-1].in_features, 100)
        scaled.append(Scale())
        for name, net in {"norm 1 (as published)": norm, "free": free, "norm 1, scaled": scaled}.items():
            options = {k: getattr(settings, k) for k in ("epochs", "lr", "lambda_beta", "lambda_gamma", "augment")}
            _, history = fit(net, train, method=method, bfloat16=True, curvature=False, progress=False, **options)
            with torch.no_grad():
                spread = net(x[:n]).std(1).mean().item()
            row = {"net": METHOD[method][0], "classifier": name, "test accuracy %": 100 * accuracy(net, x, y)}
            row |= {"training accuracy %": 100 * history.accuracy.iloc[-1], "logits' standard deviation": spread}
            scale = math.exp(net[-1].log_scale.item()) if name == "norm 1, scaled" else None
            rows.append(row | {"scale": scale, "minutes": history.attrs["seconds"] / 60})
    notes = [
        f"CIFAR-100, ResNet-10 of width 8, {settings.epochs} epochs, one seed; accuracy on all test images, the "
        f"standard deviation of an image's logits over classes on the first {n}.",
    ]
    write("classifier_cifar100", rows, n, notes)


if __name__ == "__main__":
    main(*sys.argv[1:])
