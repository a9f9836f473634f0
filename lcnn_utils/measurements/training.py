"""What notebook 05 measures: methods side by side, layers over training, and what λ can do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from .. import training
from ..experiments import measure, run
from ..lab import LABEL
from ..nn import CenteredSoftplus, softened
from ..training import Recipe
from .curvature import layer_calls, means_table

LAMBDAS = (0.0, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)  # λ_β = λ_γ of the shipped runs on digits
GEOMETRY = {"‖∇f‖": "grad_norm", "‖∇²f‖": "hessian_norm", "C": "curvature", "accuracy %": "accuracy"}


def trained_net(recipe: Recipe, device: torch.device | None = None) -> nn.Module:
    """The network of a run, read if it is stored, else trained now."""
    model = run(recipe, device=device, progress=False).model
    assert model is not None  # run leaves it out only if it is told to
    return model


def runs_frame(recipes: Iterable[Recipe], progress: bool = True) -> pd.DataFrame:
    """Numbers of runs, shipped or trained now: columns label, method, seed, both λ, the metrics, seconds."""
    rows = []
    for recipe in recipes:
        result = run(recipe, weights=False, progress=progress)
        row: dict[str, Any] = dict(label=LABEL[recipe.method], method=recipe.method, seed=recipe.seed)
        row |= dict(lambda_beta=recipe.lambda_beta, lambda_gamma=recipe.lambda_gamma)
        rows.append(row | result.metrics | {"seconds": result.provenance["seconds"]})
    return pd.DataFrame(rows)


def layer_frame(history: pd.DataFrame) -> pd.DataFrame:
    """β and γ over training: columns epoch, kind ("beta", "gamma"), layer (from input to output), value."""
    parts = []
    for kind in ("beta", "gamma"):
        columns = [column for column in history.columns if str(column).startswith(f"{kind} ")]
        for number, column in enumerate(columns, 1):
            values = {"epoch": history.epoch, "kind": kind, "layer": number, "value": history[column]}
            parts.append(pd.DataFrame(values))
    return pd.concat(parts, ignore_index=True)


def trained_layers(recipes: Iterable[Recipe]) -> pd.DataFrame:
    """β and γ of every layer at the end of training: :func:`layer_frame` with columns method, label, seed, lambda_."""
    parts = []
    for recipe in recipes:
        last = run(recipe, weights=False, progress=False).history.tail(1)
        frame = layer_frame(last).assign(method=recipe.method, label=LABEL[recipe.method], seed=recipe.seed)
        parts.append(frame.assign(lambda_=recipe.lambda_beta))
    return pd.concat(parts, ignore_index=True)


def lambda_recipes(seeds: Sequence[int], lambdas: Sequence[float] = LAMBDAS, **changes: Any) -> list[Recipe]:
    """LCNNs on digits that differ in λ_β = λ_γ. ``changes``: fields of all of them."""
    recipes = []
    for lam in lambdas:
        for seed in seeds:
            recipes.append(training.recipe("digits", "lcnn", seed, lambda_beta=lam, lambda_gamma=lam, **changes))
    return recipes


def chosen(frame: pd.DataFrame) -> float:
    """The largest λ whose mean accuracy lies within one standard error of the best mean.

    The rule of one standard error (L. Breiman et al., "Classification and Regression Trees", 1984, §3.4.3): among what
    the data cannot tell apart, take the simplest, here the least curved. The standard error is that of the best λ over
    its seeds, 0 with one seed; it does not hold the chance of the held-out part, which the seeds share.
    ``frame``: columns lambda_, accuracy; a row a run.
    """
    accuracy = frame.groupby("lambda_").accuracy.agg(["mean", "sem"]).fillna(0)
    accuracy = accuracy.sort_index(ascending=False)  # largest λ first
    rounding = 2e-5  # of a file with five digits; far below the share of one image
    best = accuracy[accuracy["mean"] >= accuracy["mean"].max() - rounding].iloc[0]
    return float(accuracy.index[accuracy["mean"] >= best["mean"] - best["sem"] - rounding][0])


def ablation(arms: dict[str, dict[str, Any]], seeds: Sequence[int]) -> dict[str, list[Recipe]]:
    """LCNNs on digits. ``arms``: name → changes of the recipe; returns name → a recipe a seed."""
    return {
        name: [training.recipe("digits", "lcnn", seed, **changes) for seed in seeds] for name, changes in arms.items()
    }


def ingredient_recipes(seeds: Sequence[int]) -> dict[str, list[Recipe]]:
    """Where β starts, and which penalties there are: name → a recipe a seed."""
    arms: dict[str, dict[str, Any]] = {
        "β from 1000, no penalty": dict(beta=1000.0, lambda_beta=0.0, lambda_gamma=0.0),
        "β from 5, no penalty": dict(lambda_beta=0.0, lambda_gamma=0.0),
        "β from 5, penalty on γ": dict(lambda_beta=0.0),
        "β from 5, penalty on β": dict(lambda_gamma=0.0),
        "β from 5, both penalties (LCNN)": {},
        "β from 100, both penalties": dict(beta=100.0),
        "β from 1000, both penalties": dict(beta=1000.0),
    }
    return ablation(arms, seeds)


def failure_recipes(seeds: Sequence[int]) -> dict[str, list[Recipe]]:
    """Too large a λ for the schedule, and what repairs it: name → a recipe a seed."""
    arms: dict[str, dict[str, Any]] = {
        "healthy": {},
        "only λ_β too large": dict(lambda_beta=0.3),
        "only λ_γ too large": dict(lambda_gamma=0.3),
        "both too large": dict(lambda_beta=0.3, lambda_gamma=0.3),
        "both too large, 4 × the epochs": dict(lambda_beta=0.3, lambda_gamma=0.3, epochs=32),
        "a quarter of that, 4 × the epochs": dict(lambda_beta=0.075, lambda_gamma=0.075, epochs=32),
    }
    return ablation(arms, seeds)


def arms_frame(arms: dict[str, list[Recipe]]) -> pd.DataFrame:
    """Runs of several arms: columns arm, seed, the metrics, at the end median β and γ over layers, the largest γ."""
    rows = []
    for arm, recipes in arms.items():
        for recipe in recipes:
            result = run(recipe, weights=False)
            layers = layer_frame(result.history.tail(1)).groupby("kind").value
            ends = layers.median().to_dict() | {"largest_gamma": layers.max()["gamma"]}
            rows.append({"arm": arm, "seed": recipe.seed} | result.metrics | ends)
    return pd.DataFrame(rows)


def softened_frame(seeds: Sequence[int], beta: float) -> pd.DataFrame:
    """Trained Standard nets whose every β is *set*, without further training: columns arm, seed, the metrics."""
    rows = []
    for seed in seeds:
        standard = training.recipe("digits", "standard", seed)
        metrics = measure(softened(trained_net(standard), beta), standard)
        rows.append({"arm": f"Standard, trained; then β set to {beta:g}", "seed": seed} | metrics)
    return pd.DataFrame(rows)


def arms_table(frame: pd.DataFrame) -> pd.DataFrame:
    """A row an arm: mean ± standard deviation over seeds. ``frame``: of :func:`arms_frame`, :func:`softened_frame`."""
    columns = {"accuracy %": "accuracy", "C of the loss": "curvature", "C of the margin": "margin_curvature"}
    columns |= {"median β": "beta", "median γ": "gamma", "largest γ": "largest_gamma"}
    return means_table(frame, "arm", columns).rename(columns={"arm": ""})


def signal_frame(nets: dict[str, nn.Module], x: Tensor) -> pd.DataFrame:
    """How large the signal is behind each activation: columns net, layer (0 is the input), sd.
    The last is the standard deviation over samples, averaged (root mean square) over a layer's units."""
    rows = []
    for name, net in nets.items():
        outputs = [x] + [output for _, _, output in layer_calls(net, x, CenteredSoftplus)]
        for layer, output in enumerate(outputs):
            rows.append((name, layer, output.std(0).square().mean().sqrt().item()))
    return pd.DataFrame(rows, columns=["net", "layer", "sd"])
