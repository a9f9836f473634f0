"""The numbers that the paper and others printed, as a tidy frame (``data/published/paper_tables.csv``)."""

from __future__ import annotations

import pandas as pd

from .runtime import PROJECT

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
