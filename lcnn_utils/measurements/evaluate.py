"""``lcnn evaluate``: train the networks of the paper's tables, and measure them, into the tables from which the figures
are drawn.

With CIFAR on the disk it needs torch, torchvision, pandas, scipy, safetensors, filelock and tqdm alone (masking: also
pyautoattack), so that it runs on a bare GPU server:
``python -c "from lcnn_utils.measurements.evaluate import *; evaluate('cifar100', 'wide', train=True, minutes=9)"``.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import math
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from ..attacks import PAPER_EPS, curve_of, first_success
from ..experiments import SHIPPED, append, has, measured, ordered, run
from ..experiments.sweep import recorded
from ..lab import LABEL, check_choice, one_thread, pick_device
from ..nn import relu_reading
from ..training import METHODS, PAPER_METHODS, Recipe, run_name, samples, state_path
from ..training.fit import made_on
from . import attacks, saliency
from .curvature import net_frame
from .paper import steps_frame
from .training import chosen, lambda_recipes, runs_frame, trained_net

DIGITS_EPS = {"l2": (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0), "linf": [n / 255 for n in (4, 8, 16, 24, 32, 48)]}
LARGE: dict[str, Any] = dict(seeds=(0, 1), test=1000, train=250, maps=500, attacked=1000, restarts=5)
LARGE |= dict(eps={"l2": PAPER_EPS}, masking=(200, 0.1))
DIGITS = dict(seeds=(0, 1, 2, 3, 4), test=360, train=360, maps=100, attacked=360, masking=(200, 0.5), eps=DIGITS_EPS)
PLANS: dict[str, dict[str, Any]] = {  # scale: seeds, images of each kind of measurement, the attacks
    "lab": LARGE | DIGITS,
    "small": LARGE | dict(attacked=500, eps={"l2": PAPER_EPS, "linf": [n / 255 for n in (1, 2, 4, 8, 16)]}),
    **dict.fromkeys(("wide", "paper"), LARGE),
}
SEARCHED = (0.0, 1e-3, 3e-3, 1e-2, 2e-2, 3e-2, 5e-2, 1e-1, 2e-1, 3e-1)  # values of λ_β = λ_γ


class TimeIsUp(Exception):
    """Nothing new is to be begun."""


def evaluate(
    dataset: str = "digits", scale: str | None = None, only: str | None = None, train: bool = False,
    minutes: float | None = None,
) -> None:  # fmt: skip
    """Measure the networks that are here, one after the other, but not those of which a table has rows with the weights
    of now. Each table is written after each network: stop and go on as you like.

    Args:
        dataset: ``digits``, ``cifar10`` or ``cifar100``.
        scale: of CIFAR's networks (default: small); their tables' names have it in them (cifar10_small_curves).
        only: one of KINDS; masking (the paper's methods, seed 0: minutes a network) is measured only so. Or, with none
            of the options below, steps (of training, timed in turn) or, of digits, lambda_search (trains 30 networks).
        train: the networks of the paper's tables, each before it is measured, where they are missing.
        minutes: after which no epoch and no measurement is begun; the same call goes on.

    ValueError: an unknown name. FileNotFoundError: no network is here. RuntimeError: a training or a
    measurement failed, after all others were done.
    """
    digits = check_choice(dataset, ("digits", "cifar10", "cifar100"), "dataset to evaluate") == "digits"
    scale = check_choice(scale or ("lab" if digits else "small"), tuple(PLANS), "scale")
    at_once = {"steps": steps} | ({"lambda_search": lambda_search} if digits else {})
    check_choice(only or "runs", (*KINDS, *at_once), "kind of table")
    one_thread()
    place, command = dataset if digits else f"{dataset}_{scale}", f"lcnn evaluate {dataset} --scale {scale}"
    if only in at_once:
        frame, facts = at_once[only](dataset, scale)
        append(frame, f"{place}_{only}", provenance(f"{command} --only {only}") | {"scale": scale} | facts)
        return
    recipes = ordered([dataset], PAPER_METHODS if train else tuple(METHODS), PLANS[scale]["seeds"], scale)
    if only == "masking":
        recipes = [recipe for recipe in recipes if recipe.method in PAPER_METHODS and recipe.seed == 0]
    kinds = [only] if only else [kind for kind in KINDS if kind != "masking"]
    about = provenance(command + " --train" * train + f" --only {only}" * bool(only)) | {"scale": scale}
    end, failed, done = time.monotonic() + 60 * (math.inf if minutes is None else minutes), list[str](), 0

    def in_time(*_: Any) -> None:
        if time.monotonic() > end:
            raise TimeIsUp

    for recipe in recipes:
        try:
            # of some networks rows are shipped, and weights are not
            known = not is_here(recipe) and all(rows(f"{place}_{kind}", recipe) for kind in kinds)
            if train and not is_here(recipe) and not known:
                run(recipe, watch=in_time)
            for kind in kinds if is_here(recipe) else ():
                measure(f"{place}_{kind}", kind, recipe, PLANS[scale], about, in_time)
            done += is_here(recipe) or known
        except (RuntimeError, ValueError, OSError) as error:
            failed.append(f"{run_name(recipe)}: {error}")
        except TimeIsUp:
            print(f"{minutes:g} minutes are over, {done} networks are done: the same command goes on", flush=True)
            break
    else:
        if not done and not failed:
            raise FileNotFoundError(f"no network of {dataset} at the scale {scale} is here: lcnn sweep, or --train")
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(recipes)} networks failed: {'; '.join(failed)}")


def is_here(recipe: Recipe) -> bool:
    """Whether a network's training is finished, and its weights are on the disk."""
    return recorded(recipe) and weights_file(recipe).exists()


def rows(name: str, recipe: Recipe, weights: str | None = None) -> bool:
    """Whether a table has rows of a network (of these weights)."""
    table = measured(name) if has(name) else pd.DataFrame()
    if "run" not in table:
        return False
    of_network = table[table.run == run_name(recipe)]
    return bool(len(of_network if weights is None else of_network[of_network.sha256 == weights]))


def measure(
    name: str, kind: str, recipe: Recipe, plan: dict[str, Any], about: dict[str, Any], in_time: Callable[[], None]
) -> None:
    """Append a network's rows to a table, if the table lacks them or has those of other weights; ``in_time`` may raise
    before it is measured."""
    run, weights = run_name(recipe), weights_sha256(recipe)
    if rows(name, recipe, weights):
        return
    in_time()
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
        parts.append(frame.assign(method=method, label=LABEL[method], seed=recipe.seed, split=split))
    return pd.concat(parts, ignore_index=True)


def stability(recipe: Recipe, plan: dict[str, Any]) -> pd.DataFrame:
    """:func:`saliency.nets_frame`, with the measures that figures show."""
    images = first_images(recipe, "test", plan["maps"])
    frame = saliency.nets_frame({recipe.method: trained_net(recipe)}, *images).assign(seed=recipe.seed)
    columns = ["net", "label", "seed", "image", "method", "weights", "noise", "eps"]
    return frame[[*columns, "relative_change", "cosine", "curvature"]]


def curves(recipe: Recipe, plan: dict[str, Any]) -> pd.DataFrame:
    """What PGD of 20 steps leaves, in L2 and, where planned, in L∞. ``held`` has a character for each image: 1 if the
    network is right on all that was tried."""
    model, (x, y) = trained_net(recipe), first_images(recipe, "test", plan["attacked"])
    parts = []
    for norm, eps in plan["eps"].items():
        fell = first_success(model, x, y, eps, norm=norm, steps=20, restarts=plan["restarts"])
        curve = curve_of(fell, eps)
        held = ["".join("1" if right else "0" for right in fell > limit) for limit in curve.eps]
        parts.append(curve.assign(held=held, norm=norm, loss="margin"))
    frame = pd.concat(parts, ignore_index=True)
    return frame.assign(method=recipe.method, label=LABEL[recipe.method], seed=recipe.seed)


def steps(dataset: str, scale: str) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Seconds of a training step of every method, timed in turn in this process."""
    recipes = ordered([dataset], tuple(METHODS), (0,), scale)
    frame = steps_frame(recipes, pick_device(), rounds=40, seconds=300)
    return frame, {"rounds": int(frame["round"].nunique()), "batch_size": recipes[0].batch_size}


def masking(recipe: Recipe, plan: dict[str, Any]) -> pd.DataFrame:
    """The checks for masked gradients, with AutoAttack as a referee and points made for Standard (for it: GradReg)."""
    n, eps = plan["masking"]
    other = dataclasses.replace(recipe, method="gradreg" if recipe.method == "standard" else "standard")
    if not is_here(other):
        raise RuntimeError(f"its checks need {run_name(other)}, which is not here: --train, without --only")
    nets = {net.method: trained_net(net) for net in (recipe, other)}
    frame = attacks.masking_frame(nets, *first_images(recipe, "test", n), eps, of=[recipe.method], referee=True)
    return frame.assign(eps=eps, n=n)


def lambda_search(dataset: str, scale: str) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Choose λ = λ_β = λ_γ on digits by a held-out fifth of the training set."""
    search: dict[str, Any] = {"seeds": (0, 1, 2), "lambdas": SEARCHED, "validation_fraction": 0.2}
    frame = runs_frame(lambda_recipes(**search)).rename(columns={"lambda_beta": "lambda_"})
    columns = ["lambda_", "seed", "accuracy", "curvature", "margin_curvature", "images", "seconds"]
    print(f"chosen: λ = {chosen(frame):g}")
    return frame[columns], search | {"chosen": chosen(frame)}


KINDS = {"runs": runs, "geometry": geometry, "stability": stability, "curves": curves, "masking": masking}


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
