"""Choosing λ without looking at the test set: runs on digits that are judged by a held-out part of the training set."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import pandas as pd

from ..experiments import run
from ..training import Recipe, recipe

LAMBDAS = (0.0, 1e-3, 3e-3, 1e-2, 2e-2, 3e-2, 5e-2, 1e-1, 2e-1, 3e-1)  # λ_β = λ_γ
HELD_OUT = 0.2


def search_recipes(seeds: Sequence[int] = (0, 1, 2), lambdas: Sequence[float] = LAMBDAS) -> list[Recipe]:
    """LCNNs on digits that differ in λ_β = λ_γ, and hold a fifth of the training set out."""
    runs = [(lam, seed) for lam in lambdas for seed in seeds]
    return [recipe("digits", "lcnn", seed, lambda_beta=lam, lambda_gamma=lam, held_out=HELD_OUT) for lam, seed in runs]


def search_frame(recipes: Iterable[Recipe], progress: bool = True) -> pd.DataFrame:
    """What came of them on the held-out part: a row a run. ValueError: one holds nothing out, or has two different λ.
    Columns: lambda_ (λ_β = λ_γ), seed, accuracy in [0, 1], curvature (mean C of the loss, 1/pixel unit),
    margin_curvature, images (held out), seconds."""
    rows = []
    for one in recipes:
        if not one.held_out:
            raise ValueError(f"{one} holds nothing out: its accuracy would be that of the test set")
        if one.lambda_beta != one.lambda_gamma:
            raise ValueError(f"λ_β = {one.lambda_beta:g} and λ_γ = {one.lambda_gamma:g}: the search varies one λ")
        made = run(one, weights=False, progress=progress)
        numbers = {name: made.metrics[name] for name in ("accuracy", "curvature", "margin_curvature", "images")}
        rows.append({"lambda_": one.lambda_beta, "seed": one.seed} | numbers | {"seconds": made.provenance["seconds"]})
    return pd.DataFrame(rows)


def chosen(frame: pd.DataFrame) -> float:
    """The largest λ whose mean accuracy lies within one standard error of the best mean.

    The rule of one standard error (L. Breiman et al., "Classification and Regression Trees", 1984, §3.4.3): among what
    the data cannot tell apart, take the simplest, here the least curved. The standard error is that of the best λ over
    its seeds, 0 with one seed; it does not hold the chance of the held-out part, which the seeds share.
    ``frame``: of :func:`search_frame`. ValueError: it is empty, or an accuracy is not a number.
    """
    if not len(frame) or frame.accuracy.isna().any():
        raise ValueError("there is nothing to choose from: the frame is empty, or an accuracy is missing")
    accuracy = frame.groupby("lambda_").accuracy.agg(["mean", "sem"]).sort_index(ascending=False)  # largest λ first
    rounding = 2e-5  # of a file with five digits; far below the share of one image
    best = accuracy[accuracy["mean"] >= accuracy["mean"].max() - rounding].iloc[0]
    error = 0.0 if math.isnan(best["sem"]) else best["sem"]
    return float(accuracy.index[accuracy["mean"] >= best["mean"] - error - rounding][0])
