"""The numbers that the paper and others printed (``data/published``), and ours (``data/results``), as tidy frames."""

from __future__ import annotations

import gzip
import json

import pandas as pd

from .runtime import PROJECT, atomic_path, write_text

RESULTS = PROJECT / "data" / "results"
TABLES = PROJECT / "data" / "published" / "paper_tables.csv"


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


def measured(name: str) -> pd.DataFrame:
    """A table of ours from ``data/results``, which ``python benchmarks/evaluate.py`` makes; NAME.json says how.

    Raises:
        FileNotFoundError: there is no such table; the message lists those there are.
    """
    path = RESULTS / f"{name}.csv.gz"
    if not path.is_file():
        there = ", ".join(sorted(p.name.removesuffix(".csv.gz") for p in RESULTS.glob("*.csv.gz"))) or "none"
        raise FileNotFoundError(f"no results called {name!r} in data/results (there are: {there})")
    return pd.read_csv(path)


def save_measured(frame: pd.DataFrame, name: str, provenance: dict[str, object]) -> None:
    """Write ``data/results/NAME.csv.gz`` (five digits) and what produced it, NAME.json.

    Raises:
        OSError: the folder cannot be written.
    """
    text = frame.to_csv(index=False, float_format="%.5g")
    with atomic_path(RESULTS / f"{name}.csv.gz", "make data/results writable") as temporary:
        temporary.write_bytes(gzip.compress(text.encode(), mtime=0))  # the same bytes each time
    write_text(RESULTS / f"{name}.json", json.dumps(provenance, indent=1, ensure_ascii=False) + "\n")
