"""The command ``lcnn sweep``: many trainings, in as many sittings as it takes."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from .options import parsed

if TYPE_CHECKING:
    from ..experiments.plan import Outcome, Part
    from ..training import Recipe

PIECE = 9.0  # minutes: sittings of ten are common, and starting takes a little


@dataclass(frozen=True)
class Sweep:
    """Train whatever is missing of many runs, in order: the first seed of everything, then the second.

    On this machine, a process for each GPU or CPU core, or on the cluster of --scheduler (cluster/README.md). Stopped
    by --minutes, Ctrl-C or a crash, the same command goes on from the last whole epoch. With --plan nothing is trained:
    what is left is cut into pieces of --minutes, each with the time expected and where that comes from.

    For instance,

    lcnn sweep --methods standard lcnn --seeds 0 1 2

    lcnn sweep --datasets cifar10 --plan    (what would it take?)

    lcnn sweep --datasets cifar10 --minutes 9    (one sitting of it; again until nothing is left)

    lcnn sweep --methods lcnn --seeds 0 1 2 --grid lambda_beta=1e-4,1e-3 lambda_gamma=0,1e-3    (12 runs)

    lcnn sweep --datasets cifar10 --scheduler tcp://10.0.0.5:8786    (on a cluster)
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
    grid: Annotated[tuple[str, ...], arg(metavar="FIELD=VALUE,VALUE... ...", help_behavior_hint="")] = ()
    """Fields to take several values each, in all combinations."""
    scheduler: Annotated[str | None, arg(metavar="ADDRESS", help_behavior_hint="")] = None
    """Dask's scheduler: tcp://HOST:PORT, or its scheduler file."""
    workers: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: a GPU or a core each)")] = None
    """Processes on this machine; 1 is this process alone."""
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
        from ..experiments import sweep
        from ..experiments.plan import ordered
        from ..training import METHODS

        methods = tuple(METHODS) if self.methods == ("all",) else self.methods
        changes = parsed(self.set)
        recipes = ordered(self.datasets, methods, self.seeds, self.scale, grid(self.grid, changes), **changes)
        if not recipes:
            raise ValueError("there is nothing to sweep: give --datasets, --methods and --seeds a value each, or none")
        if self.scheduler and self.workers:
            raise ValueError("--workers is for this machine: leave it out, the scheduler has its own")
        if self.plan:
            return self.show(recipes)
        with contextlib.ExitStack() as stack:
            client = None
            if self.scheduler:
                from ..experiments.clusters import join

                client = stack.enter_context(join(self.scheduler))
            until = float("inf") if self.minutes is None else begun + 60 * self.minutes
            outcomes = sweep(recipes, client, workers=self.workers, device=self.device, until=until, told=report)
        print(summary(outcomes))
        return 1 if any(outcome.error for outcome in outcomes) else 0

    def show(self, recipes: list[Recipe]) -> int:
        """Print the plan, and what it comes to on the workers there are."""
        from ..experiments.clusters import fitting, join, threads
        from ..experiments.plan import missing
        from ..experiments.progress import duration
        from ..studies.scaling import makespan

        parts = missing(recipes, self.device)
        print(plan_text(recipes, parts, PIECE if self.minutes is None else self.minutes))
        workers = fitting(self.device) if self.workers is None else self.workers
        if self.scheduler:
            with join(self.scheduler) as client:
                workers = threads(client)
        if parts and workers > 1:
            together = duration(makespan([part.seconds for part in parts], workers))
            print(f"on {workers} workers, each as fast as this machine: {together} together")
        return 0


def grid(points: tuple[str, ...], changes: Mapping[str, object]) -> dict[str, list[Any]]:
    """``("lambda_beta=1e-4,1e-3",)`` → ``{"lambda_beta": [0.0001, 0.001]}``.

    Raises:
        ValueError: as ``cli_runs.parsed``; a field twice, or in ``changes`` too.
    """
    found: dict[str, list[Any]] = {}
    for point in points:
        field, _, values = point.partition("=")
        if field in found or field in changes:
            raise ValueError(f"--grid {point}: {field} is given twice")
        found[field] = [parsed((f"{field}={value}",))[field] for value in values.split(",")]
    return found


def report(outcome: Outcome) -> None:
    """Print what came of a run above the bar that shows how far the sweep is; its traceback on stderr."""
    from tqdm import tqdm

    tqdm.write(outcome_text(outcome), file=sys.stdout)
    sys.stdout.flush()
    if outcome.traceback:
        tqdm.write(outcome.traceback, file=sys.stderr)


def name(recipe: Recipe) -> str:
    """A run, in columns."""
    return f"{recipe.dataset:<9} {recipe.method:<13} seed {recipe.seed:<2}"


def plan_text(recipes: Sequence[Recipe], parts: Sequence[Part], minutes: float) -> str:
    """What is done, and the pieces of what is left."""
    from ..experiments.plan import pieces, recorded
    from ..experiments.progress import counted, duration

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
    """A line on what came of a run, and one for each note."""
    one = outcome.recipe
    if outcome.error is not None:
        text = f"failed: {' '.join(str(outcome.error).split())}"
    elif outcome.run is None:
        text = f"{outcome.epochs} of {one.epochs} epochs"
    else:
        m, where = outcome.run.metrics, "held out" if one.held_out else "test"
        text = f"done: {where} accuracy {m['accuracy']:.2%}, C of the loss {m['curvature']:.4g}"
    return "\n".join([f"{name(one)}  {text}", *(f"    {note}" for note in outcome.notes)])


def summary(outcomes: Sequence[Outcome]) -> str:
    """How much is done, and what is left."""
    failed = sum(outcome.error is not None for outcome in outcomes)
    left = [o for o in outcomes if o.run is None and o.error is None]
    from ..experiments.progress import counted

    text = f"{len(outcomes) - failed - len(left)} of {len(outcomes)} runs done"
    if failed:
        text += f", {failed} failed"
    if left:
        epochs = sum(outcome.recipe.epochs - outcome.epochs for outcome in left)
        text += (
            f"; left: {counted(epochs, 'epoch')} of {counted(len(left), 'run')}, with which the same command goes on"
        )
    return text
