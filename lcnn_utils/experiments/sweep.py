"""Sweeps: many recipes trained side by side by the workers of a Dask cluster (https://distributed.dask.org, the extra
``cluster`` of this package), which share the store (``LCNN_STORE``) with the client; and what a sweep would take."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from .. import training
from ..lab import one_thread, pick_device, track
from ..training import ONLY, Recipe, run_name, state_path
from ..training.checkpoint import epochs_done
from ..training.fit import made_on
from . import runs

if TYPE_CHECKING:
    from distributed import Client, LocalCluster

# the fields that the time of an epoch depends on
COSTLY = ["dataset", "method", "model", "width", "batch_size", "augment", "validation_fraction"]
COSTLY += ["derivative", "attack_steps", "compile", "bfloat16"]


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a sweep made of a recipe: its run without weights, or the error that ended it and where (``traceback``)."""

    recipe: Recipe
    run: runs.Run | None
    error: BaseException | None = None
    traceback: str = ""


def ordered(
    datasets: Sequence[str],
    methods: Sequence[str],
    seeds: Sequence[int],
    scale: str | None = None,
    grid: Mapping[str, Sequence[Any]] | None = None,
    **changes: Any,
) -> list[Recipe]:
    """All combinations, each once; the first seed of everything comes before the second of anything.

    ``grid``: fields of the recipe and their values; the last one changes fastest. A method that a field makes no
    difference to has its default. ``changes``: fields of all recipes. Errors as ``Recipe``.
    """
    grid, recipes = grid or {}, []
    for seed, dataset, method, values in product(seeds, datasets, methods, product(*grid.values())):
        point = dict(zip(grid, values, strict=True))
        matters = {name: value for name, value in point.items() if method in ONLY.get(name, (method,))}
        recipes.append(training.recipe(dataset, method, seed, scale, **changes | matters))
    return list(dict.fromkeys(recipes))


def recorded(recipe: Recipe) -> bool:
    """Whether the run of a recipe is finished: trained, measured, and shipped or in the store."""
    return any((folder / f"{run_name(recipe)}.json").exists() for folder in runs.places())


def plan(recipes: Iterable[Recipe], device: str | None = None) -> pd.DataFrame:
    """What is missing of a sweep, a row each. Columns: run (its name); the fields in which the recipes differ; epochs;
    done, how many of them are trained; seconds that one process should take for the others, by the median epoch of
    stored runs of the same kind, on this ``device`` if there are any; device, of those runs. Else NaN and "unknown"."""
    recipes = list(dict.fromkeys(recipes))
    fields = pd.DataFrame([dataclasses.asdict(recipe) for recipe in recipes])
    differing = [str(name) for name in fields if name != "epochs" and fields[name].nunique(dropna=False) > 1]
    stored, this_device = runs.results(), made_on(pick_device(device))["device"]
    kinds = {} if stored.empty else dict(list(stored.groupby(stored[COSTLY].map(str).agg(" ".join, axis=1))))
    rows = []
    for recipe in recipes:
        if recorded(recipe):
            continue
        done, seconds, devices = epochs_done(state_path(recipe)), float("nan"), "unknown"
        same = kinds.get(" ".join(str(getattr(recipe, name)) for name in COSTLY))
        if same is not None:
            timed = same[same.device == this_device] if (same.device == this_device).any() else same
            seconds = (recipe.epochs - done) * (timed.seconds / timed.epochs).median()
            devices = ", ".join(timed.device.unique())
        differences = [getattr(recipe, name) for name in differing]
        rows.append([run_name(recipe), *differences, recipe.epochs, done, seconds, devices])
    return pd.DataFrame(rows, columns=["run", *differing, "epochs", "done", "seconds", "device"])


def dask_distributed() -> ModuleType:
    """The package ``distributed``. ImportError, which says what to install, where it is missing."""
    try:
        import distributed
    except ImportError:
        text = "several processes or machines need Dask: pip install -e '.[cluster]'; one (--workers 1) does not"
        raise ImportError(text) from None
    return distributed


def run_task(recipe: Recipe, device: str | None = None) -> runs.Run:
    """What a worker does with a recipe: train and measure it, as :func:`run` does, or read it."""
    one_thread()  # as in a notebook, so that the numbers are the same
    return runs.run(recipe, device=device, progress=False, weights=False)


def local_cluster(workers: int | None, device: str | None) -> LocalCluster:
    """A cluster of this machine, that other machines cannot reach: a process for each core, or one for its GPU."""
    distributed = dask_distributed()
    import dask

    chosen = pick_device(device)
    options = {"threads_per_worker": 1, "dashboard_address": "127.0.0.1:0", "memory_limit": 0}
    options["silence_logs"] = logging.CRITICAL  # what fails is in its outcome
    if chosen.type == "cuda" and chosen.index is None and torch.cuda.device_count() > 1:
        raise RuntimeError("to use several GPUs: docs/cluster.md; or name one, such as cuda:0")
    with dask.config.set({"distributed.scheduler.worker-saturation": 1.0}):  # a free worker takes whatever waits
        return distributed.LocalCluster(n_workers=workers or (None if chosen.type == "cpu" else 1), **options)


def sweep(
    recipes: Iterable[Recipe], client: Client | None = None, *, workers: int | None = None, device: str | None = None
) -> list[Outcome]:
    """Train and measure what is missing of many recipes, side by side.

    A recipe whose worker is lost goes on in another from its last epoch in the store (Dask's ``allowed-failures``, 3
    times at most). A sweep that was stopped goes on when it is called again.

    Args:
        recipes: in the order in which they are to be begun, and of the outcomes. One that fails ends no other.
        client: of a Dask cluster; None starts one on this machine for the call: in a script, only below
            ``if __name__ == "__main__":``, as always when Python starts processes.
        workers: processes of that cluster (ValueError: < 1); default: one for each core, or a single one on a GPU
            (several GPUs: docs/cluster.md). 1 trains in this process, one after the other, and needs no Dask.

    RuntimeError: a stored record is damaged, the device is absent, or the scheduler was lost. ImportError: no Dask.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"give at least 1 worker: got {workers}")
    recipes = list(recipes)
    outcomes = {recipe: Outcome(recipe, runs.run(recipe, weights=False)) for recipe in recipes if recorded(recipe)}
    missing = [recipe for recipe in dict.fromkeys(recipes) if recipe not in outcomes]
    if missing and client is not None:
        outcomes |= _swept(missing, client, device)
    elif missing and workers == 1:
        outcomes |= {recipe: _outcome(recipe, device) for recipe in track(missing, "runs")}
    elif missing:
        with local_cluster(workers, device) as cluster, dask_distributed().Client(cluster) as own:
            outcomes |= _swept(missing, own, device)
    return [outcomes[recipe] for recipe in recipes]


def _outcome(recipe: Recipe, device: str | None) -> Outcome:
    """The outcome of a recipe in this process."""
    try:
        return Outcome(recipe, run_task(recipe, device))
    except Exception as error:
        return Outcome(recipe, None, error, "".join(traceback.format_tb(error.__traceback__)))


def _swept(missing: list[Recipe], client: Client, device: str | None) -> dict[Recipe, Outcome]:
    """The outcomes of recipes that are sent to a cluster."""
    with contextlib.suppress(KeyError):  # a scheduler without one
        print(f"{len(missing)} runs, dashboard: {client.dashboard_link}")
    futures = {}
    for recipe in missing:
        future = client.submit(run_task, recipe, device, key=f"lcnn-{run_name(recipe)}", pure=False)
        futures[future] = recipe
    outcomes = dict[Recipe, Outcome]()
    try:
        bar = track(dask_distributed().as_completed(futures), "runs", total=len(missing))
        for future in bar:
            recipe = futures[future]
            if future.status == "finished":
                outcomes[recipe] = Outcome(recipe, future.result())
            elif future.status == "error":
                where = "".join(traceback.format_tb(future.traceback()))
                outcomes[recipe] = Outcome(recipe, None, future.exception(), where)
                bar.set_postfix(failed=sum(outcome.run is None for outcome in outcomes.values()))
            else:
                raise RuntimeError("the scheduler was lost: what was finished is in the store, the same sweep goes on")
    finally:
        for future in futures:  # those that wait are forgotten (after `cancel` the same sweep could not begin at once)
            future.release()
    return outcomes
