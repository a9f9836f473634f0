"""Ours beside the paper's, made ready for tables and figures: notebook 08."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
import torch

from ..experiments import comparison, has, how_measured, measured, run
from ..figures.style import METHOD
from ..nn import relu_reading
from ..saliency import explain
from ..training import Recipe, samples
from .curvature import net_frame as net_frame
from .saliency import Scene
from .training import layer_frame

TABLES = {"paper table 1": "Table 1", "paper table 2": "Table 2", "paper gradient-robustness": "gradient robustness"}
SYMBOL = {"grad_norm": "‖∇f‖", "hessian_norm": "‖∇²f‖", "curvature": "C", "accuracy": "accuracy %"}
SYMBOL |= {"pgd_l2_accuracy": "PGD, L2", "relative_gradient_change": "change of ∇f"}
SCALE = {"lab": "ResNet-10 of width 8", "tiny": "ResNet-10 of width 8", "small": "ResNet-18 of width 16"}
SCALE |= dict.fromkeys(("wide", "paper"), "ResNet-18 of width 64")
NAME = {"digits": "digits", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}


def geometry_frame(
    recipes: Iterable[Recipe],
    *,
    images: int = 1000,
    train: int | None = None,
    chunk: int = 100,
    device: torch.device | None = None,
) -> pd.DataFrame:
    """:func:`net_frame` of stored runs on their first test and first training images; Standard as ReLU too (test).
    ``images``: of the test split; ``train``: of the training split, default as many. Columns added: dataset, method
    (``relu_reading`` for the same weights read as ReLU), label, seed, split."""
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


def datasets() -> list[str]:
    """The datasets of which there are results, digits first."""
    return [name for name in NAME if has(f"{name}_runs")]


def title(dataset: str) -> str:
    """A dataset and the nets its results belong to, for a figure: ``CIFAR-10, ResNet-10 of width 8``."""
    return f"{NAME[dataset]}, {SCALE[how_measured(f'{dataset}_runs')['scale']]}"


def plus_minus(mean: float, spread: float) -> str:
    """Ours: four digits, ± to the same place; without a spread the mean alone; – where there is none."""
    if not np.isfinite(mean):
        return "–"
    digits = int(np.clip(3 - np.floor(np.log10(abs(mean))), 0, 9)) if mean else 1
    return f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if np.isfinite(spread) else "")


def printed(row: Any) -> str:
    """Theirs, as it is printed; ± 5 % for what was read off the figure."""
    read_off = row.quantity == "relative_gradient_change"
    return f"{row.theirs:g} ± 5 %" if read_off else f"{row.theirs:.2f} ± {row.theirs_spread:.2f}"


def cells(dataset: str) -> pd.DataFrame:
    """Every cell the paper prints beside ours on a dataset: :func:`comparison` of each table (column)."""
    parts = [comparison(dataset, source).assign(table=table) for source, table in TABLES.items()]
    return pd.concat(parts, ignore_index=True)


def cells_table(frame: pd.DataFrame) -> pd.DataFrame:
    """:func:`cells` for reading: a row a cell, with the difference and whether it is inside the joint spread."""
    verdict = {True: "inside", False: "outside"}
    rows, cells = list[dict[str, str]](), list[Any](frame.itertuples())
    for r in cells:
        within = "not measured" if np.isnan(r.ours) else "one run" if pd.isna(r.within) else verdict[bool(r.within)]
        rows.append({
            "table": r.table, "net": r.method, "": SYMBOL[r.quantity],
            "ε": "" if np.isnan(r.epsilon) else f"{r.epsilon:g}",
            "ours": plus_minus(r.ours, r.ours_spread), "published": printed(r),
            "published on": NAME[r.their_dataset], "difference": f"{r.difference:+.3g}" if r.ours == r.ours else "–",
            "joint spread": within,
        })  # fmt: skip
    return pd.DataFrame(rows)


def side_by_side(frame: pd.DataFrame, table: str) -> pd.DataFrame:
    """One of the paper's tables as it is printed, each cell ``ours [theirs]``: a row a net.
    ``frame``: of :func:`cells`. ``table``: one of :data:`TABLES`' values."""
    rows: dict[str, dict[str, str]] = {}
    for r in list[Any](frame[frame.table == table].itertuples()):
        column = SYMBOL[r.quantity] if np.isnan(r.epsilon) else "clean" if r.epsilon == 0 else f"ε = {r.epsilon:g}"
        text = f"{plus_minus(r.ours, r.ours_spread)} [{printed(r)}]"
        rows.setdefault(str(r.method), {"net": str(r.method)})[column] = text
    return pd.DataFrame(rows.values())


def cost_frame(dataset: str) -> pd.DataFrame:
    """Seconds an epoch of every run, and over Standard's median: columns label, seed, seconds, ratio."""
    runs = measured(f"{dataset}_runs")
    seconds = runs.seconds / runs.epochs
    base = seconds[runs.method == "standard"].median()  # a process's first run is slow
    return pd.DataFrame({"label": runs.label, "seed": runs.seed, "seconds": seconds, "ratio": seconds / base})


def trained_layers(recipes: Iterable[Recipe]) -> pd.DataFrame:
    """β and γ of every layer at the end of training: ``methods.layer_frame`` with columns method, label, seed."""
    parts = []
    for one in recipes:
        last = run(one, weights=False, progress=False).history.tail(1)
        parts.append(layer_frame(last).assign(method=one.method, label=METHOD[one.method][0], seed=one.seed))
    return pd.concat(parts, ignore_index=True)


def train_test(frame: pd.DataFrame, column: str = "curvature") -> pd.DataFrame:
    """Mean over images of each run, training images beside test images: columns label, method, seed, train, test.
    ``frame``: of :func:`geometry_frame`. ``column``: of it."""
    means = frame.pivot_table(index=["label", "method", "seed"], columns="split", values=column, sort=False)
    return means.dropna().reset_index().rename_axis(columns=None)


def readings(frame: pd.DataFrame) -> pd.DataFrame:
    """Standard's curvature under both readings, as softplus 1000 and as ReLU, with medians: mean ± over seeds."""
    frame = frame[(frame.split == "test") & frame.method.isin(["standard", "relu_reading"])]
    columns = {"C of the loss": "curvature", "C of the margin": "margin_curvature", "‖∇²f‖": "hessian_norm"}
    rows = []
    for label, part in frame.groupby("label", sort=False):
        row = {"net": str(label)}
        for name, column in columns.items():
            for what in ("mean", "median"):
                over = part.groupby("seed")[column].agg(what)
                row[f"{name}, {what}"] = plus_minus(over.mean(), over.std())
        rows.append(row)
    return pd.DataFrame(rows)


def saliency_gallery(here: Scene, methods: dict[str, str], images: int = 4) -> tuple[list, dict[str, list], list[str]]:
    """Images all nets get right, and their maps, as ``figures.saliency.maps`` takes them.
    ``here``: nets and test images. ``methods``: of :func:`saliency.explain` → what the column's title calls it."""
    with torch.no_grad():
        right = torch.stack([net(here.x).argmax(1) == here.y for net in here.nets.values()]).all(0)
    chosen = right.nonzero().flatten()[:images]
    x, y = here.x[chosen], here.y[chosen]
    flat = lambda maps: [m.squeeze(0).cpu().numpy() if len(m) == 1 else m.permute(1, 2, 0).cpu().numpy() for m in maps]
    columns = {
        f"{METHOD[name][0]},\n{called}": flat(explain(net, x, y, method))
        for method, called in methods.items()
        for name, net in here.nets.items()
    }
    return flat(x), columns, [here.classes[i] for i in y.tolist()]


def readable_claims(frame: pd.DataFrame, heading: str = "claim") -> pd.DataFrame:
    """A table of ``experiments.claims`` for reading: a row per claim, ours with its interval, verdicts in words."""
    number = lambda v: "–" if np.isnan(v) else f"{v:.3g}"
    rows = zip(frame.ours, frame.low, frame.high, strict=True)
    ours = [number(v) + ("" if np.isnan(low) else f" ({number(low)} – {number(high)})") for v, low, high in rows]
    columns = {heading: frame.claim, "what is measured": frame.value, "asked": frame.rule}
    return pd.DataFrame(columns | {"published": frame.theirs.map(number), "ours": ours, "verdict": frame.verdict})
