"""Ours beside the paper's, made ready for the tables and figures of notebook 08."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
import torch

from .. import training
from ..experiments import comparison, has, how_measured, measured, plus_minus, with_interval
from ..figures.style import METHOD
from ..nn import relu_reading
from ..saliency import explain
from ..training import Recipe, samples
from .curvature import net_frame
from .saliency import Scene
from .training import means_table, trained_net

TABLES = {"paper table 1": "Table 1", "paper table 2": "Table 2", "paper gradient-robustness": "gradient robustness"}
SYMBOL = {"grad_norm": "‖∇f‖", "hessian_norm": "‖∇²f‖", "curvature": "C", "accuracy": "accuracy %"}
SYMBOL |= {"pgd_l2_accuracy": "PGD, L2", "relative_gradient_change": "change of ∇f"}
NAME = {"digits": "digits", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}


def datasets() -> list[str]:
    """The datasets of which there are results, digits first."""
    return [name for name in NAME if has(f"{name}_runs")]


def title(dataset: str) -> str:
    """A dataset and the nets its results belong to, for a figure: ``CIFAR-10, ResNet-10 of width 8``."""
    net = training.recipe(dataset, "lcnn", scale=how_measured(f"{dataset}_runs")["scale"])
    return f"{NAME[dataset]}, {net.model.replace('resnet', 'ResNet-')} of width {net.width}"


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
    for recipe in recipes:
        model = trained_net(recipe, device)
        nets = {"test": {recipe.method: model}, "train": {recipe.method: model}}
        if recipe.method == "standard":
            nets["test"]["relu_reading"] = relu_reading(model)
        for split, count in {"test": images, "train": train or images}.items():
            x, y = (part[:count] for part in samples(recipe, split, next(model.parameters()).device))
            for method, net in nets[split].items():
                frame = net_frame(net, x, y, chunk).assign(dataset=recipe.dataset, seed=recipe.seed, split=split)
                parts.append(frame.assign(method=method, label=METHOD[method][0]))
    return pd.concat(parts, ignore_index=True)


def printed(cell: Any) -> str:
    """Theirs, as it is printed; ± 5 % for what was read off the figure."""
    read_off = cell.quantity == "relative_gradient_change"
    return f"{cell.theirs:g} ± 5 %" if read_off else f"{cell.theirs:.2f} ± {cell.theirs_spread:.2f}"


def cells(dataset: str) -> pd.DataFrame:
    """Every cell the paper prints beside ours on a dataset: :func:`comparison` of each table (column)."""
    parts = [comparison(dataset, source).assign(table=table) for source, table in TABLES.items()]
    return pd.concat(parts, ignore_index=True)


def cells_table(frame: pd.DataFrame) -> pd.DataFrame:
    """:func:`cells` for reading: a row a cell, with the difference and whether it is at most the joint standard
    deviation."""
    rows = []
    for _, cell in frame.iterrows():
        if np.isnan(cell.ours):
            verdict = "not measured"
        elif pd.isna(cell.within):
            verdict = "one run"
        else:
            verdict = "inside" if cell.within else "outside"
        row = {"table": cell.table, "net": cell.method, "": SYMBOL[cell.quantity]}
        row["ε"] = "" if np.isnan(cell.epsilon) else f"{cell.epsilon:g}"
        row |= {"ours": plus_minus(cell.ours, cell.ours_spread), "published": printed(cell)}
        row["published on"] = NAME[cell.their_dataset]
        row["difference"] = "–" if np.isnan(cell.difference) else f"{cell.difference:+.3g}"
        rows.append(row | {"joint standard deviation": verdict})
    return pd.DataFrame(rows)


def side_by_side(frame: pd.DataFrame, table: str) -> pd.DataFrame:
    """One of the paper's tables as it is printed, each cell ``ours [theirs]``: a row a net.
    ``frame``: of :func:`cells`. ``table``: one of :data:`TABLES`' values."""
    rows: dict[str, dict[str, str]] = {}
    for _, cell in frame[frame.table == table].iterrows():
        column = SYMBOL[cell.quantity]
        if not np.isnan(cell.epsilon):
            column = f"ε = {cell.epsilon:g}" if cell.epsilon else "clean"
        row = rows.setdefault(cell.method, {"net": cell.method})
        row[column] = f"{plus_minus(cell.ours, cell.ours_spread)} [{printed(cell)}]"
    return pd.DataFrame(rows.values())


def cost_frame(dataset: str) -> pd.DataFrame:
    """Seconds an epoch of every run, and over Standard's median: columns label, seed, seconds, ratio."""
    runs = measured(f"{dataset}_runs")
    seconds = runs.seconds / runs.epochs
    standard = seconds[runs.method == "standard"].median()  # a process's first run is slow
    return runs[["label", "seed"]].assign(seconds=seconds, ratio=seconds / standard)


def train_test(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean C over images of each run, training images beside test images: columns label, method, seed, train, test.
    ``frame``: of :func:`geometry_frame`."""
    means = frame.pivot_table(index=["label", "method", "seed"], columns="split", values="curvature", sort=False)
    return means.dropna().reset_index().rename_axis(columns=None)


def readings(frame: pd.DataFrame) -> pd.DataFrame:
    """Standard's curvature under both readings, as softplus 1000 and as ReLU: mean and median over images, each with
    its standard deviation over seeds. ``frame``: of :func:`geometry_frame`."""
    frame = frame[(frame.split == "test") & frame.method.isin(["standard", "relu_reading"])]
    columns = {"C of the loss": "curvature", "C of the margin": "margin_curvature", "‖∇²f‖": "hessian_norm"}
    groups = frame.groupby(["label", "seed"], sort=False)
    runs = {}
    for name, column in columns.items():
        runs[f"{name}, mean"] = groups[column].mean()
        runs[f"{name}, median"] = groups[column].median()
    table = means_table(pd.DataFrame(runs).reset_index(), "label", {name: name for name in runs})
    return table.rename(columns={"label": "net"})


def saliency_gallery(scene: Scene, methods: dict[str, str], images: int = 4) -> tuple[list, dict[str, list], list[str]]:
    """Images all nets get right, and their maps, as ``figures.saliency.maps`` takes them.
    ``methods``: of :func:`saliency.explain` → what the column's title calls it."""
    known = scene.correct().first(images)
    columns = {}
    for method, name in methods.items():
        for net_name, net in known.nets.items():
            columns[f"{METHOD[net_name][0]},\n{name}"] = pictures(explain(net, known.x, known.y, method))
    return pictures(known.x), columns, [known.classes[label] for label in known.y.tolist()]


def pictures(images: torch.Tensor) -> list[np.ndarray]:
    """Images or maps (N, C, H, W) as figures take them: arrays (H, W) or (H, W, 3)."""
    return [image.permute(1, 2, 0).squeeze(-1).cpu().numpy() for image in images]


def readable_claims(frame: pd.DataFrame, heading: str = "claim") -> pd.DataFrame:
    """A table of ``experiments.claims`` for reading: a row per claim, ours with its interval, verdicts in words."""
    columns = {heading: frame.claim, "what is measured": frame.value, "asked": frame.rule}
    published = [with_interval(theirs, np.nan, np.nan) for theirs in frame.theirs]
    ours = list(map(with_interval, frame.ours, frame.low, frame.high))
    return pd.DataFrame(columns | {"published": published, "ours": ours, "verdict": frame.verdict})
