"""What notebook 05 measures: methods side by side, layers over training, what λ can do, and the price of a step."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import training
from ..data import available
from ..experiments import SHIPPED, measure, published, run
from ..figures.style import METHOD
from ..nn import CenteredSoftplus, norms_once_a_step
from ..training import METHODS, Recipe, build, make_optimizer, objectives, recipe, run_name, samples, training_step
from .curvature import layer_calls, with_beta

LAMBDAS = (0.0, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)  # λ_β = λ_γ of the shipped runs on digits
COLUMNS = {"‖∇f‖": "grad_norm", "‖∇²f‖": "hessian_norm", "C": "curvature", "accuracy %": "accuracy"}


def stage(device: torch.device) -> tuple[str, str]:
    """Dataset and scale to work on: CIFAR-10 where it is and there is a GPU or its runs are shipped; else digits."""
    here = available()["cifar10"] != "missing"
    shipped = (SHIPPED / f"{run_name(recipe('cifar10', 'lcnn'))}.json").exists()
    return ("cifar10", "small") if here and (device.type == "cuda" or shipped) else ("digits", "lab")


def runs_frame(recipes: Iterable[Recipe], progress: bool = True) -> pd.DataFrame:
    """Numbers of runs, shipped or trained now: columns label, method, seed, both λ, the metrics, seconds."""
    rows = []
    for one in recipes:
        made = run(one, weights=False, progress=progress)
        fields = dict(label=METHOD[one.method][0], method=one.method, seed=one.seed)
        fields |= dict(lambda_beta=one.lambda_beta, lambda_gamma=one.lambda_gamma)
        rows.append(fields | made.metrics | {"seconds": made.provenance["seconds"]})
    return pd.DataFrame(rows)


def plus_minus(values: pd.Series) -> str:
    """Mean ± standard deviation, both to the second digit of the latter; the mean alone where they hardly differ."""
    mean, spread = values.mean(), values.std()
    if not spread > 1e-3 * abs(mean):  # one value, or as good as one
        return f"{mean:.3g}" if math.isfinite(mean) else "–"
    digits = max(0, 1 - math.floor(math.log10(spread)))
    return f"{mean:.{digits}f} ± {spread:.{digits}f}"


def geometry_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Ours beside the paper's Table 1 (another dataset and net): mean ± standard deviation over seeds, a row a method.
    ``frame``: of :func:`runs_frame`."""
    paper = published("paper table 1").set_index(["method", "quantity"])
    rows = []
    for label, part in frame.groupby("label", sort=False):
        row: dict[str, str] = {"net": str(label)}
        for name, column in COLUMNS.items():
            values = part[column] * (100 if column == "accuracy" else 1)
            row[name] = plus_minus(values)
        for name, column in COLUMNS.items():
            cell = (label, column)
            known = cell in paper.index
            row[f"paper: {name}"] = f"{paper['mean'][cell]:g} ± {paper['spread'][cell]:g}" if known else "–"
        rows.append(row)
    return pd.DataFrame(rows)


def layer_frame(history: pd.DataFrame) -> pd.DataFrame:
    """β and γ over training: columns epoch, kind ("beta", "gamma"), layer (from input to output), name, value."""
    parts = []
    for kind in ("beta", "gamma"):
        names = [name for name in history.columns if str(name).startswith(f"{kind} ")]
        for number, name in enumerate(names, 1):
            columns = {"epoch": history.epoch, "kind": kind, "layer": number, "name": name.split()[1]}
            parts.append(pd.DataFrame(columns | {"value": history[name]}))
    return pd.concat(parts, ignore_index=True)


def lambda_recipes(seeds: Sequence[int], lambdas: Sequence[float] = LAMBDAS) -> list[Recipe]:
    """LCNNs on digits that differ in λ_β = λ_γ."""
    return [recipe("digits", "lcnn", s, lambda_beta=lam, lambda_gamma=lam) for lam in lambdas for s in seeds]


def lambda_layers(seed: int = 0, lambdas: Sequence[float] = LAMBDAS) -> pd.DataFrame:
    """The trained β and γ of those runs: :func:`layer_frame` of the last epoch, with a column lambda_."""
    parts = []
    for one in lambda_recipes([seed], lambdas):
        last = run(one, weights=False, progress=False).history.tail(1)
        parts.append(layer_frame(last).assign(lambda_=one.lambda_beta))
    return pd.concat(parts, ignore_index=True)


def ingredient_recipes(seeds: Sequence[int]) -> dict[str, list[Recipe]]:
    """Where β starts, and which prices there are: name → a recipe a seed."""
    arms: dict[str, dict[str, Any]] = {
        "β from 1000, no price": dict(beta=1000.0, lambda_beta=0.0, lambda_gamma=0.0),
        "β from 5, no price": dict(lambda_beta=0.0, lambda_gamma=0.0),
        "β from 5, price of γ": dict(lambda_beta=0.0),
        "β from 5, price of β": dict(lambda_gamma=0.0),
        "β from 5, both prices (LCNN)": {},
        "β from 100, both prices": dict(beta=100.0),
        "β from 1000, both prices": dict(beta=1000.0),
    }
    return {name: [recipe("digits", "lcnn", s, **changes) for s in seeds] for name, changes in arms.items()}


def failure_recipes(seeds: Sequence[int], lam: float = 0.3) -> dict[str, list[Recipe]]:
    """Too large a λ for the schedule, and what repairs it: name → a recipe a seed."""
    both: dict[str, Any] = dict(lambda_beta=lam, lambda_gamma=lam)
    quarter: dict[str, Any] = dict(lambda_beta=lam / 4, lambda_gamma=lam / 4, epochs=32)
    arms: dict[str, dict[str, Any]] = {
        "healthy": {},
        "only λ_β too large": dict(lambda_beta=lam),
        "only λ_γ too large": dict(lambda_gamma=lam),
        "both too large": both,
        "both too large, 4 × the epochs": both | dict(epochs=32),
        "a quarter of that, 4 × the epochs": quarter,
    }
    return {name: [recipe("digits", "lcnn", s, **changes) for s in seeds] for name, changes in arms.items()}


def arms_frame(arms: dict[str, list[Recipe]], progress: bool = True) -> pd.DataFrame:
    """Runs of several arms: columns arm, seed, accuracy, curvature, margin_curvature, median β and γ at the end."""
    rows = []
    for arm, recipes in arms.items():
        for one in recipes:
            made = run(one, progress=progress, weights=False)
            last = layer_frame(made.history.tail(1)).groupby("kind").value.median()
            numbers = {name: made.metrics[name] for name in ("accuracy", "curvature", "margin_curvature")}
            rows.append(dict(arm=arm, seed=one.seed) | numbers | dict(beta=last.beta, gamma=last.gamma))
    return pd.DataFrame(rows)


def arms_table(frame: pd.DataFrame) -> pd.DataFrame:
    """A row an arm: mean ± standard deviation over seeds."""
    columns = {"accuracy %": "accuracy", "C of the loss": "curvature", "C of the margin": "margin_curvature"}
    columns |= {"median β": "beta", "median γ": "gamma"}
    rows = [
        {"": arm} | {n: plus_minus(part[c] * (100 if c == "accuracy" else 1)) for n, c in columns.items()}
        for arm, part in frame.groupby("arm", sort=False)
    ]
    return pd.DataFrame(rows)


def softened_frame(seeds: Sequence[int], betas: Sequence[float]) -> pd.DataFrame:
    """Trained Standard nets whose every β is *set*, without further training: columns arm, seed, and three metrics."""
    rows = []
    for beta in betas:
        for seed in seeds:
            one = recipe("digits", "standard", seed)
            trained = run(one, progress=False).model
            assert trained is not None
            metrics = measure(with_beta(trained, beta), one)
            numbers = {name: metrics[name] for name in ("accuracy", "curvature", "margin_curvature")}
            rows.append({"arm": f"Standard, trained; then β set to {beta:g}", "seed": seed} | numbers)
    return pd.DataFrame(rows)


def arm_nets(arms: dict[str, list[Recipe]]) -> dict[str, nn.Module]:
    """The trained net of each arm's first recipe."""
    nets = {arm: run(recipes[0], progress=False).model for arm, recipes in arms.items()}
    return {arm: net for arm, net in nets.items() if net is not None}


def signal_frame(nets: dict[str, nn.Module], x: Tensor) -> pd.DataFrame:
    """How large the signal is behind each activation: columns net, layer, spread (standard deviation over samples).
    The spread is averaged (root mean square) over a layer's units; layer 0 is the input."""
    rows = []
    for name, net in nets.items():
        outputs = [x, *(output for _, _, output in layer_calls(net, x, CenteredSoftplus))]
        rows += [(name, layer, out.std(0).square().mean().sqrt().item()) for layer, out in enumerate(outputs)]
    return pd.DataFrame(rows, columns=["net", "layer", "spread"])


def history(one: Recipe) -> pd.DataFrame:
    """The history of a run: one row an epoch."""
    return run(one, weights=False, progress=False).history


def two_forms(steps: Iterable[float], images: int = 32) -> pd.DataFrame:
    """GradReg's penalty of an untrained LCNN in float64, exact and as a difference.
    Columns: step (of the difference), exact, difference, gradient_error (relative, over all weights)."""
    one = recipe("digits", "lcnn_gradreg", lambda_grad=1.0)
    net = build(one).double().train()
    x, y = (part[:images] for part in samples(one, "train"))
    weights, rows = [p for name, p in net.named_parameters() if "log_" not in name], []
    with norms_once_a_step(net) as advance:
        advance()
        for step in steps:
            found = {}
            for form in ("exact", "difference"):
                at = x.double().requires_grad_()
                loss = F.cross_entropy(net(at), y)
                _, squared = objectives.squared_gradient(net, at, y, loss, replace(one, derivative=form), step=step)
                slopes = torch.autograd.grad(squared, weights)
                found[form] = squared.item(), torch.cat([slope.flatten() for slope in slopes])
            (value, slope), (other, tilted) = found["exact"], found["difference"]
            rows.append((step, value, other, ((tilted - slope).norm() / slope.norm()).item()))
    return pd.DataFrame(rows, columns=["step", "exact", "difference", "gradient_error"])


def stepper(recipe: Recipe, x: Tensor, y: Tensor) -> tuple[Callable[[], None], Callable[[], None]]:
    """A training step of a recipe on one batch, as ``fit`` takes it but uncompiled, and what ends it."""
    model, stack = build(recipe).to(x.device).train(), contextlib.ExitStack()
    advance = stack.enter_context(norms_once_a_step(model))
    optimizer, _ = make_optimizer(recipe, model)
    generator = torch.Generator().manual_seed(recipe.seed)

    def step() -> None:
        advance()
        training_step(recipe, model, optimizer, x, y, generator=generator)

    return step, stack.close


def cost_frame(methods: Sequence[str] = tuple(METHODS), rounds: int = 5, seed: int = 0) -> pd.DataFrame:
    """Seconds of a training step on the CPU, 128 digits, relative to Standard's: columns label, method, round, ratio.
    The methods take turns, and each round divides by that round's Standard, so that a disturbance hits all alike."""
    recipes = [recipe("digits", method, seed) for method in dict.fromkeys(("standard", *methods))]
    x, y = (part[:128] for part in samples(recipes[0], "train"))
    steps = {one.method: stepper(one, x, y) for one in recipes}
    times: list[dict[str, float]] = []
    for turn in range(rounds + 1):  # the first isn't counted
        taken = {}
        for method, (step, _) in steps.items():
            start = time.perf_counter()
            step()
            taken[method] = time.perf_counter() - start
        times += [taken] if turn else []
    for _, end in steps.values():
        end()
    rows = [(m, i, t[m] / t["standard"]) for m in methods for i, t in enumerate(times)]
    frame = pd.DataFrame(rows, columns=["method", "round", "ratio"])
    return frame.assign(label=frame.method.map(lambda m: METHOD[m][0]))


def iteration_share(rounds: int = 9) -> float:
    """The share of an LCNN's training step (as in :func:`cost_frame`) that its power iterations take, a median."""
    one = recipe("digits", "lcnn")
    x, y = (part[:128] for part in samples(one, "train"))
    model = build(one).train()
    optimizer, _ = make_optimizer(one, model)
    shares = []
    with norms_once_a_step(model) as advance:
        for _ in range(rounds + 1):
            start = time.perf_counter()
            advance()
            advanced = time.perf_counter()
            training_step(one, model, optimizer, x, y)
            shares.append((advanced - start) / (time.perf_counter() - start))
    return median(shares[1:])  # the first is slow


def rates(one: Recipe) -> Tensor:
    """The learning rate of every step of a recipe's training, (T,)."""
    total = one.epochs * training.steps_an_epoch(one)
    return torch.tensor([training.learning_rate(one, step / total) for step in range(total)], dtype=torch.float64)


def lowest_gamma(gamma: float, rates: Tensor, lam: float, momentum: float) -> Tensor:
    """The lowest γ that λ|log γ| alone can pull ``gamma`` ≥ 1 down to, with learning rates (T,).
    Above γ = 1 its gradient for log γ is λ at every step, and a step with momentum μ counts 1/(1 − μ) times in the end:
    so log γ falls by λ Σ lr/(1 − μ) at most. At γ = 1 the pull turns round."""
    return (math.log(gamma) - lam * rates.sum() / (1 - momentum)).clamp(min=0).exp()


def course_recipe() -> Recipe:
    """What the course project trained: code-23's defaults (both λ = 1e-2) for 50 epochs."""
    return recipe("cifar10", "lcnn", scale="paper", epochs=50, lambda_beta=1e-2, lambda_gamma=1e-2)


def published_schedules() -> dict[str, Recipe]:
    """LCNN trainings to compare: the authors' of two years, the course project's, and three of ours on digits."""
    authors = {"authors, October 2022": 1e-3, "authors, March 2023": 1e-2}
    weights = lambda lam: dict(lambda_beta=lam, lambda_gamma=lam)
    found = {name: recipe("cifar10", "lcnn", 0, "paper", **weights(lam)) for name, lam in authors.items()}
    found["course project, CIFAR-10"] = course_recipe()
    for lam in (0.01, 0.1, 0.3):
        found[f"digits, λ = {lam:g}"] = recipe("digits", "lcnn", 0, "lab", **weights(lam))
    return found


SEARCHED_LAMBDAS = (0.0, 1e-3, 3e-3, 1e-2, 2e-2, 3e-2, 5e-2, 1e-1, 2e-1, 3e-1)  # λ_β = λ_γ
HELD_OUT = 0.2


def search_recipes(seeds: Sequence[int] = (0, 1, 2), lambdas: Sequence[float] = SEARCHED_LAMBDAS) -> list[Recipe]:
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
