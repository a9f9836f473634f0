"""Ours beside the paper's, made ready for the tables and figures of notebook 08."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch

from .. import training
from ..experiments import comparison, has, how_measured, measured, plus_minus, with_interval
from .curvature import means_table

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


def printed(cell: Any) -> str:
    """Theirs, as it is printed; ± 5 % for what was read off the figure."""
    read_off = cell.quantity == "relative_gradient_change"
    return f"{cell.theirs:g} ± 5 %" if read_off else f"{cell.theirs:.2f} ± {cell.theirs_sd:.2f}"


def cells(dataset: str) -> pd.DataFrame:
    """Every cell the paper prints beside ours on a dataset: :func:`comparison` of each table (column)."""
    parts = [comparison(dataset, source).assign(table=table) for source, table in TABLES.items()]
    return pd.concat(parts, ignore_index=True)


def cells_table(frame: pd.DataFrame) -> pd.DataFrame:
    """:func:`cells` for reading: a row a cell, with the difference and whether it is at most the joint standard
    deviation."""
    verdict = frame.within.map({True: "inside", False: "outside"}).fillna("one run")
    columns = {"table": frame.table, "net": frame.method, "": frame.quantity.map(SYMBOL)}
    columns["ε"] = frame.epsilon.map("{:g}".format).replace("nan", "")
    columns["ours"] = frame.apply(lambda cell: plus_minus(cell.ours, cell.ours_sd), axis=1)
    columns["published"] = frame.apply(printed, axis=1)
    columns["published on"] = frame.their_dataset.map(NAME)
    columns["difference"] = frame.difference.map("{:+.3g}".format).replace("+nan", "–")
    columns["joint standard deviation"] = verdict.where(frame.ours.notna(), "not measured")
    return pd.DataFrame(columns)


def cost_frame(dataset: str) -> pd.DataFrame:
    """Seconds an epoch of every run, and over Standard's median: columns label, seed, seconds, ratio."""
    runs = measured(f"{dataset}_runs")
    seconds = runs.seconds / runs.epochs
    standard = seconds[runs.method == "standard"].median()  # a process's first run is slow
    return runs[["label", "seed"]].assign(seconds=seconds, ratio=seconds / standard)


def train_test(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean C over images of each run, training images beside test images: columns label, method, seed, train, test.
    ``frame``: a table of geometry."""
    means = frame.pivot_table(index=["label", "method", "seed"], columns="split", values="curvature", sort=False)
    return means.dropna().reset_index().rename_axis(columns=None)


def readings(frame: pd.DataFrame) -> pd.DataFrame:
    """Standard's curvature under both readings, as softplus 1000 and as ReLU: mean and median over images, each with
    its standard deviation over seeds. ``frame``: a table of geometry."""
    frame = frame[(frame.split == "test") & frame.method.isin(["standard", "relu_reading"])]
    titles = {"curvature": "C of the loss", "margin_curvature": "C of the margin", "hessian_norm": "‖∇²f‖"}
    groups = frame.rename(columns=titles).groupby(["label", "seed"], sort=False)
    runs = groups[list(titles.values())].agg(["mean", "median"])
    runs.columns = runs.columns.map(", ".join)
    table = means_table(runs.reset_index(), "label", {str(name): str(name) for name in runs})
    return table.rename(columns={"label": "net"})


def pictures(images: torch.Tensor) -> list[np.ndarray]:
    """Images or maps (N, C, H, W) as figures take them: arrays (H, W) or (H, W, 3)."""
    return [image.permute(1, 2, 0).squeeze(-1).cpu().numpy() for image in images]


def readable_claims(frame: pd.DataFrame, heading: str = "claim") -> pd.DataFrame:
    """A table of ``experiments.claims`` for reading: a row per claim, ours with its interval, verdicts in words."""
    columns = {heading: frame.claim, "what is measured": frame.value, "asked": frame.rule}
    published = [with_interval(theirs, np.nan, np.nan) for theirs in frame.theirs]
    ours = list(map(with_interval, frame.ours, frame.low, frame.high))
    return pd.DataFrame(columns | {"published": published, "ours": ours, "verdict": frame.verdict})
