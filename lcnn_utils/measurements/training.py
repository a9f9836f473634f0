"""What notebook 05 measures: methods side by side, layers over training, what λ can do, and what a step costs."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import training
from ..experiments import measure, plus_minus, published, run
from ..figures.style import METHOD
from ..nn import CenteredSoftplus, norms_once_a_step
from ..training import METHODS, Recipe, objectives, samples
from .curvature import layer_calls, with_beta

LAMBDAS = (0.0, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)  # λ_β = λ_γ of the shipped runs on digits
SEARCHED_LAMBDAS = (0.0, 1e-3, 3e-3, 1e-2, 2e-2, 3e-2, 5e-2, 1e-1, 2e-1, 3e-1)  # λ_β = λ_γ
HELD_OUT = 0.2  # validation fraction of the search for λ
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
        row: dict[str, Any] = dict(label=METHOD[recipe.method][0], method=recipe.method, seed=recipe.seed)
        row |= dict(lambda_beta=recipe.lambda_beta, lambda_gamma=recipe.lambda_gamma)
        rows.append(row | result.metrics | {"seconds": result.provenance["seconds"]})
    return pd.DataFrame(rows)


def means_table(frame: pd.DataFrame, by: str, columns: dict[str, str]) -> pd.DataFrame:
    """A row for each value of the column ``by``: mean ± standard deviation over the frame's rows.
    ``columns``: title → column of the frame; accuracies are shown in %."""
    rows = []
    for name, part in frame.groupby(by, sort=False):
        row = {by: str(name)}
        for title, column in columns.items():
            values = part[column] * (100 if column == "accuracy" else 1)
            row[title] = plus_minus(values.mean(), values.std())
        rows.append(row)
    return pd.DataFrame(rows)


def geometry_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Ours beside the paper's Table 1 (another dataset and net): mean ± standard deviation over seeds, a row a method.
    ``frame``: of :func:`runs_frame`."""
    table = means_table(frame, "label", GEOMETRY).rename(columns={"label": "net"})
    paper = published("paper table 1").set_index(["quantity", "method"])
    for title, column in GEOMETRY.items():
        rows = paper.loc[column]
        cells = rows["mean"].map("{:g}".format) + " ± " + rows.spread.map("{:g}".format)
        table[f"paper: {title}"] = table.net.map(cells).fillna("–")
    return table


def layer_frame(history: pd.DataFrame) -> pd.DataFrame:
    """β and γ over training: columns epoch, kind ("beta", "gamma"), layer (from input to output), name, value."""
    parts = []
    for kind in ("beta", "gamma"):
        columns = [column for column in history.columns if str(column).startswith(f"{kind} ")]
        for number, column in enumerate(columns, 1):
            about = {"epoch": history.epoch, "kind": kind, "layer": number, "name": column.split()[1]}
            parts.append(pd.DataFrame(about | {"value": history[column]}))
    return pd.concat(parts, ignore_index=True)


def trained_layers(recipes: Iterable[Recipe]) -> pd.DataFrame:
    """β and γ of every layer at the end of training: :func:`layer_frame` with columns method, label, seed, lambda_."""
    parts = []
    for recipe in recipes:
        last = run(recipe, weights=False, progress=False).history.tail(1)
        frame = layer_frame(last).assign(method=recipe.method, label=METHOD[recipe.method][0], seed=recipe.seed)
        parts.append(frame.assign(lambda_=recipe.lambda_beta))
    return pd.concat(parts, ignore_index=True)


def lambda_recipes(seeds: Sequence[int], lambdas: Sequence[float] = LAMBDAS) -> list[Recipe]:
    """LCNNs on digits that differ in λ_β = λ_γ."""
    return [
        training.recipe("digits", "lcnn", seed, lambda_beta=lam, lambda_gamma=lam) for lam in lambdas for seed in seeds
    ]


def rates(recipe: Recipe) -> Tensor:
    """The learning rate of every step of a recipe's training, (T,)."""
    total = recipe.epochs * training.steps_an_epoch(recipe)
    return torch.tensor([training.learning_rate(recipe, step / total) for step in range(total)], dtype=torch.float64)


def lowest_gamma(gamma: float, rates: Tensor, lam: float, momentum: float) -> Tensor:
    """The lowest γ that λ|log γ| alone can pull ``gamma`` ≥ 1 down to, with learning rates (T,).
    Above γ = 1 its gradient for log γ is λ at every step, and a step with momentum μ counts 1/(1 − μ) times in the end:
    so log γ falls by λ Σ lr/(1 − μ) at most. At γ = 1 the pull turns round."""
    return (math.log(gamma) - lam * rates.sum() / (1 - momentum)).clamp(min=0).exp()


def search_recipes(seeds: Sequence[int] = (0, 1, 2), lambdas: Sequence[float] = SEARCHED_LAMBDAS) -> list[Recipe]:
    """:func:`lambda_recipes` that hold a fifth of the training set out."""
    return [replace(recipe, held_out=HELD_OUT) for recipe in lambda_recipes(seeds, lambdas)]


def search_frame(recipes: Iterable[Recipe], progress: bool = True) -> pd.DataFrame:
    """What came of them on the held-out part: a row a run. ValueError: one holds nothing out, or has two different λ.
    Columns: lambda_ (λ_β = λ_γ), seed, accuracy in [0, 1], curvature (mean C of the loss, 1/pixel unit),
    margin_curvature, images (held out), seconds."""
    recipes = list(recipes)
    for recipe in recipes:
        if not recipe.held_out:
            raise ValueError(f"{recipe} holds nothing out: its accuracy would be that of the test set")
        if recipe.lambda_beta != recipe.lambda_gamma:
            raise ValueError(f"the search varies one λ = λ_β = λ_γ; these are two: {recipe}")
    frame = runs_frame(recipes, progress).rename(columns={"lambda_beta": "lambda_"})
    return frame[["lambda_", "seed", "accuracy", "curvature", "margin_curvature", "images", "seconds"]]


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


def failure_recipes(seeds: Sequence[int], lam: float = 0.3) -> dict[str, list[Recipe]]:
    """Too large a λ for the schedule, and what repairs it: name → a recipe a seed."""
    arms: dict[str, dict[str, Any]] = {
        "healthy": {},
        "only λ_β too large": dict(lambda_beta=lam),
        "only λ_γ too large": dict(lambda_gamma=lam),
        "both too large": dict(lambda_beta=lam, lambda_gamma=lam),
        "both too large, 4 × the epochs": dict(lambda_beta=lam, lambda_gamma=lam, epochs=32),
        "a quarter of that, 4 × the epochs": dict(lambda_beta=lam / 4, lambda_gamma=lam / 4, epochs=32),
    }
    return ablation(arms, seeds)


def arms_frame(arms: dict[str, list[Recipe]]) -> pd.DataFrame:
    """Runs of several arms: columns arm, seed, the metrics, median β and γ over layers at the end."""
    rows = []
    for arm, recipes in arms.items():
        for recipe in recipes:
            result = run(recipe, weights=False)
            medians = layer_frame(result.history.tail(1)).groupby("kind").value.median()
            rows.append({"arm": arm, "seed": recipe.seed} | result.metrics | medians.to_dict())
    return pd.DataFrame(rows)


def softened_frame(seeds: Sequence[int], beta: float) -> pd.DataFrame:
    """Trained Standard nets whose every β is *set*, without further training: columns arm, seed, the metrics."""
    rows = []
    for seed in seeds:
        standard = training.recipe("digits", "standard", seed)
        metrics = measure(with_beta(trained_net(standard), beta), standard)
        rows.append({"arm": f"Standard, trained; then β set to {beta:g}", "seed": seed} | metrics)
    return pd.DataFrame(rows)


def arms_table(frame: pd.DataFrame) -> pd.DataFrame:
    """A row an arm: mean ± standard deviation over seeds. ``frame``: of :func:`arms_frame`, :func:`softened_frame`."""
    columns = {"accuracy %": "accuracy", "C of the loss": "curvature", "C of the margin": "margin_curvature"}
    columns |= {"median β": "beta", "median γ": "gamma"}
    return means_table(frame, "arm", columns).rename(columns={"arm": ""})


def arm_nets(arms: dict[str, list[Recipe]]) -> dict[str, nn.Module]:
    """The trained net of each arm's first recipe."""
    return {arm: trained_net(recipes[0]) for arm, recipes in arms.items()}


def signal_frame(nets: dict[str, nn.Module], x: Tensor) -> pd.DataFrame:
    """How large the signal is behind each activation: columns net, layer (0 is the input), spread.
    The last is the standard deviation over samples, averaged (root mean square) over a layer's units."""
    rows = []
    for name, net in nets.items():
        outputs = [x] + [output for _, _, output in layer_calls(net, x, CenteredSoftplus)]
        for layer, output in enumerate(outputs):
            rows.append((name, layer, output.std(0).square().mean().sqrt().item()))
    return pd.DataFrame(rows, columns=["net", "layer", "spread"])


def two_forms(steps: Iterable[float]) -> pd.DataFrame:
    """GradReg's penalty of an untrained LCNN in float64 on 32 digits, exact and as a difference.
    Columns: step (of the difference), exact, difference, gradient_error (relative, over all weights)."""
    exact = training.recipe("digits", "lcnn_gradreg", lambda_grad=1.0)
    difference = replace(exact, derivative="difference")
    net = training.build(exact).double().train()
    weights = [parameter for name, parameter in net.named_parameters() if "log_" not in name]
    images, y = (part[:32] for part in samples(exact, "train"))

    def penalty(recipe: Recipe, step: float) -> tuple[float, Tensor]:
        """The penalty, and its gradient for all weights (P,)."""
        x = images.double().requires_grad_()
        loss = F.cross_entropy(net(x), y)
        _, squared = objectives.squared_gradient(net, x, y, loss, recipe, step=step)
        gradients = torch.autograd.grad(squared, weights)
        return squared.item(), torch.cat([gradient.flatten() for gradient in gradients])

    rows = []
    with norms_once_a_step(net) as advance:
        advance()
        for step in steps:
            true_value, true_gradient = penalty(exact, step)
            value, gradient = penalty(difference, step)
            error = (gradient - true_gradient).norm() / true_gradient.norm()
            rows.append((step, true_value, value, error.item()))
    return pd.DataFrame(rows, columns=["step", "exact", "difference", "gradient_error"])


def cost_frame(rounds: int) -> pd.DataFrame:
    """Time of a training step on the CPU, uncompiled, on 128 digits. The methods take turns, and each round divides by
    that round's Standard, so that a disturbance hits all alike.
    Columns: method, label, round, ratio (to Standard's), norms (share of the step that its power iterations take)."""
    recipes = {method: training.recipe("digits", method) for method in METHODS}
    x, y = (part[:128] for part in samples(recipes["standard"], "train"))
    generator = torch.Generator().manual_seed(0)
    rows = []
    with contextlib.ExitStack() as stack:
        trainings = {}
        for method in METHODS:
            model = training.build(recipes[method]).train()
            optimizer, _ = training.make_optimizer(recipes[method], model)
            trainings[method] = model, optimizer, stack.enter_context(norms_once_a_step(model))
        for turn in range(rounds + 1):
            for method, (model, optimizer, advance) in trainings.items():
                begun = time.perf_counter()
                advance()
                advanced = time.perf_counter()
                training.training_step(recipes[method], model, optimizer, x, y, generator=generator)
                seconds = time.perf_counter() - begun
                rows.append((method, turn, seconds, (advanced - begun) / seconds))
    frame = pd.DataFrame(rows, columns=["method", "round", "seconds", "norms"])
    frame = frame[frame["round"] > 0]  # the first is slow
    standard = frame[frame.method == "standard"].set_index("round").seconds
    labels = frame.method.map(lambda method: METHOD[method][0])
    return frame.assign(label=labels, ratio=frame.seconds / frame["round"].map(standard))
