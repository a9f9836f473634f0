"""Ours beside the paper's, made ready for the tables and figures of notebook 08."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from .. import training
from ..experiments import comparison, has, how_measured, measured, plus_minus, with_interval
from ..lab import LABEL
from ..nn import LipschitzBatchNorm2d, norms_once_a_step
from ..training import Recipe
from ..training.fit import compiles, precise_input
from .curvature import means_table

TABLES = {"paper table 1": "Table 1", "paper table 2": "Table 2", "paper gradient-robustness": "gradient robustness"}
SYMBOL = {"grad_norm": "‖∇f‖", "hessian_norm": "‖∇²f‖", "curvature": "C", "accuracy": "accuracy %"}
SYMBOL |= {"pgd_l2_accuracy": "PGD, L2", "relative_gradient_change": "change of ∇f"}
NAME = {"digits": "digits", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}


def datasets() -> list[str]:
    """The datasets of which there are results, digits first."""
    return [name for name in NAME if has(f"{name}_runs")]


def title(dataset: str) -> str:
    """A dataset and the nets its results belong to, for a figure: ``CIFAR-10, ResNet-18 of width 16``."""
    net = training.recipe(dataset, "lcnn", scale=how_measured(f"{dataset}_runs")["scale"])
    return f"{NAME[dataset]}, {net.model.replace('resnet', 'ResNet-')} of width {net.width}"


def printed(cell: Any) -> str:
    """Theirs, as it is printed; ± 5 % for what was read off the figure."""
    read_off = cell.quantity == "relative_gradient_change"
    return f"{cell.theirs:g} ± 5 %" if read_off else f"{cell.theirs:.2f} ± {cell.theirs_sd:.2f}"


def cells(dataset: str) -> pd.DataFrame:
    """Every cell the paper prints of a dataset beside ours: :func:`comparison` of each table (column)."""
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
    columns["difference"] = frame.difference.map("{:+.3g}".format).replace("+nan", "–")
    columns["joint standard deviation"] = verdict.where(frame.ours.notna(), "not measured")
    return pd.DataFrame(columns)


def timed_in_turn(contestants: Mapping[str, Callable[[], Any]], rounds: int, seconds: float) -> pd.DataFrame:
    """Seconds that each contestant takes once a round, each round starting with another one: a row a round, a column a
    contestant. What disturbs the machine then hits neighbours in time alike, and the ratio *within* a round forgets it.
    One call of each comes before, untimed. At least 3 rounds, fewer than asked for when ``seconds`` are over."""
    names = list(contestants)
    for contestant in contestants.values():
        contestant()
    rows: list[dict[str, float]] = []
    end = time.perf_counter() + seconds
    while len(rows) < max(rounds, 3) and (len(rows) < 3 or time.perf_counter() < end):
        row = {}
        first = len(rows) % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            contestants[name]()
            row[name] = time.perf_counter() - start
        rows.append(row)
    return pd.DataFrame(rows, columns=names)


def as_trained(recipe: Recipe) -> nn.Module:
    """A new network with every γ at 1, so that most channels are clipped: trained nets keep larger ones."""
    model = training.build(recipe)
    for module in model.modules():
        if isinstance(module, LipschitzBatchNorm2d):
            module.gamma = 1.0
    return model


@contextlib.contextmanager
def stepping(recipe: Recipe, model: nn.Module, device: torch.device) -> Iterator[Callable[[], None]]:
    """A whole training step as ``fit`` runs it, on random images, so that no dataset is needed."""
    generator = torch.Generator(device).manual_seed(0)
    shape, classes = training.INPUTS[recipe.dataset]
    x = torch.rand(recipe.batch_size, *shape, device=device, generator=generator)
    y = torch.randint(classes, (recipe.batch_size,), device=device, generator=generator)
    model = model.to(device).train()
    optimizer, _ = training.make_optimizer(recipe, model)
    network: Any = torch.compile(model, dynamic=False) if compiles(recipe, device) else model
    starts = torch.Generator().manual_seed(0)
    with norms_once_a_step(model) as advance, precise_input(model):

        def step() -> None:
            advance()
            training.training_step(recipe, network, optimizer, x, y, generator=starts)
            if device.type == "cuda":
                torch.cuda.synchronize()

        yield step


def steps_frame(recipes: Sequence[Recipe], device: torch.device, rounds: int, seconds: float) -> pd.DataFrame:
    """Training steps of recipes with different methods, timed in turn: columns method, label, round, seconds."""
    with contextlib.ExitStack() as stack:
        steps = {recipe.method: stack.enter_context(stepping(recipe, as_trained(recipe), device)) for recipe in recipes}
        times = timed_in_turn(steps, rounds, seconds)
    frame = times.reset_index(names="round").melt("round", var_name="method", value_name="seconds")
    return frame.assign(label=frame.method.map(lambda method: LABEL[method]))


def cost_frame(dataset: str) -> pd.DataFrame:
    """The steps that were timed in turn, with their ratio to Standard's of the same round."""
    times = measured(f"{dataset}_steps")
    standard = times[times.method == "standard"].set_index("round").seconds
    return times.assign(ratio=times.seconds / times["round"].map(standard))


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
