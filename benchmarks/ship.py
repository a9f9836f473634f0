"""Make data/checkpoints anew: every run that is shipped, trained from scratch. `python benchmarks/ship.py [PORTFOLIO]`.

digits (the default) takes some minutes on a CPU; tiny (CIFAR-10, small nets) some hours on a CPU core; cifar10 wants a
GPU. The last two need CIFAR-10 on the disk.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lcnn_utils.experiments import SHIPPED, load_weights, measure, run
from lcnn_utils.experiments.runs import Run, write_record
from lcnn_utils.lab import one_thread
from lcnn_utils.measurements.training import failure_recipes, ingredient_recipes, lambda_recipes
from lcnn_utils.training import METHODS, Recipe, recipe, run_name
from lcnn_utils.training.checkpoint import write

SEEDS = {"digits": (0, 1, 2), "cifar10": (0, 1), "tiny": (0, 1)}
TINY = {"standard": 2, "lcnn": 2, "gradreg": 1, "lcnn_gradreg": 1, "softplus_wd": 1, "adversarial": 1}  # seeds


def portfolio(dataset: str) -> Iterator[tuple[Recipe, bool]]:
    """Each recipe, and whether its weights are shipped too (24 MB of them at most) or its numbers only."""
    seeds = SEEDS[dataset]
    if dataset == "tiny":
        yield from ((recipe("cifar10", m, seed, "tiny"), True) for seed in seeds for m in TINY if seed < TINY[m])
        return
    for method in METHODS:
        yield from ((recipe(dataset, method, seed), method != "relu" or dataset == "digits") for seed in seeds)
    if dataset == "digits":
        yield from ((one, False) for one in lambda_recipes(seeds))
        yield from ((one, False) for arm in ingredient_recipes(seeds).values() for one in arm)
        yield from ((one, one.seed == 0) for arm in failure_recipes(seeds).values() for one in arm)
    else:  # what does the work: the start β = 5 or the penalty? λ_grad is that of lcnn_gradreg in gradreg already
        yield from ((recipe(dataset, "lcnn", seed, lambda_beta=0, lambda_gamma=0), False) for seed in seeds)


def same_portfolio(record: Path, like: Recipe) -> bool:
    """Whether a run belongs to the portfolio of ``like``: portfolios of one dataset differ in width. Leftovers do."""
    try:
        return json.loads(record.read_text(encoding="utf-8"))["recipe"]["width"] == like.width
    except (OSError, ValueError, KeyError):
        return True


def ship(recipe: Recipe, folder: Path = SHIPPED, *, weights: bool = True, progress: bool = True) -> Run:
    """Run a recipe and put it into ``folder``: weights rounded to float16, metrics measured from those.
    ``weights=False`` ships the run's numbers only. RuntimeError: float16 changes the accuracy, or holds no weight so
    large."""
    made = run(recipe, progress=progress, weights=weights)
    if made.model is not None:
        path = folder / f"{run_name(recipe)}.safetensors"
        way_out = "ship its numbers only (weights=False)"
        tensors = {k: v.half() if v.is_floating_point() else v for k, v in made.model.state_dict().items()}
        if not all(bool(value.isfinite().all()) for value in tensors.values()):
            raise RuntimeError(f"a weight of {path.stem} is too large for float16: {way_out}")
        write(path, tensors, {"recipe": json.dumps(dataclasses.asdict(recipe))})
        metrics = measure(load_weights(path, recipe).to(next(made.model.parameters()).device), recipe)
        if abs(metrics["accuracy"] - made.metrics["accuracy"]) > 0.01:
            path.unlink()
            raise RuntimeError(f"float16 changes the accuracy of {path.stem}: {way_out}")
        made = dataclasses.replace(made, metrics=metrics)
    write_record(made, folder)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("portfolio", nargs="?", default="digits", choices=SEEDS)
    dataset = parser.parse_args().portfolio
    one_thread()
    wanted: dict[Recipe, bool] = {}
    for one, weights in portfolio(dataset):
        wanted[one] = weights or wanted.get(one, False)
    with tempfile.TemporaryDirectory() as store:
        os.environ.setdefault("LCNN_STORE", store)  # set it to keep what is trained, and to go on after an interruption
        like = next(iter(wanted))
        for old in sorted(SHIPPED.glob(f"{like.dataset}-*"), reverse=True):  # weights before their record
            if old.exists() and same_portfolio(old.with_suffix(".json"), like):
                old.unlink()
        for one, weights in wanted.items():
            made = ship(one, weights=weights)
            print(f"{one.method} seed {one.seed}: accuracy {made.metrics['accuracy']:.2%}", flush=True)


if __name__ == "__main__":
    main()
