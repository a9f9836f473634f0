"""Ten epochs of `fit` on one's own network, relative to a loop written by hand: `python benchmarks/fit.py`.

torchvision's ResNet-18 and 200 random images of 64 × 64 pixels in 3 classes, in batches of 50."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import interleaved, write
from torch.optim.lr_scheduler import OneCycleLR
from torchvision.models import resnet18

from lcnn_utils.lab import keep_memory, one_thread
from lcnn_utils.training import fit


def by_hand(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    """Ten epochs as anybody would write them."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9, nesterov=True, weight_decay=5e-4, fused=True)
    schedule = OneCycleLR(optimizer, 0.01, total_steps=10 * 4)
    model.train()
    for index in torch.stack([torch.randperm(200) for _ in range(10)]).view(-1, 50):
        loss = F.cross_entropy(model(x[index]), y[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def main() -> None:
    one_thread()
    keep_memory()
    x, y = torch.rand(200, 3, 64, 64), torch.arange(200) % 3
    model = resnet18(num_classes=3)
    options = dict(method="standard", epochs=10, batch_size=50, lr=0.01, device="cpu", progress=False)
    contestants = {
        "by hand": lambda: by_hand(model, x, y),
        "fit, curvature=False": lambda: fit(model, (x, y), curvature=False, **options),
        "fit": lambda: fit(model, (x, y), **options),
    }
    rows = []
    for name, times in interleaved(contestants, rounds=6, seconds=600).items():
        rows.append({"ten epochs": name, "/ by hand": times["ratio"], "quartiles": times["quartiles"]})
    notes = [
        "The whole call, with its checks of data and model, and BatchNorm's statistics taken again at the end. With "
        "`curvature`, after each epoch statistics from all 200 images (512 at most) and C of one: the more images an "
        "epoch has, the smaller their share."
    ]
    write("fit_cpu", rows, 200, notes)


if __name__ == "__main__":
    main()
