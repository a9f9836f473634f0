"""``lcnn evaluate``: measure trained networks, into the tables from which the figures are drawn.

It imports no package of the lab alone (Jupyter, captum, Dask, tyro), so that it runs on a bare GPU server, too:
``python -c "from lcnn_utils.measurements.evaluate import *; evaluate('cifar100', 'wide', train=True)"``.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import time
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from ..attacks import PAPER_EPS, curve_of, first_success
from ..experiments import SHIPPED, append, has, measured, ordered, sweep
from ..experiments.sweep import recorded
from ..figures.style import METHOD
from ..lab import check_choice, one_thread, pick_device
from ..nn import relu_reading
from ..training import METHODS, Recipe, run_name, samples, state_path
from ..training.fit import made_on
from . import attacks, saliency
from .curvature import net_frame
from .paper import steps_frame
from .training import chosen, lambda_recipes, runs_frame, trained_net

DIGITS_EPS = {"l2": (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0), "linf": [n / 255 for n in (4, 8, 16, 24, 32, 48)]}
TINY_EPS = {"l2": PAPER_EPS, "linf": [n / 255 for n in (1, 2, 4, 8, 16)]}
LARGE = dict(seeds=(0, 1), test=1000, train=250, maps=500, restarts=5, eps={"l2": PAPER_EPS})
PLANS: dict[str, dict[str, Any]] = {  # scale: seeds, images of each kind of measurement, the attack
    "lab": dict(seeds=(0, 1, 2, 3, 4), test=360, train=360, maps=100, restarts=5, eps=DIGITS_EPS),
    "tiny": dict(seeds=(0, 1), test=500, train=500, maps=100, restarts=5, eps=TINY_EPS),
    **dict.fromkeys(("small", "wide", "paper"), LARGE),
}
SEARCHED = (0.0, 1e-3, 3e-3, 1e-2, 2e-2, 3e-2, 5e-2, 1e-1, 2e-1, 3e-1)  # values of λ_β = λ_γ
PAPER = ("standard", "lcnn", "lcnn_gradreg", "gradreg", "softplus_wd", "adversarial", "cure")  # what to train first


def evaluate(dataset: str = "digits", scale: str | None = None, only: str | None = None, train: bool = False) -> None:
    """Measure the networks that are here, but not those of which a table has rows with the weights of now. Rows are
    written network by network: stop and go on as you like.

    Args:
        dataset: ``digits``, ``cifar10`` or ``cifar100``.
        scale: of CIFAR's networks (default: tiny); their tables' names have it in them (cifar10_tiny_curves).
        only: one of KINDS, or steps (of training, timed in turn), or, of digits, masking (ten minutes) or
            lambda_search (trains 30 networks).
        train: train the missing networks of the paper's tables first.

    ValueError: an unknown name. FileNotFoundError: no network is here. RuntimeError: a training failed.
    """
    digits = check_choice(dataset, ("digits", "cifar10", "cifar100"), "dataset to evaluate") == "digits"
    scale = check_choice(scale or ("lab" if digits else "tiny"), tuple(PLANS), "scale")
    on_demand = ON_DEMAND if digits else {"steps": steps}
    check_choice(only or "runs", (*KINDS, *on_demand), "kind of table")
    recipes = ordered([dataset], PAPER if train else tuple(METHODS), PLANS[scale]["seeds"], scale)
    one_thread()
    command = f"lcnn evaluate {dataset} --scale {scale}" + " --train" * train
    place = dataset if digits else f"{dataset}_{scale}"
    if only in on_demand:
        frame, facts = on_demand[only](dataset, scale)
        append(frame, f"{place}_{only}", provenance(f"{command} --only {only}") | {"scale": scale} | facts)
        return
    outcomes = sweep(recipes, workers=1) if train else []
    failed = [f"{run_name(outcome.recipe)}: {outcome.error}" for outcome in outcomes if outcome.error]
    trained = [recipe for recipe in recipes if recorded(recipe) and weights_file(recipe).exists()]
    if not trained and not failed:
        raise FileNotFoundError(f"no network of {dataset} at the scale {scale} is here: lcnn sweep, or --train")
    for recipe in trained:
        for kind in [only] if only else KINDS:
            measure(f"{place}_{kind}", kind, recipe, PLANS[scale], provenance(command) | {"scale": scale})
    if failed:
        raise RuntimeError("these trainings failed: " + "; ".join(failed))


def measure(name: str, kind: str, recipe: Recipe, plan: dict[str, Any], about: dict[str, Any]) -> None:
    """Append a network's rows to a table, if the table lacks them or has those of other weights."""
    run, weights = run_name(recipe), weights_sha256(recipe)
    if has(name):
        table = measured(name)
        if ((table.run == run) & (table.sha256 == weights)).any():
            return
    begun = time.perf_counter()
    frame = KINDS[kind](recipe, plan).assign(run=run, sha256=weights)
    seconds = round(time.perf_counter() - begun, 1)
    append(frame, name, about | {"plan": plan, "weights": weights, "seconds": seconds})
    print(f"{name}: {run} in {seconds} s", flush=True)


def runs(recipe: Recipe, plan: dict[str, Any]) -> pd.DataFrame:
    """The metrics of a training."""
    return runs_frame([recipe]).assign(model=recipe.model, width=recipe.width, epochs=recipe.epochs)


def first_images(recipe: Recipe, split: str, n: int) -> tuple[Tensor, Tensor]:
    """The first n images of a split, and their labels."""
    x, y = samples(recipe, split, pick_device())
    return x[:n], y[:n]


def geometry(recipe: Recipe, plan: dict[str, Any]) -> pd.DataFrame:
    """:func:`net_frame` on test and on training images; Standard's weights read as ReLU, too."""
    model = trained_net(recipe)
    nets = [("test", recipe.method, model), ("train", recipe.method, model)]
    if recipe.method == "standard":
        nets.append(("test", "relu_reading", relu_reading(model)))
    parts = []
    for split, method, net in nets:
        frame = net_frame(net, *first_images(recipe, split, plan[split]))
        parts.append(frame.assign(method=method, label=METHOD[method][0], seed=recipe.seed, split=split))
    return pd.concat(parts, ignore_index=True)


def stability(recipe: Recipe, plan: dict[str, Any]) -> pd.DataFrame:
    """:func:`saliency.nets_frame`, without the measures that no figure shows."""
    images = first_images(recipe, "test", plan["maps"])
    frame = saliency.nets_frame({recipe.method: trained_net(recipe)}, *images).assign(seed=recipe.seed)
    columns = ["net", "label", "seed", "image", "method", "weights", "noise", "eps", "relative_change", "cosine"]
    return frame[[*columns, "curvature"]]


def curves(recipe: Recipe, plan: dict[str, Any]) -> pd.DataFrame:
    """What PGD of 20 steps leaves, in L2 and, where planned, in L∞. ``held`` has a character for each image: 1 if the
    network is right on all that was tried."""
    model, (x, y) = trained_net(recipe), first_images(recipe, "test", plan["test"])
    parts = []
    for norm, eps in plan["eps"].items():
        fell = first_success(model, x, y, eps, norm=norm, steps=20, restarts=plan["restarts"])
        curve = curve_of(fell, eps)
        held = ["".join("1" if right else "0" for right in fell > limit) for limit in curve.eps]
        parts.append(curve.assign(held=held, norm=norm, loss="margin"))
    frame = pd.concat(parts, ignore_index=True)
    return frame.assign(method=recipe.method, label=METHOD[recipe.method][0], seed=recipe.seed)


def steps(dataset: str, scale: str) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Seconds of a training step of every method, timed in turn in this process."""
    recipes = ordered([dataset], tuple(METHODS), (0,), scale)
    frame = steps_frame(recipes, pick_device(), rounds=40, seconds=300)
    return frame, {"rounds": int(frame["round"].nunique()), "batch_size": recipes[0].batch_size}


def masking(dataset: str, scale: str) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The checks for masked gradients of four networks, with AutoAttack as a referee."""
    scene = saliency.scene(pick_device(), dataset=dataset).first(200)
    frame = attacks.masking_frame(scene.nets, scene.x, scene.y, 0.5, referee=True)
    return frame, {"runs": list(scene.nets), "n": 200, "eps": 0.5}


def lambda_search(dataset: str, scale: str) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Choose λ = λ_β = λ_γ on digits by a held-out fifth of the training set."""
    search: dict[str, Any] = {"seeds": (0, 1, 2), "lambdas": SEARCHED, "validation_fraction": 0.2}
    frame = runs_frame(lambda_recipes(**search)).rename(columns={"lambda_beta": "lambda_"})
    columns = ["lambda_", "seed", "accuracy", "curvature", "margin_curvature", "images", "seconds"]
    print(f"chosen: λ = {chosen(frame):g}")
    return frame[columns], search | {"chosen": chosen(frame)}


KINDS = {"runs": runs, "geometry": geometry, "stability": stability, "curves": curves}  # with rows for each network
ON_DEMAND = {"steps": steps, "masking": masking, "lambda_search": lambda_search}


def weights_file(recipe: Recipe) -> Path:
    """The weights that ``run`` reads: those that are shipped, else those of the training here."""
    shipped = SHIPPED / f"{run_name(recipe)}.safetensors"
    return shipped if shipped.exists() else state_path(recipe)


def weights_sha256(recipe: Recipe) -> str:
    """The first 16 digits of the SHA-256 of a run's weights."""
    return hashlib.sha256(weights_file(recipe).read_bytes()).hexdigest()[:16]


def provenance(command: str) -> dict[str, Any]:
    """What a number must carry to be repeated; neither host names nor paths."""
    about = {"command": command, "date": datetime.date.today().isoformat()}
    return about | made_on(pick_device()) | {"cpu": cpu_name(), "cores": os.cpu_count()}


def cpu_name() -> str:
    """The processor as it calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
