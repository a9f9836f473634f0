"""The layerwise bounds on 10,200 random nets: is the exact value ever above? `python benchmarks/bounds.py`."""

from __future__ import annotations

import pandas as pd
import torch
from common import write
from torch import nn

from lcnn_utils import nn as models
from lcnn_utils.measurements import bound

MLPS, CNNS, SLACK = 10_000, 200, 1 + 1e-9
PAIRS = {
    "(A) local": ("hessian", "local"),
    "(B) data-free": ("hessian", "data_free"),
    "(C) normalised": ("curvature", "normalised"),
    "published": ("curvature", "published"),
    "published, times n_i": ("curvature", "published_widths"),
}


def audit(kind: str, frame: pd.DataFrame, nets: int) -> list[dict]:
    """How often the exact value exceeds each bound, in points and in nets."""
    frame, rows = frame[frame.gradient > 0], []
    for name, (exact, above) in PAIRS.items():
        ratio = frame[exact] / frame[above]
        bad = ratio > SLACK
        row = {"nets": f"{nets} {kind}", "bound": name, "points": len(frame), "points above": int(bad.sum())}
        row |= {"nets above": int(frame.net[bad].nunique()), "largest exact / bound": ratio.max()}
        rows.append(row | {"median bound / exact": (1 / ratio[ratio > 0]).median()})
    return rows


def random_cnn(seed: int) -> tuple[nn.Module, tuple[int, int, int]]:
    """A small ResNet, VGG or plain CNN with random weights in float64, and the shape of its input."""
    generator = torch.Generator().manual_seed(seed)
    channels, size = (int(torch.randint(*ends, (), generator=generator)) for ends in ((1, 3), (2, 5)))
    options: dict = dict(num_classes=3, width=1, in_channels=channels, image_size=size, lcnn=bool(seed % 2), beta=3.0)
    model: nn.Module = models.vgg11(**options) if seed % 4 == 2 else models.resnet(10, **options)
    if seed % 4 == 3:
        model = nn.Sequential(
            nn.Conv2d(channels, 4, 3, 2, 1, groups=channels), nn.BatchNorm2d(4), nn.Softplus(2.0), nn.ZeroPad2d(1),
            nn.AvgPool2d(2, 1, 1, count_include_pad=False), nn.Conv2d(4, 3, 2),
            models.LipschitzBatchNorm2d(3, affine=True), models.CenteredSoftplus(4.0, cap=1.0),
            nn.AdaptiveAvgPool2d((2, 1)), nn.Flatten(), nn.Linear(6, 3), nn.BatchNorm1d(3),
        )  # fmt: skip
    return bound.scramble(model, seed), (channels, size, size)


def cnn_frame() -> pd.DataFrame:
    parts = []
    for seed in range(CNNS):
        model, shape = random_cnn(seed)
        x = torch.rand((2, *shape), generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
        scalar = ("margin", "logit")[seed // 4 % 2]
        parts.append(bound.audit(model, x, torch.tensor([0, 2]), scalar).assign(net=seed))
    return pd.concat(parts, ignore_index=True)


def main() -> None:
    torch.set_num_threads(1)
    rows = audit("MLPs", bound.audit_frame(range(MLPS), points=2), MLPS) + audit("CNNs", cnn_frame(), CNNS)
    notes = [
        f"seeds 0 to {MLPS - 1} (MLPs) and 0 to {CNNS - 1} (CNNs), two points each, float64, exact Hessians; points "
        "with a gradient below 1e-100 are left out. “Above” means by more than 1e-9, relatively",
        "(A), (B), (C) are theorems; the poster's form is implied by every κ ≤ 1",
    ]
    write("bounds", rows, MLPS + CNNS, notes)


if __name__ == "__main__":
    main()
