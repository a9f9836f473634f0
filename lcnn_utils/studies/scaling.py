"""From one run to a cluster (notebook 05): how long a sweep takes on so many workers, on paper and as measured."""

from __future__ import annotations

import heapq
import json
import math
import os
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any
from unittest import mock

import pandas as pd

from ..experiments import SHIPPED, results, run
from ..experiments.plan import Outcome, epochs_done, ordered
from ..experiments.progress import duration
from ..experiments.timing import kind
from ..training import METHODS, Recipe, run_name, state_path, steps_an_epoch
from ..training.checkpoint import digest, read

if TYPE_CHECKING:
    from distributed import Client

WORKERS = tuple(sorted({round(10 ** (k / 20)) for k in range(61)}))  # 1 to 1000, evenly on a logarithmic axis
LAMBDAS = (0.0, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
SEEDS = range(5)
EIGHT = tuple(method for method in METHODS if method != "relu")
OVERHEAD = 0.004  # seconds a run: `overhead` on a cluster of this machine, two cores that were busy otherwise too
OVERHEADS = (0.0, OVERHEAD, 0.05, 0.5)


# ------------------------------------------------------------------------------------------------------- on paper
def makespan(seconds: Iterable[float], workers: int, overhead: float = 0.0) -> float:
    """Seconds until the last of many runs ends, under list scheduling.

    In the order given, each run goes to the worker that gets free first. There is one scheduler: to hand out a run
    (and to take back what came of it) takes it ``overhead`` seconds, in which it hands out no other.

    R. L. Graham, *Bounds on multiprocessing timing anomalies*, SIAM J. Appl. Math. 17 (1969): without overhead, never
    more than total/workers + (1 − 1/workers)·longest.

    Raises:
        ValueError: a duration or the overhead is negative or not finite; workers is no whole number of at least 1.
    """
    lengths = _lengths(seconds, workers, overhead)
    free = [0.0] * min(workers, len(lengths))  # when each worker gets free: a heap
    scheduler = 0.0
    for length in lengths:
        scheduler = max(scheduler, free[0]) + overhead
        heapq.heapreplace(free, scheduler + length)
    return max(free, default=0.0)


def speedups(seconds: Iterable[float], workers: Iterable[int], overhead: float = 0.0) -> pd.DataFrame:
    """:func:`makespan` on several numbers of workers: a row each.

    Columns: workers; seconds; speedup, the runs' total over seconds; efficiency, speedup over workers; bound, the
    seconds that no schedule can beat: the longest run, total/workers, or overhead times runs.

    Raises:
        ValueError: as :func:`makespan`; or the runs take no time at all.
    """
    lengths, rows = list(seconds), []
    for count in workers:
        end = makespan(lengths, count, overhead)
        total = math.fsum(lengths)
        if not total > 0:
            raise ValueError(f"{len(lengths)} runs of {total:g} seconds in all: there is nothing to speed up")
        bound = max(*lengths, total / count, len(lengths) * overhead)
        rows.append((count, end, total / end, total / end / count, bound))
    return pd.DataFrame(rows, columns=["workers", "seconds", "speedup", "efficiency", "bound"])


def _lengths(seconds: Iterable[float], workers: int, overhead: float) -> list[float]:
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ValueError(f"workers must be a whole number of at least 1, got {workers!r}")
    lengths = [float(length) for length in seconds]
    for name, value in [("overhead", float(overhead)), *(("a duration", length) for length in lengths)]:
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a finite number of seconds >= 0, got {value!r}")
    return lengths


# ------------------------------------------------------------------------------------------- with measured durations
def large_sweep(dataset: str, methods: Sequence[str] = EIGHT) -> list[Recipe]:
    """A sweep that outgrows one machine: the methods, five seeds, nine λ_β times nine λ_γ where they make a difference.

    On CIFAR-10 at the scale tiny, whose times are known.
    """
    grid = {"lambda_beta": LAMBDAS, "lambda_gamma": LAMBDAS}
    return ordered((dataset,), methods, SEEDS, "lab" if dataset in ("moons", "digits") else "tiny", grid)


def timed_runs() -> pd.DataFrame:
    """The shipped runs that were trained on a CPU, as of ``experiments.results``."""
    shipped = results((SHIPPED,))
    return shipped[shipped.device.str.contains("CPU")]


def durations(recipes: Iterable[Recipe], timed: pd.DataFrame) -> list[float]:
    """The seconds that each recipe should take: its steps times the median step of the timed runs of its kind.

    Args:
        timed: as :func:`timed_runs`.

    Raises:
        ValueError: no run of a recipe's kind is among them.
    """
    steps: dict[tuple, list[float]] = {}
    for row in timed.to_dict("records"):
        one = Recipe(**{field.name: row[field.name] for field in fields(Recipe)})
        steps.setdefault(kind(one), []).append(row["seconds"] / (one.epochs * steps_an_epoch(one)))
    found = []
    for one in recipes:
        if kind(one) not in steps:
            raise ValueError(f"no timed run is of the kind of {run_name(one)}: train one, or leave {one.method} out")
        found.append(median(steps[kind(one)]) * one.epochs * steps_an_epoch(one))
    return found


def panels(timed: pd.DataFrame, overheads: Sequence[float]) -> dict[str, pd.DataFrame]:
    """:func:`speedups` of large sweeps, of the methods that were timed: title → rows for each overhead (a column).

    Args:
        timed: as for :func:`durations`.
    """
    found = {}
    for dataset, name in (("digits", "digits"), ("cifar10", "CIFAR-10, tiny")):
        there = set(timed[timed.dataset == dataset].method)
        lengths = durations(large_sweep(dataset, [method for method in EIGHT if method in there]), timed)
        parts = [speedups(lengths, WORKERS, overhead).assign(overhead=overhead) for overhead in overheads]
        title = f"{name}: {len(lengths)} runs of {duration(round(median(lengths)))}"
        found[title] = pd.concat(parts, ignore_index=True)
    return found


# ------------------------------------------------------------------------------------------------------- measured
@contextmanager
def store_at(folder: str | Path) -> Iterator[None]:
    """The store is ``folder`` for as long as the block lasts, and for the workers that are started in it."""
    with mock.patch.dict(os.environ, LCNN_STORE=str(folder)):
        yield


def outcomes_frame(outcomes: Iterable[Outcome]) -> pd.DataFrame:
    """What came of a sweep, a row a recipe: file, method, seed, λ_β, epochs done, accuracy, C, and error if any."""
    rows = []
    for outcome in outcomes:
        one, metrics = outcome.recipe, outcome.run.metrics if outcome.run else {}
        shown = [metrics.get(name, math.nan) for name in ("accuracy", "curvature")]
        error = "" if outcome.error is None else str(outcome.error).split(" of Recipe(")[0]
        rows.append((run_name(one), one.method, one.seed, one.lambda_beta, outcome.epochs, *shown, error))
    return pd.DataFrame(rows, columns=["file", "method", "seed", "λ_β", "epochs", "accuracy", "C", "error"])


def content(one: Recipe) -> str:
    """SHA-256 of a stored run: weights, momenta, random numbers, history and metrics, and nothing of when and where.

    Raises:
        FileNotFoundError: it is not in the store.
    """
    if not state_path(one).exists():
        raise FileNotFoundError(f"{run_name(one)} is not in the store: train it first")
    made = run(one, weights=False)
    texts = (json.dumps(made.metrics, sort_keys=True), json.dumps(made.history.to_dict("records"), sort_keys=True))
    return digest(read(state_path(one))[0], *texts)


def kill_worker(client: Client, one: Recipe, epochs: int = 1, patience: float = 120.0) -> int | None:
    """Wait until a training has some epochs behind it, and kill the process that is at it (POSIX: SIGKILL, which no
    process can answer, as when its machine fails).

    Returns:
        The epochs that were in the store then; None if the training was over before it could be hit.

    Raises:
        TimeoutError: it did not get so far.
    """
    pids, end = client.run(os.getpid), time.monotonic() + patience
    while epochs_done(one) < epochs:
        if time.monotonic() > end:
            raise TimeoutError(f"{run_name(one)} had {epochs_done(one)} of {epochs} epochs after {patience:g} s")
        time.sleep(0.01)
    for address, keys in client.processing().items():
        if address in pids and any(run_name(one) in str(key) for key in keys):
            os.kill(pids[address], signal.SIGKILL)
            return epochs_done(one)
    return None


def nothing(recipe: dict[str, Any], **told: Any) -> dict[str, Any]:
    """A task that is over at once: what remains is the price of handing it out and taking it back."""
    return {"stopped": False}


def overhead(client: Client, runs: int = 300) -> float:
    """Seconds a run that a sweep spends on handing it out and taking it back, over so many tasks that do nothing."""
    from ..experiments.dispatch import distribute

    recipes = [Recipe(seed=seed) for seed in range(runs)]
    list(distribute(client, recipes[:20], task=nothing))  # isn't counted: workers import what they need
    begun = time.perf_counter()
    list(distribute(client, recipes, task=nothing))
    return (time.perf_counter() - begun) / runs
