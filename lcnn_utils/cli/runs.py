"""The commands ``lcnn train`` and ``lcnn results``: the notebooks' recipes and store, without notebooks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

OPTIONS = {"dataset": "--dataset NAME", "method": "the method's name first", "seed": "--seeds N ..."}
SHOWN = ("accuracy", "curvature", "margin_curvature", "seconds")


def parsed(changes: tuple[str, ...], options: dict[str, str] = OPTIONS, option: str = "--set") -> dict[str, object]:
    """``("lr=0.2", "augment=true")`` → ``{"lr": 0.2, "augment": True}``, each value of its field's type.

    Args:
        options: fields that the command has an option of its own for, and how to write it.
        option: that the changes were given with.

    Raises:
        ValueError: not NAME=VALUE, an unknown field (the nearest known one is suggested), a value of another type.
    """
    from ..lab import nearest
    from ..training import Recipe

    defaults = dataclasses.asdict(Recipe())
    kinds: dict[str, type] = {name: bool if value is None else type(value) for name, value in defaults.items()}
    values: dict[str, object] = {}
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals:
            raise ValueError(f"{option} {change}: write NAME=VALUE, as in {option} lambda_beta=0")
        kind = kinds[nearest(name, tuple(kinds), "field of a recipe")]
        if name in options:
            raise ValueError(f"{option} {change}: write {options[name]} instead")
        words = {"true": True, "false": False}
        try:
            values[name] = words[text.lower()] if kind is bool else kind(text)
        except (KeyError, ValueError):
            what = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
            raise ValueError(f"{option} {change}: {name} must be {what}") from None
    return values


@dataclass(frozen=True)
class Train:
    """Train methods, or read them from the store where they have been trained, and print what came out.

    Methods: standard, lcnn, gradreg, lcnn_gradreg, cure, softplus_wd, adversarial, minimal, relu, or `all` of them.

    For instance,

    lcnn train lcnn                    (the digits, in seconds)

    lcnn train all --seeds 0 1 2       (the seven methods and two more, three times each)

    lcnn train lcnn --set lambda_beta=0 lambda_gamma=0

    lcnn train all --dataset cifar10 --seeds 0 1 --ship    (on a GPU: makes data/checkpoints)
    """

    methods: Annotated[Positional[tuple[str, ...]], arg(metavar="METHOD ...", help_behavior_hint="")]
    """What to train."""
    dataset: Annotated[str, arg(metavar="NAME", help_behavior_hint="(default: digits)")] = "digits"
    """moons, digits, cifar10, cifar100 or svhn."""
    scale: Annotated[str | None, arg(metavar="SCALE", help_behavior_hint="(default: the first it has)")] = None
    """lab (moons, digits); small, tiny (for a CPU), wide or paper (CIFAR, SVHN)."""
    seeds: Annotated[tuple[int, ...], arg(metavar="N ...", help_behavior_hint="(default: 0)")] = (0,)
    """Seeds, one run each."""
    set: Annotated[tuple[str, ...], arg(metavar="FIELD=VALUE ...", help_behavior_hint="")] = ()
    """Fields of the recipe to change."""
    device: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: a GPU if there is one)")] = None
    """cpu, cuda, …"""
    ship: bool = False
    """Write checkpoints (float16) and numbers into data/checkpoints too."""

    def run(self) -> int:
        from ..experiments import run as run_recipe
        from ..experiments import ship
        from ..training import METHODS, recipe

        if not self.methods:
            raise ValueError("say what to train, as in: lcnn train lcnn")
        methods = tuple(METHODS) if self.methods == ("all",) else self.methods
        changes = parsed(self.set)
        recipes = [recipe(self.dataset, name, seed, self.scale, **changes) for name in methods for seed in self.seeds]
        print(f"{'method':<14} {'seed':>4}  accuracy  C of the loss  C of the margin   seconds")
        for one in recipes:
            made = (ship if self.ship else run_recipe)(one, device=self.device)
            m = made.metrics
            print(
                f"{one.method:<14} {one.seed:>4}  {m['accuracy']:>8.2%}  {m['curvature']:>13.4g}  "
                f"{m['margin_curvature']:>15.4g}  {made.provenance['seconds']:>8.1f}",
                flush=True,
            )
        return 0


@dataclass(frozen=True)
class Results:
    """List every run that is shipped or in the store: means over seeds, ± their standard deviation."""

    dataset: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: all)")] = None
    """Of one dataset only."""
    csv: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Write all runs, a row each, with their recipes, into this file instead."""

    def run(self) -> int:
        from ..experiments import results
        from ..lab import nearest, write_text
        from ..training import DATASETS

        frame = results()
        if self.dataset is not None and len(frame):
            frame = frame[frame.dataset == nearest(self.dataset, DATASETS, "dataset")]
        if not len(frame):
            print("no runs yet: try `lcnn train lcnn`")
        elif self.csv is not None:
            print(f"{len(frame)} runs in {write_text(self.csv, frame.to_csv(index=False))}")
        else:
            print(summary(frame))
        return 0


def summary(frame) -> str:
    """The runs of ``experiments.results``, those that differ in their seeds only together, as a text table."""
    from ..figures.style import markdown

    recipe_fields = [name for name in frame.columns[: frame.columns.get_loc("accuracy")] if name != "seed"]
    told = ["dataset", "method", *(n for n in recipe_fields[2:] if frame[n].nunique() > 1)]
    groups = frame.groupby(recipe_fields, sort=False, dropna=False)
    means, spreads = groups[list(SHOWN)].mean().reset_index(), groups[list(SHOWN)].std().reset_index()
    table = means[told].astype(str).assign(runs=groups.size().to_numpy())
    for name in SHOWN:
        pairs = zip(means[name], spreads[name], strict=True)
        table[name] = [f"{m:.4g}" + (f" ± {s:.2g}" if s == s else "") for m, s in pairs]
    return markdown(table)
