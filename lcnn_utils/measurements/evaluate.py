"""``lcnn evaluate``: measure trained networks, into the tables from which the figures are drawn.

It imports PyTorch and the scientific packages alone, so it runs on a GPU server without the lab's others, too:
``python -c "from lcnn_utils.measurements.evaluate import *; evaluate('cifar100', 'wide', train=True)"``.
"""

from __future__ import annotations

import datetime
import hashlib
import math
import os
import platform
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from ..experiments import SHIPPED, append, has, how_measured, measured, ordered, sweep
from ..experiments.sweep import recorded
from ..lab import check_choice, one_thread
from ..training import METHODS, Recipe, run_name, state_path
from . import attacks, paper, saliency
from .training import HELD_OUT, chosen, runs_frame, search_frame, search_recipes

__all__ = ["evaluate"]

DIGITS = dict(seeds=(0, 1, 2), images=360, maps=100, restarts=5, l2=attacks.DIGITS_EPS, linf=attacks.DIGITS_LINF)
TINY = dict(seeds=(0, 1), images=500, maps=100, restarts=1, l2=attacks.PAPER_EPS, linf=attacks.LINF_EPS)
LARGE = dict(seeds=(0, 1), images=1000, maps=500, restarts=5, l2=attacks.PAPER_EPS, geometry=dict(train=250, chunk=500))
PLANS: dict[str, dict[str, Any]] = {"lab": DIGITS, "tiny": TINY, "small": LARGE, "wide": LARGE, "paper": LARGE}
PAPER = ("standard", "lcnn", "lcnn_gradreg", "gradreg", "softplus_wd", "adversarial", "cure")  # what to train first
KINDS = ("runs", "geometry", "stability", "curves")  # of tables, with rows for each network
MASKING = dict(eps=0.5, n=200)


def evaluate(
    dataset: str = "digits",
    scale: str | None = None,
    only: str | None = None,
    minutes: float = math.inf,
    train: bool = False,
) -> None:
    """Measure the networks that are here, but not those of which a table has rows with the weights of now.

    A network's rows are written once they are measured: stop and go on as you like, in pieces of ``minutes``.

    Args:
        dataset: ``digits``, ``cifar10`` or ``cifar100``.
        scale: of CIFAR's networks (default: tiny); their tables' names have it in them (cifar10_tiny_curves).
        only: one kind of table: runs, geometry, stability, curves; of digits also masking, and lambda_search, which
            trains 30 networks.
        train: train the missing networks of the paper's tables first.

    ValueError: an unknown name. FileNotFoundError: no network is here.
    """
    check_choice(dataset, ("digits", "cifar10", "cifar100"), "dataset")
    digits = dataset == "digits"
    scale = check_choice(scale or ("lab" if digits else "tiny"), ("lab",) if digits else tuple(PLANS)[1:], "scale")
    check_choice(only or "runs", (*KINDS, "masking", "lambda_search") if digits else KINDS, "kind of table")
    one_thread()
    command = f"lcnn evaluate {dataset}" + f" --scale {scale}" * (not digits) + " --train" * train
    about = provenance(command) | {"scale": scale}
    if only == "lambda_search":
        search(about | {"command": f"{command} --only lambda_search"})
        return
    recipes = ordered([dataset], PAPER if train else tuple(METHODS), PLANS[scale]["seeds"], scale)
    for outcome in sweep(recipes, workers=1) if train else ():
        print(outcome.traceback, end="")
    recipes = [recipe for recipe in recipes if recorded(recipe) and weights_file(recipe).exists()]
    if not recipes:
        raise FileNotFoundError(f"no network of {dataset} at the scale {scale} is here: lcnn sweep, or --train")
    end = time.monotonic() + 60 * minutes
    for recipe in recipes:
        for kind in KINDS:
            if time.monotonic() > end:
                print("the time is over: the same command goes on")
                return
            if only in (None, kind):
                measure(f"{dataset}_{kind}" if digits else f"{dataset}_{scale}_{kind}", kind, recipe, about)
    if only == "masking" or (digits and only is None):
        masking(about)


def measure(name: str, kind: str, recipe: Recipe, about: dict[str, Any]) -> None:
    """Append a network's rows to a table, if the table lacks them or has those of other weights."""
    run, weights = run_name(recipe), weights_sha256(recipe)
    if has(name):
        table = measured(name)
        if ((table.run == run) & (table.sha256 == weights)).any():
            return
    begun = time.perf_counter()
    frame, facts = measurement(kind, PLANS[about["scale"]], recipe)
    seconds = round(time.perf_counter() - begun, 1)
    append(frame.assign(run=run, sha256=weights), name, about | facts | {"weights": weights, "seconds": seconds})
    print(f"{name}: {run} in {seconds} s", flush=True)


def measurement(kind: str, plan: dict[str, Any], recipe: Recipe) -> tuple[pd.DataFrame, dict[str, Any]]:
    """One kind of measurement of one network, and how it was made."""
    images, maps = {"n": plan["images"]}, {"n": plan["maps"]}
    if kind == "runs":
        return runs_frame([recipe]).assign(model=recipe.model, width=recipe.width, epochs=recipe.epochs), images
    if kind == "geometry":
        return paper.geometry_frame([recipe], images=plan["images"], **plan.get("geometry", {})), images
    if kind == "stability":
        keep = ["net", "label", "seed", "image", "method", "weights", "noise", "eps", "relative_change", "cosine"]
        return saliency.stability_frame([recipe], images=plan["maps"])[[*keep, "curvature"]], maps
    attack, parts = {"steps": 20, "restarts": plan["restarts"]}, []
    for norm in ("l2", "linf"):
        if norm in plan:
            parts.append(attacks.curves_frame([recipe], plan[norm], images=plan["images"], norm=norm, **attack))
    return pd.concat(parts, ignore_index=True), images | {"attack": attack}


def masking(about: dict[str, Any]) -> None:
    """The checks for masked gradients of four networks on digits, with AutoAttack as a referee: ten minutes."""
    weights = [weights_sha256(recipe) for recipe in ordered(["digits"], saliency.PAPER_NETS, [0])]
    if has("digits_masking") and how_measured("digits_masking").get("weights") == weights:
        return
    begun, scene = time.perf_counter(), saliency.scene(torch.device("cpu"), dataset="digits").first(int(MASKING["n"]))
    frame = attacks.masking_frame(scene.nets, scene.x, scene.y, MASKING["eps"], referee=True)
    facts = MASKING | {"runs": list(scene.nets), "weights": weights, "seconds": round(time.perf_counter() - begun)}
    append(frame, "digits_masking", about | facts)


def search(about: dict[str, Any]) -> None:
    """Choose λ on digits by a held-out fifth of the training set: 30 trainings."""
    begun, seeds = time.perf_counter(), (0, 1, 2)
    frame = search_frame(search_recipes(seeds))
    facts = {"n": int(frame.images.iloc[0]), "seeds": seeds, "held_out": HELD_OUT, "chosen": chosen(frame)}
    facts |= {"training_seconds": round(frame.seconds.sum()), "seconds": round(time.perf_counter() - begun)}
    append(frame, "digits_lambda_search", about | facts)
    means = frame.groupby("lambda_")[["accuracy", "curvature", "margin_curvature"]].agg(["mean", "std"])
    print(f"{means.to_string(float_format='%.4g')}\nchosen: λ = {facts['chosen']:g}")


def weights_file(recipe: Recipe) -> Path:
    """The weights that ``run`` reads: those that are shipped, else those of the training here."""
    shipped = SHIPPED / f"{run_name(recipe)}.safetensors"
    return shipped if shipped.exists() else state_path(recipe)


def weights_sha256(recipe: Recipe) -> str:
    """The first 16 digits of the SHA-256 of a run's weights."""
    return hashlib.sha256(weights_file(recipe).read_bytes()).hexdigest()[:16]


def provenance(command: str, n: int = 0, seed: int = 0) -> dict[str, Any]:
    """What a number must carry to be repeated; neither host names nor paths."""
    return {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "n": n,
        "seed": seed,
    }


def cpu_name() -> str:
    """The processor as it calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
