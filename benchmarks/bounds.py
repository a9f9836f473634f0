"""The layerwise bounds on 10,200 random nets: is the exact value ever above? `python benchmarks/bounds.py`."""

from __future__ import annotations

import pandas as pd
import torch
from common import write

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


def cnn_frame() -> pd.DataFrame:
    parts = []
    for seed in range(CNNS):
        model, shape = bound.random_cnn(seed)
        x = torch.rand((2, *shape), generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
        scalar = ("margin", "logit")[seed // 4 % 2]
        parts.append(bound.audit(model, x, torch.tensor([0, 2]), scalar).assign(net=seed))
    return pd.concat(parts, ignore_index=True)


def main() -> None:
    torch.set_num_threads(1)
    rows = audit("MLPs", bound.audit_frame(range(MLPS)), MLPS) + audit("CNNs", cnn_frame(), CNNS)
    notes = [
        f"seeds 0 to {MLPS - 1} (MLPs) and 0 to {CNNS - 1} (CNNs), two points each, float64, exact Hessians; points "
        "with a gradient below 1e-100 are left out. “Above” means by more than 1e-9, relatively",
        "(A), (B), (C) are theorems; the published form is implied by every κ ≤ 1",
    ]
    write("bounds", rows, MLPS + CNNS, notes)


if __name__ == "__main__":
    main()
