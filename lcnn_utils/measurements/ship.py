"""``lcnn ship``: train the networks of data/checkpoints, and put them there."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from ..experiments import SHIPPED, load_weights, run
from ..experiments.runs import Run, finished, write_record
from ..lab import check_choice, one_thread
from ..training import METHODS, Recipe, accuracy, fit_recipe, recipe, run_name, samples
from ..training.checkpoint import write
from .training import failure_recipes, ingredient_recipes, lambda_recipes

CIFAR10_SEEDS = {"standard": 2, "lcnn": 2, "gradreg": 1, "lcnn_gradreg": 1, "softplus_wd": 1, "adversarial": 1}


def portfolio(name: str) -> dict[Recipe, bool]:
    """What is shipped: each recipe, and whether its weights are shipped too (24 MB of them at most) or numbers only."""
    check_choice(name, ("digits", "cifar10"), "portfolio")
    if name == "cifar10":
        return {recipe(name, method, seed): True for method, n in CIFAR10_SEEDS.items() for seed in range(n)}
    seeds = (0, 1, 2)
    weights = [recipe("digits", method, seed) for method in METHODS for seed in (*seeds, 3, 4)]
    numbers_only = lambda_recipes(seeds)
    for recipes in ingredient_recipes(seeds).values():
        numbers_only += recipes
    for first, *others in failure_recipes(seeds).values():
        weights.append(first)
        numbers_only += others
    return dict.fromkeys(numbers_only, False) | dict.fromkeys(weights, True)


def ship(recipe: Recipe, folder: Path = SHIPPED, *, weights: bool = True, progress: bool = True) -> Run:
    """Run a recipe and put it into ``folder``: weights rounded to float16, metrics measured from those; without
    ``weights`` the run's numbers only. RuntimeError: float16 changes the accuracy."""
    if not weights:
        result = run(recipe, progress=progress, weights=False)
        write_record(result, folder)
        return result
    model, history = fit_recipe(recipe, progress=progress)
    path = folder / f"{run_name(recipe)}.safetensors"
    tensors = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    write(path, tensors, {"recipe": json.dumps(dataclasses.asdict(recipe))})
    device = next(model.parameters()).device
    rounded, images = load_weights(path, recipe).to(device), samples(recipe, "test", device)
    if abs(accuracy(rounded, *images) - accuracy(model, *images)) > 0.01:
        path.unlink()
        raise RuntimeError(f"float16 changes the accuracy of {path.stem}: ship its numbers only")
    result = finished(rounded, recipe, history)
    write_record(result, folder)
    return result


def ship_all(name: str = "digits") -> None:
    """Ship what is missing in data/checkpoints: ``digits`` (minutes on a CPU) or ``cifar10`` (hours). To make a run
    again, delete its files there and in the store's ``runs`` first."""
    one_thread()
    for wanted, weights in portfolio(name).items():
        record = SHIPPED / f"{run_name(wanted)}.json"
        if not record.exists() or (weights and not record.with_suffix(".safetensors").exists()):
            result = ship(wanted, weights=weights)
            print(f"{run_name(wanted)}: accuracy {result.metrics['accuracy']:.2%}", flush=True)
