"""Measure the trained networks' geometry, steadiness and robustness: `python benchmarks/evaluate.py [DATASET]`.

Makes the tables DATASET_runs, _geometry, _stability, _curves and _masking in the store's results, from which the
figures are drawn; CIFAR's names have the scale in them (cifar10_tiny_curves). Each network's rows are written when they
are measured, and rows that are there, of the weights that are here now, are not measured again: stop and go on as you
like, in pieces of --minutes. digits (the default) takes half an hour on one core, CIFAR's nets of the scale tiny about
ten minutes each. With --train a network that is missing is trained first, by the methods of the paper's tables.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from common import provenance

from lcnn_utils.experiments import SHIPPED, append, has, measured, sweep
from lcnn_utils.experiments.sweep import recorded
from lcnn_utils.lab import one_thread
from lcnn_utils.measurements import attacks, paper, saliency
from lcnn_utils.measurements import training as methods
from lcnn_utils.measurements.saliency import scene
from lcnn_utils.training import METHODS, Recipe, recipe, run_name, state_path

DIGITS: dict[str, Any] = dict(seeds=(0, 1, 2), images=360, geometry=360, maps=100, l2=attacks.DIGITS_EPS,
                              linf=attacks.DIGITS_LINF, attack=dict(steps=20, restarts=5),
                              masking=(0.5, 200))  # fmt: skip
CIFAR: dict[str, Any] = dict(seeds=(0, 1), images=500, geometry=500, maps=100, l2=attacks.PAPER_EPS,
                             linf=attacks.LINF_EPS, attack=dict(steps=20, restarts=1), masking=(0.2, 200))  # fmt: skip
LARGE: dict[str, Any] = dict(seeds=(0, 1), images=1000, geometry=1000, train=250, chunk=500, maps=500,
                             l2=attacks.PAPER_EPS, attack=dict(steps=20, restarts=5), masking=(0.2, 200))  # fmt: skip
PAPER = ("standard", "lcnn", "lcnn_gradreg", "gradreg", "softplus_wd", "adversarial", "cure")  # what to train first
COUNT = {"runs": "geometry", "geometry": "geometry", "stability": "maps", "curves": "images"}  # kind: its n in a plan
CIFAR_SCALES = ("tiny", "small", "wide", "paper")
PLANS = {("digits", "lab"): DIGITS}
PLANS |= {(d, s): CIFAR if s == "tiny" else LARGE for d in ("cifar10", "cifar100") for s in CIFAR_SCALES}


def weights_file(one: Recipe) -> Path:
    """The weights that ``run`` reads: those that are shipped, else those of the training here."""
    there = SHIPPED / f"{run_name(one)}.safetensors"
    return there if there.exists() else state_path(one)


def frames(plan: dict[str, Any], kind: str, one: Recipe) -> pd.DataFrame:
    """One kind of measurement of one network, as the studies make it."""
    if kind == "runs":
        return methods.runs_frame([one]).assign(model=one.model, width=one.width, epochs=one.epochs)
    if kind == "geometry":
        options = {key: plan[key] for key in ("train", "chunk") if key in plan}
        return paper.geometry_frame([one], images=plan["geometry"], **options)
    if kind == "stability":
        keep = ["net", "label", "seed", "image", "method", "weights", "noise", "eps", "relative_change", "cosine"]
        return saliency.stability_frame([one], images=plan["maps"])[[*keep, "curvature"]]
    parts = [attacks.curves_frame([one], plan[norm], images=plan["images"], norm=norm, **plan["attack"])
             for norm in ("l2", "linf") if norm in plan]  # fmt: skip
    return pd.concat(parts, ignore_index=True)


def measure(name: str, kind: str, plan: dict[str, Any], one: Recipe, about: dict) -> None:
    """Append a network's rows to a table, if the table lacks them."""
    run, weights = run_name(one), hashlib.sha256(weights_file(one).read_bytes()).hexdigest()[:16]
    if has(name):
        table = measured(name)
        if ((table.run == run) & (table.sha256 == weights)).any():
            return
    facts = about | {"n": plan[COUNT[kind]], "weights": weights}
    facts |= {"attack": plan["attack"]} if kind == "curves" else {}
    begun = time.perf_counter()
    frame = frames(plan, kind, one)
    seconds = round(time.perf_counter() - begun, 1)
    append(frame.assign(run=run, sha256=weights), name, facts | {"seconds": seconds})
    print(f"{name}: {run} in {seconds} s", flush=True)


def ready(one: Recipe) -> bool:
    """Whether a network is trained and its weights are on this machine."""
    return recorded(one) and weights_file(one).exists()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", nargs="?", default="digits", choices=sorted({dataset for dataset, _ in PLANS}))
    parser.add_argument("--scale", choices=CIFAR_SCALES, help="of CIFAR's nets (default: tiny)")
    parser.add_argument("--only", choices=(*COUNT, "masking"))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long; call again to go on")
    parser.add_argument("--train", action="store_true", help="train the networks that are missing (CIFAR: on a GPU)")
    arguments = parser.parse_args()
    dataset, only = arguments.dataset, arguments.only
    scale = "lab" if dataset == "digits" else arguments.scale or "tiny"
    one_thread()
    plan = PLANS[dataset, scale]
    wanted = PAPER if arguments.train else METHODS
    recipes = [recipe(dataset, method, seed, scale) for seed in plan["seeds"] for method in wanted]
    prefix = dataset if scale == "lab" else f"{dataset}_{scale}"
    command = " ".join(["python benchmarks/evaluate.py", dataset, *([] if scale == "lab" else ["--scale", scale])])
    about = provenance(command + " --train" * arguments.train, 0, 0) | {"scale": scale}
    kinds = [kind for kind in COUNT if only in (None, kind)]
    if arguments.train:
        for outcome in sweep(recipes):
            print(outcome.traceback, end="")
    found, until = False, time.monotonic() + 60 * arguments.minutes
    for one in recipes:
        if time.monotonic() < until and ready(one):
            found = True
            for kind in kinds:
                if time.monotonic() < until:
                    measure(f"{prefix}_{kind}", kind, plan, one, about)
    if time.monotonic() > until:
        print("the time was over: the same command goes on")
    elif not found:
        parser.error(f"no networks of {dataset} at the scale {scale} are here: train them with --train or lcnn sweep")
    elif only == "masking" or (only is None and dataset == "digits"):  # AutoAttack on CIFAR takes a quarter of an hour
        eps, n = plan["masking"]
        begun, here = time.perf_counter(), scene(device=torch.device("cpu"), dataset=dataset).first(n)
        frame = attacks.masking_frame(here.nets, here.x, here.y, eps, referee=True)
        facts = {"n": n, "eps": eps, "runs": list(here.nets), "seconds": round(time.perf_counter() - begun)}
        append(frame, f"{prefix}_masking", about | facts)


if __name__ == "__main__":
    main()
