"""Runs that are trained once and then read.

A run is looked for in ``data/checkpoints`` (shipped, weights in float16), then in ``runs`` of the store, where new ones
go. NAME.json records its recipe, metrics, provenance and history.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from ..curvature import geometry
from ..files import PROJECT, write_text
from ..lab import pick_device, store_root
from ..nn import refresh_norms
from ..training import Recipe, accuracy, build, fit_recipe, run_name, samples, state_path
from ..training.batches import Device
from ..training.checkpoint import DAMAGE, Damaged, epochs_done, read, recipe_of
from ..training.fit import Watch

SHIPPED = PROJECT / "data" / "checkpoints"
GEOMETRY = 1000  # images whose curvature is measured, at most


@dataclass(frozen=True, eq=False)
class Run:
    """What came of a recipe. ``metrics``: ``accuracy`` on the ``images`` of the test split, or of the part held out;
    means over the first ``measured`` of them of ``grad_norm``, ``hessian_norm``, ``curvature`` (of the true label's
    loss) and ``margin_curvature``, medians of both curvatures, and ``parameters``."""

    model: nn.Module | None  # in eval mode, on the device asked for; None where only the numbers were asked for
    metrics: dict[str, float]
    recipe: Recipe
    history: pd.DataFrame  # one row an epoch, with the columns of ``training.fit``
    provenance: dict[str, Any]  # the last sitting's versions and threads, all devices, seconds, seed, date


def measure(model: nn.Module, recipe: Recipe) -> dict[str, float]:
    """The metrics of a run (see :class:`Run`), on the model's device."""
    x, y = samples(recipe, "validation" if recipe.validation_fraction else "test", next(model.parameters()).device)
    near, labels = x[:GEOMETRY], y[:GEOMETRY]
    g, margin = (geometry(model, near, labels, scalar=scalar) for scalar in ("loss", "margin"))
    values = {name: getattr(g, name).mean() for name in ("grad_norm", "hessian_norm", "curvature")}
    values |= {"margin_curvature": margin.curvature.mean(), "curvature_median": g.curvature.median()}
    values |= {"margin_curvature_median": margin.curvature.median()}
    counts = {"images": len(y), "measured": len(labels), "parameters": sum(p.numel() for p in model.parameters())}
    return {"accuracy": accuracy(model, x, y)} | {name: value.item() for name, value in values.items()} | counts


def places() -> tuple[Path, Path]:
    """Where runs are looked for, in this order: those shipped, those of the store."""
    return SHIPPED, store_root() / "runs"


def run(
    recipe: Recipe, *, device: Device = None, progress: bool = True, weights: bool = True, watch: Watch = None
) -> Run:
    """The run of a recipe: read if it is shipped or in the store, else trained, measured and stored.

    ``weights=False`` asks for the numbers only, which are shipped for more runs than weights are. What ``watch``
    raises ends the training: its state is kept, nothing recorded. RuntimeError: what is on disk is damaged, no dataset
    can be had; ``watch`` and other errors as in ``training.fit_recipe``."""
    device = pick_device(device)
    for folder in places():
        path = folder / f"{run_name(recipe)}.json"
        if not path.exists():
            continue
        result = read_record(path)
        if not weights:
            return result
        if folder == SHIPPED and path.with_suffix(".safetensors").exists():
            model = load_weights(path.with_suffix(".safetensors"), recipe).to(device)
            return dataclasses.replace(result, model=model)
        if folder != SHIPPED and epochs_done(state_path(recipe)) == recipe.epochs:
            return dataclasses.replace(result, model=fit_recipe(recipe, device=device, progress=progress)[0])
    model, history = fit_recipe(recipe, device=device, progress=progress, watch=watch)
    made = finished(model, recipe, history)
    write_record(made, store_root() / "runs")
    return made if weights else dataclasses.replace(made, model=None)


def finished(model: nn.Module, recipe: Recipe, history: pd.DataFrame) -> Run:
    """The run of a training that is done, measured now."""
    sittings = history.attrs["made_on"]
    about = sittings[-1] | {"device": " and ".join(dict.fromkeys(sitting["device"] for sitting in sittings))}
    about |= {"seconds": history.attrs["seconds"], "seed": recipe.seed, "date": datetime.date.today().isoformat()}
    return Run(model, measure(model, recipe), recipe, history, about)


def load_weights(path: Path, recipe: Recipe) -> nn.Module:
    """The model of a shipped checkpoint, in float32 and eval mode, its norms refreshed. Raises Damaged."""
    model = build(recipe)
    try:
        tensors, metadata = read(path)
        if recipe_of(json.loads(metadata["recipe"])) != recipe:
            raise ValueError("it is the checkpoint of another recipe")
        model.load_state_dict({k: v.float() for k, v in tensors.items()})
    except DAMAGE as error:
        raise _damaged(path, error) from None
    refresh_norms(model)
    return model.eval()


def results() -> pd.DataFrame:
    """Every run that is shipped or in the store, a row each: the recipe's fields, metrics, seconds, device, date. A
    damaged record is left out, with a warning."""
    rows: dict[str, dict[str, Any]] = {}
    for folder in places():
        for path in sorted(folder.glob("[!.]*.json")):  # a hidden one is being written
            try:
                run = read_record(path)
            except Damaged as error:
                warnings.warn(f"left out: {error}", RuntimeWarning, stacklevel=2)
                continue
            about = {name: run.provenance[name] for name in ("seconds", "device", "date")}
            rows.setdefault(path.stem, {"dataset": ""} | dataclasses.asdict(run.recipe) | run.metrics | about)
    return pd.DataFrame(list(rows.values()))


def read_record(path: Path) -> Run:
    """The run that a record tells of, without its weights. Raises Damaged: it can't be read, is of another version, or
    of another recipe than its name says."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        recipe = recipe_of(record["recipe"])
        if run_name(recipe) != path.stem:
            raise ValueError("it is the record of another recipe")
        return Run(None, record["metrics"], recipe, pd.DataFrame(record["history"]), record["provenance"])
    except DAMAGE as error:
        raise _damaged(path, error) from None


def write_record(run: Run, folder: Path) -> None:
    """Write all of a run but its weights into a folder, atomically. Raises OSError."""
    record: dict[str, Any] = {"recipe": dataclasses.asdict(run.recipe), "metrics": run.metrics}
    record |= {"provenance": run.provenance, "history": run.history.to_dict("records")}
    write_text(
        folder / f"{run_name(run.recipe)}.json", json.dumps(record) + "\n", "set LCNN_STORE to a folder of yours"
    )


def _damaged(path: Path, error: Exception) -> Damaged:
    return Damaged(path, error, "restore it with git" if path.parent == SHIPPED else "delete it, and it is made again")
