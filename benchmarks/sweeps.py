"""What a sweep over a cluster costs and gains: `python benchmarks/sweeps.py` (about eight minutes, on a quiet machine).

`overhead`: 10,000 recipes that do nothing. `slots`: naps on up to 1,000 slots, beside the model on paper
(`studies.scaling`). `gain`: the same recipes on one worker and on two, in turn, one thread each; beside it what two
plain processes gain over one, which is what the machine gives. Written to results/sweeps_*.md.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import dask
from common import write
from distributed import Client, Scheduler, SpecCluster, Worker

from lcnn_utils.experiments import clusters, sweep
from lcnn_utils.experiments.dispatch import distribute
from lcnn_utils.studies.scaling import makespan
from lcnn_utils.training import Recipe, recipe

COMMAND = "python benchmarks/sweeps.py"
NOTHING: dict[str, Any] = {"epochs": 1, "record": None, "state": None, "error": None, "traceback": "", "notes": ()}
ROUNDS = 3
RECIPES = 4  # a round
EPOCHS = 4
PLAIN = f"""import sys
from lcnn_utils.experiments import recipe, run
for seed in sys.argv[1:]:
    run(recipe("digits", "lcnn", int(seed), epochs={EPOCHS}), progress=False)"""


def nothing(fields: dict[str, Any], **told: Any) -> dict[str, Any]:
    """A recipe that does nothing."""
    return NOTHING


def nap(fields: dict[str, Any], **told: Any) -> dict[str, Any]:
    """A recipe that only takes time: ``lr`` seconds."""
    time.sleep(fields["lr"])
    return NOTHING


def timed(client: Client, recipes: Sequence[Recipe], task) -> float:
    """Seconds until all have come back."""
    begun = time.perf_counter()
    came = sum(1 for _ in distribute(client, list(recipes), task=task))
    assert came == len(recipes)
    return time.perf_counter() - begun


def overhead(n: int) -> None:
    """Recipes that do nothing, on two worker processes."""
    rows = []
    for at_hand in (1.0, 8.0):
        clusters.SETTINGS["distributed.scheduler.worker-saturation"] = at_hand
        with clusters.local(2) as client:
            timed(client, [Recipe(seed=10**6 + seed) for seed in range(100)], nothing)
            seconds = timed(client, [Recipe(seed=seed) for seed in range(n)], nothing)
        rows.append({"tasks at hand": at_hand, "recipes": n, "seconds": seconds, "ms each": 1e3 * seconds / n})
    clusters.SETTINGS["distributed.scheduler.worker-saturation"] = 1.0
    notes = [
        "Submitting, scheduling, running and gathering: client, scheduler and dashboard in one process, two workers in "
        "two more, all on this machine's cores.",
        "With one task at hand (what `sweep` uses, so that the next recipe goes to whoever is free first) a worker "
        "idles while its next task is on its way; with eight it does not.",
    ]
    write("sweeps_overhead", rows, f"{COMMAND} --only overhead", n, 0, notes)


def slots() -> None:
    """Naps on more and more slots: 50 a worker, the workers in this process."""
    rows = []
    for workers, seconds in ((1, 2.0), (4, 5.0), (20, 5.0), (20, 20.0)):
        n, count = 2 * 50 * workers, 50 * workers
        options = {"nthreads": 50, "memory_limit": 0, "dashboard": False, "silence_logs": logging.ERROR}
        scheduler = {"cls": Scheduler, "options": {"protocol": "inproc://", "dashboard_address": "127.0.0.1:0"}}
        specs = {index: {"cls": Worker, "options": options} for index in range(workers)}
        with (
            dask.config.set(clusters.SETTINGS),
            SpecCluster(specs, scheduler, silence_logs=logging.ERROR) as cluster,
            Client(cluster) as client,
        ):
            took = timed(client, [Recipe(seed=seed, lr=seconds) for seed in range(n)], nap)
        row: dict[str, Any] = {"slots": count, "recipes": n, "seconds each": seconds, "took": took}
        row |= {"without overhead": 2 * seconds, "on paper, 2 ms each": makespan([seconds] * n, count, 0.002)}
        rows.append(row | {"efficiency": 2 * seconds / took, "ms each": 1e3 * (took - 2 * seconds) / n})
    notes = [
        "The workers share a process with scheduler and client, so that the overhead is an upper bound. 1,000 workers "
        "of one slot each were too many for one process on two cores.",
        "On paper: list scheduling (`studies.scaling.makespan`) with 2 ms of the scheduler's time a recipe.",
    ]
    write("sweeps_slots", rows, f"{COMMAND} --only slots", 2, 0, notes)


def gain() -> None:
    """Two workers against one, and two processes against one."""
    times: dict[str, list[float]] = {"1 worker": [], "2 workers": [], "1 process": [], "2 processes": []}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LCNN_STORE"] = folder
        with clusters.local(1, device="cpu") as one, clusters.local(2, device="cpu") as two:
            first = recipe("digits", "lcnn", epochs=EPOCHS)
            seeds = iter(range(10**6))
            for round_ in range(-1, ROUNDS):  # the first isn't counted
                for name in list(times)[:: 1 if round_ % 2 else -1]:
                    mine = [next(seeds) for _ in range(RECIPES)]
                    begun = time.perf_counter()
                    if "worker" in name:
                        client = one if name == "1 worker" else two
                        outcomes = sweep([replace(first, seed=seed) for seed in mine], client, progress=False)
                        assert all(outcome.run for outcome in outcomes)
                    else:
                        halves = [mine] if name == "1 process" else [mine[::2], mine[1::2]]
                        running = [subprocess.Popen([sys.executable, "-c", PLAIN, *map(str, h)]) for h in halves]
                        assert not any([process.wait() for process in running])
                    if round_ >= 0:
                        times[name].append(time.perf_counter() - begun)
    rows = []
    for what, alone, both in (
        ("2 workers over 1", times["1 worker"], times["2 workers"]),
        ("2 plain processes over 1", times["1 process"], times["2 processes"]),
    ):
        ratios = sorted(a / b for a, b in zip(alone, both, strict=True))
        row = {"of": what, "gain": median(ratios), "lowest": ratios[0], "highest": ratios[-1]}
        rows.append(row | {"seconds alone": median(alone), "seconds together": median(both)})
    notes = [
        f"{RECIPES} digits recipes of {EPOCHS} epochs a round, {ROUNDS} rounds, all four in turn, one thread each. The "
        "workers are up; the plain processes start anew each time, with their imports in the seconds.",
    ]
    write("sweeps_gain", rows, f"{COMMAND} --only gain", ROUNDS, 0, notes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("overhead", "slots", "gain"))
    parser.add_argument("--recipes", type=int, default=10_000, help="that do nothing")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LCNN_STORE"] = folder
        for name, measure in {"overhead": lambda: overhead(arguments.recipes), "slots": slots, "gain": gain}.items():
            if arguments.only in (None, name):
                measure()


if __name__ == "__main__":
    main()
