"""Many trainings in sittings of limited length: what is left to train, cut into pieces, or trained until time is up."""

from __future__ import annotations

import contextlib
import math
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from ..lab import pick_device
from ..training import ONLY, Recipe, recipe, run_name, state_path
from ..training.checkpoint import DAMAGE, Damaged, reached
from . import runs as experiments
from . import timing

DAMAGED = "damaged"  # folder for files that a sweep found so


@dataclass(frozen=True)
class Part:
    """Epochs ``first`` to ``last`` of a recipe, counted from 1; none if ``last`` is before ``first``."""

    recipe: Recipe
    first: int
    last: int
    epoch: timing.Expectation

    @property
    def seconds(self) -> float:
        """The time they are expected to take together."""
        return (self.last - self.first + 1) * self.epoch.seconds


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a sweep made of a recipe.

    Attributes:
        epochs: done by now.
        run: if it is finished, without its weights.
        error: what ended it; ``traceback`` says where.
        notes: what happened on the way (a damaged file, say).
    """

    recipe: Recipe
    epochs: int
    run: experiments.Run | None
    error: Exception | None
    traceback: str = ""
    notes: tuple[str, ...] = ()


class TimeIsUp(Exception):
    """Ends a training between two epochs."""


def ordered(
    datasets: Sequence[str],
    methods: Sequence[str],
    seeds: Sequence[int],
    scale: str | None = None,
    grid: Mapping[str, Sequence[Any]] | None = None,
    **changes,
) -> list[Recipe]:
    """Recipes, each once, by priority: the first seed of everything comes before the second of anything.

    Args:
        grid: fields of the recipe and the values to take, in all combinations; the last field changes fastest. A
            method that a field makes no difference to is trained once for all its values, with the default.
        changes: fields of all recipes, and their values.

    Raises:
        ValueError: as ``Recipe``.
    """
    grid = grid or {}
    names = product(seeds, datasets, methods, product(*grid.values()))
    made: dict[Recipe, None] = {}
    for seed, dataset, method, values in names:
        point = {name: value for name, value in zip(grid, values, strict=True) if method in ONLY.get(name, (method,))}
        made[recipe(dataset, method, seed, scale, **changes, **point)] = None
    return list(made)


def recorded(recipe: Recipe) -> bool:
    """Whether the run is finished: trained, measured, and shipped or in the store."""
    return any((folder / f"{run_name(recipe)}.json").exists() for folder in experiments.places())


def epochs_done(recipe: Recipe) -> int:
    """How many epochs of a recipe are trained.

    Raises:
        Damaged: its state is.
    """
    if recorded(recipe):
        return recipe.epochs
    path = state_path(recipe)
    try:
        return reached(path)[0] if path.exists() else 0
    except DAMAGE as error:
        raise Damaged(path, error, "delete it to train anew") from None


def missing(recipes: Iterable[Recipe], device: str | torch.device | None = None) -> list[Part]:
    """What is left to train, in order, and how long an epoch of it should take; a few steps are timed where no
    earlier run says it.

    Raises:
        RuntimeError: the device is absent, a state is damaged, or there is not enough memory for a step.
    """
    device, parts = pick_device(device), []
    timed = timing.timed_runs(device)
    probed: dict[tuple, timing.Expectation] = {}
    for one in recipes:
        done = epochs_done(one)
        if done < one.epochs:
            expected = timing.known(one, device, timed)
            if expected is None:
                key = (*timing.kind(one), one.held_out)
                expected = probed[key] = probed.get(key) or timing.probe(one, device)
            parts.append(Part(one, done + 1, one.epochs, expected))
    return parts


def pieces(parts: Iterable[Part], limit: float) -> list[list[Part]]:
    """Cut parts, in their order, into pieces of at most ``limit`` expected seconds; an epoch that alone takes longer
    is a piece of its own."""
    made: list[list[Part]] = []
    room = 0.0
    for part in parts:
        first = part.first
        while first <= part.last:
            if not made or room < part.epoch.seconds:
                made.append([])
                room = limit
            fits = max(1, int(min(room / part.epoch.seconds, part.last)))
            now = replace(part, first=first, last=min(part.last, first + fits - 1))
            made[-1].append(now)
            room -= now.seconds
            first = now.last + 1
    return made


def stopper(one: Recipe, until: float) -> Callable[[pd.DataFrame], None]:
    """A ``watch`` for ``training.fit`` that raises :class:`TimeIsUp` when another epoch as long as the last one would
    end after ``until`` (by ``time.monotonic``)."""
    begun = time.monotonic()

    def watch(history: pd.DataFrame) -> None:
        nonlocal begun
        last, begun = time.monotonic() - begun, time.monotonic()
        if len(history) < one.epochs and begun + last > until:
            raise TimeIsUp

    return watch


def attempt(
    one: Recipe,
    *,
    device: str | torch.device | None = None,
    progress: bool = False,
    watch: Callable[[pd.DataFrame], None] | None = None,
    ready: Callable[[], bool] = lambda: True,
) -> Outcome:
    """Train and measure a recipe, or read it, and say what came of it, whatever that is: an error is in the outcome.

    A damaged state or record of the store is put into ``runs/damaged``, and what it held is made anew.

    Args:
        watch: of ``training.fit``; it may raise :class:`TimeIsUp`.
        ready: asked before a recipe that isn't trained to its end is gone on with.
    """
    notes: tuple[str, ...] = ()
    while True:
        try:
            if epochs_done(one) == one.epochs or ready():
                made = experiments.run(one, device=device, progress=progress, weights=False, watch=watch)
                return Outcome(one, one.epochs, made, None, notes=notes)
            return Outcome(one, epochs_done(one), None, None, notes=notes)
        except TimeIsUp:
            return Outcome(one, epochs_done(one), None, None, notes=notes)
        except Exception as error:
            if isinstance(error, Damaged) and error.path.parent == experiments.places()[1]:
                notes += (f"{error}; {set_aside(error.path)}",)
                continue
            return Outcome(one, so_far(one), None, error, traceback.format_exc(), notes)


def set_aside(path: Path) -> str:
    """Move a file of the store into the folder ``damaged`` beside it (another process may have done so before)."""
    folder = path.parent / DAMAGED
    folder.mkdir(exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        path.replace(folder / path.name)
    return f"it was put into {folder}, and made anew"


def so_far(one: Recipe) -> int:
    """:func:`epochs_done`, or 0 where the state is damaged."""
    try:
        return epochs_done(one)
    except RuntimeError:  # damaged
        return 0


def one_by_one(
    recipes: Iterable[Recipe],
    *,
    until: float = math.inf,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Generator[Outcome, None, None]:
    """Train and measure what is missing, in order, in this process; yield what came of each recipe, the finished too.

    A training stops at the end of an epoch, to go on from there the next time, when another epoch as long as the last
    one would end after ``until``. A recipe is begun only if its first epoch fits, as far as earlier runs tell how long
    it takes. One epoch is trained in any case, so that every call gets on.

    Args:
        until: the deadline, by ``time.monotonic``.

    Raises:
        RuntimeError: the device is absent. What is wrong with one recipe is in its ``Outcome``, and ends no other.
    """
    device, trained = pick_device(device), False
    for one in recipes:
        stop = stopper(one, until)

        def watch(history: pd.DataFrame, stop: Callable[[pd.DataFrame], None] = stop) -> None:
            nonlocal trained
            trained = True
            stop(history)

        ready = lambda one=one: not trained or _fits(one, device, until)
        yield attempt(one, device=device, progress=progress, watch=watch, ready=ready)


def _fits(recipe: Recipe, device: torch.device, until: float) -> bool:
    """Whether an epoch would end in time; where no earlier run tells, whether time is left."""
    if until == math.inf:
        return True
    expected = timing.known(recipe, device, timing.timed_runs(device))
    return time.monotonic() + (expected.seconds if expected else 0.0) < until
