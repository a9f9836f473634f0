"""How long an epoch will take: by runs of the same kind that were timed, else by a few steps timed now."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from .. import data
from ..nn import norms_once_a_step
from ..training import (
    INPUTS,
    TRAINING,
    Recipe,
    build,
    make_optimizer,
    samples,
    state_path,
    steps_an_epoch,
    training_step,
)
from ..training.checkpoint import reached
from ..training.fit import made_on
from ..training.splits import images
from .runs import results

STEPS = 3  # of a probe, after one that isn't counted
COSTLY = ("dataset", "method", "model", "width", "batch_size", "augment", "derivative", "penalty_eval", "published",
          "attack_steps")  # fmt: skip
Timed = dict[tuple, list[float]]


@dataclass(frozen=True)
class Expectation:
    """The seconds that an epoch is expected to take, and what says so."""

    seconds: float
    source: str


def kind(recipe: Recipe) -> tuple:
    """What decides how long a training step takes; the other fields don't matter."""
    return tuple(getattr(recipe, name) for name in COSTLY)


def timed_runs(device: torch.device) -> Timed:
    """Seconds a step of the finished runs, shipped and stored, that were trained on a device of this name: by kind."""
    found: Timed = {}
    for row in results().to_dict("records"):
        if row["device"] == made_on(device)["device"]:
            one = Recipe(**{field.name: row[field.name] for field in dataclasses.fields(Recipe)})
            found.setdefault(kind(one), []).append(row["seconds"] / (one.epochs * steps_an_epoch(one)))
    return found


def known(recipe: Recipe, device: torch.device, timed: Timed) -> Expectation | None:
    """What earlier trainings say: the median of the finished runs of its kind, else this recipe's own epochs so far.

    Args:
        timed: of :func:`timed_runs`.

    Raises:
        one of ``state.DAMAGE``: the recipe's own state is damaged.
    """
    name, path = made_on(device)["device"], state_path(recipe)
    if steps := timed.get(kind(recipe)):
        runs = f"median of {len(steps)} finished runs" if len(steps) > 1 else "a finished run"
        return Expectation(median(steps) * steps_an_epoch(recipe), f"{runs} of this kind on {name}")
    if path.exists():
        done, about = reached(path)
        if done and {sitting["device"] for sitting in about.get("made_on", [])} == {name}:
            epochs = f"its own {done} epochs" if done > 1 else "its own first epoch"
            return Expectation(about["seconds"] / done, f"{epochs}, with starting and compiling, on {name}")
    return None


def stepper(one: Recipe, x: Tensor, y: Tensor) -> tuple[Callable[[], Tensor], Callable[[], None]]:
    """A training step of a recipe on one batch, as ``fit`` takes it but uncompiled, and what ends it."""
    model, stack = build(one).to(x.device).train(), contextlib.ExitStack()
    advance = stack.enter_context(norms_once_a_step(model))
    now = {"progress": 1.0, "generator": torch.Generator().manual_seed(one.seed)}
    step = training_step(one, model, make_optimizer(one, model)[0], advance, now, [])
    return lambda: step(x, y), stack.close


def probe(recipe: Recipe, device: torch.device) -> Expectation:
    """Time a few steps on one batch now. Of a dataset that isn't on the disk the images are random, and it says so.

    Raises:
        RuntimeError, FileNotFoundError: the dataset on the disk is damaged, or there is not enough memory.
    """
    x, y, note = _batch(recipe)
    step, end = stepper(recipe, x.to(device), y.to(device))
    try:
        step()
        _wait(device)
        begun = time.perf_counter()
        for _ in range(STEPS):
            step()
        _wait(device)
        seconds = (time.perf_counter() - begun) / STEPS
    finally:
        end()
    where = made_on(device)["device"]
    return Expectation(seconds * steps_an_epoch(recipe), f"timed now, {STEPS} steps, uncompiled, on {where}{note}")


def _batch(recipe: Recipe) -> tuple[Tensor, Tensor, str]:
    """One batch (x, y), and what must be said of it."""
    if recipe.dataset == "moons":
        return *samples(recipe, "train"), ""
    if data.available()[recipe.dataset] != "missing":
        found = images(recipe, "train")
        return found.x[: recipe.batch_size].float() / 255, found.y[: recipe.batch_size], ""
    (shape, classes), generator = INPUTS[recipe.dataset], torch.Generator().manual_seed(0)
    n = min(recipe.batch_size, TRAINING[recipe.dataset])
    x, y = torch.rand(n, *shape, generator=generator), torch.arange(n) % classes
    return x, y, f"; random images of its shape, as {recipe.dataset} is not on the disk"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
