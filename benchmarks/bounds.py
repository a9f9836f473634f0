"""The layerwise bounds on many random nets (is the exact value ever above?), and what they cost."""

from __future__ import annotations

import time

import pandas as pd
import torch
from common import interleaved, write
from torch import nn

from lcnn_utils import nn as models
from lcnn_utils.curvature import bounds
from lcnn_utils.measurements import bound as measurements

MLPS, CNNS, SLACK = 10_000, 200, 1 + 1e-9
DEPTHS = (4, 8, 16, 32, 64)


def audit(kind: str, frame: pd.DataFrame, nets: int) -> list[dict]:
    """How often the exact value exceeds each bound, in points and in nets."""
    frame = frame[frame.gradient > 0]
    rows = []
    pairs = {"(A) local": ("hessian", "local"), "(B) data-free": ("hessian", "data_free")}
    pairs |= {"(C) normalised": ("curvature", "normalised")}
    pairs |= {"published": ("curvature", "published"), "published, times n_i": ("curvature", "published_widths")}
    for name, (exact, bound) in pairs.items():
        ratio = frame[exact] / frame[bound]
        bad = ratio > SLACK
        rows.append(
            {
                "nets": f"{nets} {kind}", "bound": name, "points": len(frame), "points above": int(bad.sum()),
                "nets above": int(frame.net[bad].nunique()), "largest exact / bound": ratio.max(),
                "median bound / exact": (1 / ratio[ratio > 0]).median(),
            }
        )  # fmt: skip
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
    return measurements.scramble(model, seed), (channels, size, size)


def cnn_frame() -> pd.DataFrame:
    parts = []
    for seed in range(CNNS):
        model, shape = random_cnn(seed)
        x = torch.rand((2, *shape), generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
        scalar = bounds.SCALARS[seed // 4 % 2]
        parts.append(measurements.audit(model, x, torch.tensor([0, 2]), scalar).assign(net=seed))
    return pd.concat(parts, ignore_index=True)


def once(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def costs() -> tuple[list[dict], list[dict]]:
    """Seconds of the two stated sizes, and of (B) against depth."""
    big = models.resnet(18, num_classes=100, width=64, lcnn=True).eval()
    mlp = models.mlp([64, 64, 64, 10], lcnn=True).eval()
    x, y = torch.rand(100, 64, generator=torch.Generator().manual_seed(0)), torch.arange(100) % 10
    cases = {
        "curvature_bound, ResNet-18 of width 64, certified": lambda: bounds.curvature_bound(big, (3, 32, 32)),
        "the same, estimated norms": lambda: bounds.curvature_bound(big, (3, 32, 32), certified=False),
        "local_bound, 100 digits, MLP 64–64–64–10": lambda: bounds.local_bound(mlp, x, y),
        "certified_radius, the same": lambda: bounds.certified_radius(mlp, x, y),
    }
    timed = [{"what": what, "best of 3, seconds": min(once(run) for _ in range(3))} for what, run in cases.items()]
    nets = {depth: models.mlp([32] * (depth + 1) + [10], beta=5.0).eval() for depth in DEPTHS}
    runs = {f"{d} layers": (lambda net=net: bounds.curvature_bound(net, (32,))) for d, net in nets.items()}
    result = interleaved(runs, rounds=15)
    grown = [
        {"layers": depth, "layers / first": depth / DEPTHS[0], "time / first": result[f"{depth} layers"]["ratio"]}
        for depth in DEPTHS
    ]
    return timed, grown


def main() -> None:
    timed, grown = costs()
    command = "python benchmarks/bounds.py"
    notes = [
        "certified norms of all 20 convolutions; two threads on two cores where the provenance says so",
        "second table: cost of (B) against the number of layers (MLPs of width 32): at most linear, as a part is fixed",
    ]
    write("bounds_cost", [*timed, *grown], command, n=15, seed=0, notes=notes)
    torch.set_num_threads(1)
    rows = audit("MLPs", measurements.audit_frame(range(MLPS), points=2), MLPS) + audit("CNNs", cnn_frame(), CNNS)
    write(
        "bounds", rows, command, n=MLPS + CNNS, seed=0,
        notes=[
            f"seeds 0 to {MLPS - 1} (MLPs) and 0 to {CNNS - 1} (CNNs), two points each, float64, exact "
            "Hessians; points with a gradient below 1e-100 are left out. “Above” means by more than 1e-9, relatively",
            "(A), (B), (C) are theorems; the published form is implied by every κ ≤ 1",
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
