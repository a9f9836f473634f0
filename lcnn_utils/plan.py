"""Many trainings in sittings of limited length: what is left to train, cut into pieces, or trained until time is up."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch

from . import experiments, timing
from .recipe import Recipe
from .runtime import pick_device
from .state import DAMAGE, reached, run_name, state_path


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
    """What a sweep made of a recipe: epochs done by now; the run, if it is finished; the error that ended it."""

    recipe: Recipe
    epochs: int
    run: experiments.Run | None
    error: Exception | None


class TimeIsUp(Exception):
    """Ends a training between two epochs."""


def ordered(
    datasets: Sequence[str], methods: Sequence[str], seeds: Sequence[int], scale: str | None = None, **changes
) -> list[Recipe]:
    """Recipes, each once, by priority: the first seed of every dataset and method comes before the second of any.

    Raises:
        ValueError: as ``experiments.recipe``.
    """
    names = [(dataset, method, seed) for seed in seeds for dataset in datasets for method in methods]
    return list(dict.fromkeys(experiments.recipe(*name, scale, **changes) for name in names))


def recorded(recipe: Recipe) -> bool:
    """Whether the run is finished: trained, measured, and shipped or in the store."""
    return any((folder / f"{run_name(recipe)}.json").exists() for folder in experiments.places())


def epochs_done(recipe: Recipe) -> int:
    """How many epochs of a recipe are trained.

    Raises:
        RuntimeError: its state is damaged.
    """
    if recorded(recipe):
        return recipe.epochs
    path = state_path(recipe)
    try:
        return reached(path)[0] if path.exists() else 0
    except DAMAGE as error:
        raise RuntimeError(f"{path} is damaged or of another version ({error}): delete it to train anew") from None


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


def sweep(
    recipes: Iterable[Recipe],
    *,
    until: float = math.inf,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Iterator[Outcome]:
    """Train and measure what is missing, in order, and yield what came of each recipe; those finished are read.

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
        begun = time.monotonic()

        def stop(history: pd.DataFrame, one: Recipe = one) -> None:
            nonlocal begun, trained
            last, begun, trained = time.monotonic() - begun, time.monotonic(), True
            if len(history) < one.epochs and begun + last > until:
                raise TimeIsUp

        done, made, error = 0, None, None
        try:
            done = epochs_done(one)
            if done == one.epochs or not trained or _fits(one, device, until):
                made = experiments.run(one, device=device, progress=progress, weights=False, watch=stop)
        except TimeIsUp:
            pass
        except (ValueError, RuntimeError, OSError) as problem:
            error = problem
        yield Outcome(one, done if error and not done else epochs_done(one), made, error)


def _fits(recipe: Recipe, device: torch.device, until: float) -> bool:
    """Whether an epoch would end in time; where no earlier run tells, whether time is left."""
    if until == math.inf:
        return True
    expected = timing.known(recipe, device, timing.timed_runs(device))
    return time.monotonic() + (expected.seconds if expected else 0.0) < until
