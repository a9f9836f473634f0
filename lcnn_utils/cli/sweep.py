"""The command ``lcnn sweep``: many trainings side by side, in as many sittings as it takes."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from tyro.conf import arg


def parsed(changes: tuple[str, ...]) -> dict[str, object]:
    """``("lr=0.2", "augment=true")`` → ``{"lr": 0.2, "augment": True}``, each value of its field's type (ValueError: no
    such field, or another type). Dataset, method and seed have options of their own."""
    from ..lab import check_choice
    from ..training import Recipe

    defaults = asdict(Recipe())
    kinds = {name: bool if value is None else type(value) for name, value in defaults.items()}
    values: dict[str, object] = {}
    for change in changes:
        name, _, text = change.partition("=")
        kind = kinds[check_choice(name, tuple(kinds), "field of a recipe")]
        if name in ("dataset", "method", "seed"):
            raise ValueError(f"{change}: the command has an option of its own for the {name}")
        try:
            values[name] = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
        except (KeyError, ValueError):
            what = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
            raise ValueError(f"{change}: write {name}=VALUE, where VALUE is {what}") from None
    return values


@dataclass(frozen=True)
class Sweep:
    """Train whatever is missing of many runs, in order: the first seed of everything, then the second.

    On this machine, a process for each GPU or CPU core, or on the Dask cluster of --scheduler (docs/cluster.md).
    Stopped by Ctrl-C or a crash, the same command goes on from the last whole epoch of every run.

    For instance,

    lcnn sweep --methods standard lcnn --seeds 0 1 2

    lcnn sweep --datasets cifar10 --plan    (what would it take?)

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
    """Dask's scheduler: tcp://HOST:PORT, or its scheduler file (.json)."""
    workers: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: a GPU or a core each)")] = None
    """Processes on this machine."""
    plan: bool = False
    """Train nothing: print what is missing, and how long it should take."""
    device: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: a GPU if there is one)")] = None
    """cpu, cuda, …"""

    def run(self) -> int:
        from ..experiments import ordered, plan, sweep
        from ..training import METHODS, run_name

        methods = tuple(METHODS) if self.methods == ("all",) else self.methods
        changes = parsed(self.set)
        recipes = ordered(self.datasets, methods, self.seeds, self.scale, grid(self.grid, changes), **changes)
        if not recipes:
            raise ValueError("there is nothing to sweep: give --datasets, --methods and --seeds a value each, or none")
        if self.plan:
            table = plan(recipes, self.device)
            print(table.to_string(index=False) if len(table) else "nothing is left to train")
            minutes, unknown = table.seconds.sum() / 60, table.seconds.isna().sum()
            print(f"missing: {len(table)} of {len(recipes)} runs, {minutes:.1f} minutes of one process", end="")
            print(f" and {unknown} runs of unknown length" if unknown else "")
            return 0
        with contextlib.ExitStack() as stack:
            client = None
            if self.scheduler:
                from distributed import Client

                of_file = self.scheduler.endswith(".json")
                where = {"scheduler_file" if of_file else "address": self.scheduler}
                client = stack.enter_context(Client(**where))
            outcomes = sweep(recipes, client, workers=self.workers, device=self.device)
        for outcome in outcomes:
            if outcome.run is not None:
                metrics = outcome.run.metrics
                said = f"accuracy {metrics['accuracy']:.2%}, C of the loss {metrics['curvature']:.4g}"
            else:
                said = f"failed: {outcome.error}\n{outcome.traceback}"
            print(f"{run_name(outcome.recipe)}  {said}")
        failed = sum(outcome.error is not None for outcome in outcomes)
        print(f"{len(outcomes) - failed} of {len(outcomes)} runs done, {failed} failed")
        return 1 if failed else 0


def grid(points: tuple[str, ...], changes: Mapping[str, object]) -> dict[str, list[Any]]:
    """``("lambda_beta=1e-4,1e-3",)`` → ``{"lambda_beta": [0.0001, 0.001]}``.

    Raises:
        ValueError: as ``parsed``; a field twice, or in ``changes`` too.
    """
    found: dict[str, list[Any]] = {}
    for point in points:
        field, _, values = point.partition("=")
        if field in found or field in changes:
            raise ValueError(f"--grid {point}: {field} is given twice")
        found[field] = [parsed((f"{field}={value}",))[field] for value in values.split(",")]
    return found
