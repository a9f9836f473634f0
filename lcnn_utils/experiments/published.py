"""The numbers that the paper and others printed (``data/published``), and ours (``tables``), as tidy frames."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..lab import PROJECT, store_root
from . import tables

RESULTS = PROJECT / "data" / "results"
TABLES = PROJECT / "data" / "published" / "paper_tables.csv"
SCALES = ("paper", "wide", "small", "tiny")  # of results, the best first; those of digits and two moons have no scale
CELL = ["method", "quantity", "epsilon"]
READING = 0.05  # relative error of the values read off the printed figure


def numbers(source: str | None = None) -> pd.DataFrame:
    """Columns source, dataset, architecture, method (its label), quantity, epsilon, mean, spread.

    Args:
        source: only rows whose source begins so: ``paper table 1`` (CIFAR-100, ResNet-18: geometry and accuracy in
            %, ± over two runs), ``paper table 2`` (PGD), ``paper gradient-robustness figure``, ``course project``.

    Raises:
        FileNotFoundError: the table is not there.
        ValueError: no row is of that source.
    """
    if not TABLES.is_file():
        raise FileNotFoundError(f"{TABLES} is missing: restore it with git")
    frame = pd.read_csv(TABLES)
    chosen = frame if source is None else frame[frame.source.str.startswith(source)]
    if not len(chosen):
        raise ValueError(f"nothing is published as {source!r}: known are {', '.join(frame.source.unique())}")
    return chosen.reset_index(drop=True)


def folders() -> tuple[Path, ...]:
    """Where tables of ours are looked for: ``data/results`` of the project, then ``results`` of the store."""
    return tuple(dict.fromkeys((RESULTS, store_root() / "results")))


def best(name: str) -> str:
    """``DATASET_KIND`` → the table's name at the dataset's best scale: ``cifar10_curves`` → ``cifar10_tiny_curves``.

    The scale is that of the best ``_runs`` table with a Standard net in it: scales are never mixed.
    """
    dataset, _, kind = name.partition("_")
    for scale in SCALES if kind and not tables.parts(folders(), name) else ():
        runs = f"{dataset}_{scale}_runs"
        known, other = tables.parts(folders(), runs, "*-standard-*"), tables.parts(folders(), runs, "")
        if known or (other and "standard" in set(tables.read(folders(), runs, "").method)):
            return f"{dataset}_{scale}_{kind}"
    return name


def has(name: str) -> bool:
    """Whether there is such a table of ours."""
    return bool(tables.parts(folders(), best(name)))


def measured(name: str) -> pd.DataFrame:
    """A table of ours, which ``python benchmarks/evaluate.py`` makes; :func:`about` says how.

    Args:
        name: ``DATASET_KIND`` takes the best scale there is (:data:`SCALES`), ``DATASET_SCALE_KIND`` just that.

    Raises:
        FileNotFoundError: there is no such table; the message lists those there are.
        RuntimeError: it is damaged.
    """
    _require(name)
    return tables.read(folders(), best(name))


def about(name: str) -> dict[str, Any]:
    """What produced a table of :func:`measured`: command, hardware, versions, seeds, n, scale. Errors as there."""
    _require(name)
    return tables.about(folders(), best(name))


def _require(name: str) -> None:
    if not has(name):
        there = ", ".join(tables.names(folders())) or "none"
        raise FileNotFoundError(f"no results called {name!r} in data/results (there are: {there})")


def save_measured(frame: pd.DataFrame, name: str, provenance: Mapping[str, object]) -> None:
    """Write a table that isn't made net by net into the store, over an older one. Errors as ``tables.append``."""
    tables.append(store_root() / "results", name, frame, provenance, anew=True)


def ours(dataset: str) -> pd.DataFrame:
    """What we measured on a dataset, in the columns of :func:`numbers` and in its units, and ``seeds``.

    Means over images, then over seeds; spread is the standard deviation over seeds (NaN: one seed). Geometry and
    ``accuracy`` (%, whole test split), ``pgd_l2_accuracy`` and ``pgd_linf_accuracy`` (%, at ``epsilon``), and
    ``relative_gradient_change`` (random noise of length ``epsilon``). What was not measured is not there.
    """
    parts = []
    if has(f"{dataset}_runs"):
        runs = measured(f"{dataset}_runs")
        runs["accuracy"] *= 100
        kinds = ["accuracy", "grad_norm", "hessian_norm", "curvature", "curvature_median", "margin_curvature"]
        parts.append(runs.melt(["label", "seed"], kinds, "quantity").assign(epsilon=np.nan))
    if has(f"{dataset}_curves"):
        curves = measured(f"{dataset}_curves")
        columns = {"quantity": "pgd_" + curves.norm + "_accuracy", "epsilon": curves.eps}
        parts.append(curves[["label", "seed"]].assign(value=100 * curves.accuracy, **columns))
    if has(f"{dataset}_stability"):
        stable = measured(f"{dataset}_stability")
        stable = stable[(stable.method == "gradient") & (stable.weights == "trained") & (stable.noise == "random")]
        means = stable.groupby(["label", "seed", "eps"], sort=False).relative_change.mean().reset_index()
        means = means.rename(columns={"eps": "epsilon", "relative_change": "value"})
        parts.append(means.assign(quantity="relative_gradient_change"))
    names = ["source", "dataset", "method", "quantity", "epsilon", "mean", "spread", "seeds"]
    if not parts:
        return pd.DataFrame(columns=names).astype(dict.fromkeys(names[4:], float))
    rows = pd.concat(parts, ignore_index=True).rename(columns={"label": "method"}).dropna(subset="value")
    groups = rows.groupby(CELL, sort=False, dropna=False).value
    frame = groups.agg(["mean", "std", "size"]).reset_index().rename(columns={"std": "spread", "size": "seeds"})
    return frame.assign(source="ours", dataset=dataset)[names]


def comparison(dataset: str, source: str) -> pd.DataFrame:
    """Ours beside theirs, a row a cell that the paper prints; what we have not measured has NaN and stays in.

    Args:
        dataset: ours. source: theirs, as in :func:`numbers`; their rows on ``dataset`` where they have any, else all.

    Returns:
        Columns method, quantity, epsilon, ours, ours_spread, seeds, theirs, theirs_spread, their_dataset, difference,
        joint_spread (√ of the sum of both squares: standard deviations over runs; values read off the printed figure
        have its reading error, 5 %), within (|difference| ≤ joint_spread; NA where either has no spread).

    Raises:
        ValueError: unknown source.
    """
    theirs = numbers(source)
    theirs = theirs[theirs.dataset == dataset] if (theirs.dataset == dataset).any() else theirs
    read_off = theirs.source.str.contains("digitised")
    spread = theirs.spread.where(~read_off, READING * theirs["mean"])
    cells = theirs[CELL].assign(theirs=theirs["mean"], theirs_spread=spread, their_dataset=theirs.dataset)
    mine = ours(dataset).rename(columns={"mean": "ours", "spread": "ours_spread"})
    frame = cells.merge(mine[[*CELL, "ours", "ours_spread", "seeds"]], on=CELL, how="left")
    frame["difference"] = frame.ours - frame.theirs
    frame["joint_spread"] = np.hypot(frame.ours_spread, frame.theirs_spread)
    known = frame.joint_spread.notna() & frame.difference.notna()
    frame["within"] = (frame.difference.abs() <= frame.joint_spread).astype("boolean").where(known)
    order = [*CELL, "ours", "ours_spread", "seeds", "theirs", "theirs_spread", "their_dataset"]
    return frame[[*order, "difference", "joint_spread", "within"]]
