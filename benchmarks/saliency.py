"""Time of `stability` for 100 images, 7 lengths and 3 methods: `python benchmarks/saliency.py`."""

from __future__ import annotations

import time

import torch
from common import write

from lcnn_utils.figures.style import METHOD
from lcnn_utils.saliency import randomized, stability
from lcnn_utils.training import build, recipe

ONE_PASS = ("gradient", "input_x_gradient", "gradcam")
SETTINGS: dict[str, dict] = {
    "random η, one-pass maps": dict(methods=ONE_PASS, noise=("random",)),
    "random and worst η, one-pass maps": dict(methods=ONE_PASS),
}


def main() -> None:
    x = torch.rand(100, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    rows = []
    for method in ("standard", "lcnn"):
        net = randomized(build(recipe("cifar10", method)).eval(), x)
        y = net(x).argmax(1)
        stability(net, (x[:2], y[:2]), (0.1,), noise=("random",))  # imports
        for name, settings in SETTINGS.items():
            begun = time.perf_counter()
            frame = stability(net, (x, y), **settings)
            seconds = time.perf_counter() - begun
            rows.append({"net": METHOD[method][0], "what": name, "rows": len(frame), "seconds": seconds})
    notes = ["ResNet-18 of width 16. Random images, shuffled weights: time does not depend on what was learnt."]
    write("saliency", rows, "python benchmarks/saliency.py", 100, 0, notes)


if __name__ == "__main__":
    main()
