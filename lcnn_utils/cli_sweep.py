"""The command ``lcnn sweep``: many trainings, in as many sittings as it takes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from .cli_runs import parsed

if TYPE_CHECKING:
    from .plan import Outcome, Part
    from .recipe import Recipe

PIECE = 9.0  # minutes: sittings of ten are common, and starting takes a little
OPTIONS = {"dataset": "--datasets NAME ...", "method": "--methods NAME ...", "seed": "--seeds N ..."}


@dataclass(frozen=True)
class Sweep:
    """Train whatever is missing of many runs, in order: the first seed of every dataset and method, then the second.

    Stopped by --minutes, Ctrl-C or a crash, the same command goes on from the last whole epoch. With --plan nothing is
    trained: what is left is cut into pieces of --minutes, each with the time expected and where that comes from.

    For instance,

    lcnn sweep --methods standard lcnn --seeds 0 1 2

    lcnn sweep --datasets cifar10 --plan    (what would it take?)

    lcnn sweep --datasets cifar10 --minutes 9    (one sitting of it; again until nothing is left)
    """

    datasets: Annotated[tuple[str, ...], arg(metavar="NAME ...", help_behavior_hint="(default: digits)")] = ("digits",)
    """moons, digits, cifar10, cifar100 or svhn."""
    methods: Annotated[tuple[str, ...], arg(metavar="NAME ...", help_behavior_hint="(default: all)")] = ("all",)
    """What to train, in this order."""
    seeds: Annotated[tuple[int, ...], arg(metavar="N ...", help_behavior_hint="(default: 0)")] = (0,)
    """Seeds, the most important one first."""
    scale: Annotated[str | None, arg(metavar="SCALE", help_behavior_hint="(default: the first it has)")] = None
    """lab (moons, digits); small, tiny (for a CPU), wide or paper (CIFAR, SVHN)."""
    set: Annotated[tuple[str, ...], arg(metavar="FIELD=VALUE ...", help_behavior_hint="")] = ()
    """Fields of all recipes to change."""
    minutes: Annotated[float | None, arg(metavar="M", help_behavior_hint="(default: no limit; 9 with --plan)")] = None
    """Stop at the end of an epoch when the next one would take longer than this in all."""
    plan: bool = False
    """Train nothing: print the pieces and how long each should take."""
    device: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: a GPU if there is one)")] = None
    """cpu, cuda, …"""

    def run(self) -> int:
        begun = time.monotonic()
        if self.minutes is not None and not self.minutes >= 0:
            raise ValueError(f"--minutes must be a number of at least 0, got {self.minutes:g}")
        from .plan import missing, ordered, sweep
        from .recipe import METHODS

        methods = tuple(METHODS) if self.methods == ("all",) else self.methods
        recipes = ordered(self.datasets, methods, self.seeds, self.scale, **parsed(self.set, OPTIONS))
        if not recipes:
            raise ValueError("there is nothing to sweep: give --datasets, --methods and --seeds a value each, or none")
        if self.plan:
            print(plan_text(recipes, missing(recipes, self.device), PIECE if self.minutes is None else self.minutes))
            return 0
        until = float("inf") if self.minutes is None else begun + 60 * self.minutes
        outcomes = []
        for outcome in sweep(recipes, until=until, device=self.device):
            outcomes.append(outcome)
            print(outcome_text(outcome), flush=True)
        print(summary(outcomes))
        return 1 if any(outcome.error for outcome in outcomes) else 0


def name(recipe: Recipe) -> str:
    """A run, in columns."""
    return f"{recipe.dataset:<9} {recipe.method:<13} seed {recipe.seed:<2}"


def duration(seconds: float) -> str:
    """Seconds up to two minutes, then minutes, then hours."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def counted(n: int, what: str) -> str:
    """``1 run``, ``2 runs``."""
    return f"{n} {what}{'s' * (n != 1)}"


def plan_text(recipes: Sequence[Recipe], parts: Sequence[Part], minutes: float) -> str:
    """What is done, and the pieces of what is left."""
    from .plan import pieces, recorded

    left, lines = {part.recipe for part in parts}, []
    for one in recipes:
        if one not in left:
            lines.append(f"{name(one)}  done" if recorded(one) else f"{name(one)}  trained, not yet measured")
    cut = pieces(parts, 60 * minutes)
    for number, piece in enumerate(cut, 1):
        lines.append(f"piece {number} of {len(cut)}: {duration(sum(part.seconds for part in piece))}")
        for part in piece:
            span = f"epochs {part.first}–{part.last}" if part.first < part.last else f"epoch {part.first}"
            epochs = f"{span} of {part.recipe.epochs}"
            lines.append(f"  {name(part.recipe)}  {epochs:<20} {duration(part.seconds):>9}  {part.epoch.source}")
    if not cut:
        return "\n".join([*lines, "nothing is left to train"])
    total = duration(sum(part.seconds for part in parts))
    lines.append(f"together {total} in {counted(len(cut), 'piece')} of at most {minutes:g} min")
    if any(part.epoch.seconds > 60 * minutes for part in parts):
        lines.append("an epoch that takes longer than that is a piece of its own")
    lines.append("training alone: starting, compiling, and measuring each finished net come on top")
    lines.append(f"to train a piece: the same with --minutes {minutes:g} in place of --plan, again and again")
    return "\n".join(lines)


def outcome_text(outcome: Outcome) -> str:
    """One line: what came of a run."""
    one = outcome.recipe
    if outcome.error is not None:
        return f"{name(one)}  failed: {' '.join(str(outcome.error).split())}"
    if outcome.run is None:
        return f"{name(one)}  {outcome.epochs} of {one.epochs} epochs"
    m = outcome.run.metrics
    where = "held out" if one.held_out else "test"
    return f"{name(one)}  done: {where} accuracy {m['accuracy']:.2%}, C of the loss {m['curvature']:.4g}"


def summary(outcomes: Sequence[Outcome]) -> str:
    """How much is done, and what is left."""
    failed = sum(outcome.error is not None for outcome in outcomes)
    left = [o for o in outcomes if o.run is None and o.error is None]
    text = f"{len(outcomes) - failed - len(left)} of {len(outcomes)} runs done"
    if failed:
        text += f", {failed} failed"
    if left:
        epochs = sum(outcome.recipe.epochs - outcome.epochs for outcome in left)
        text += (
            f"; left: {counted(epochs, 'epoch')} of {counted(len(left), 'run')}, with which the same command goes on"
        )
    return text
