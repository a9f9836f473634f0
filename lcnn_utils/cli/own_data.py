"""``lcnn train --data FOLDER``: a network of torchvision, trained on a folder of images, and the report of it."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision import models
from torchvision.models import get_model, list_models

from ..data import Images, image_folder
from ..figures import own_network as figures
from ..figures.style import METHOD, save
from ..lab import check_choice, pick_device, store_root, use_style, write_text
from ..measurements.own_network import report
from ..nn import softened, to_low_curvature
from ..training import METHODS, Training, fit
from ..training.batches import validation_split
from ..training.checkpoint import write

FOR_A_FOLDER = {"batch_size": 32, "lr": 0.05}  # which has fewer images than the datasets of the recipes
START = {"beta": 5.0, "gamma": 10.0, "softplus": 10.0}  # of a recipe's nets
HELD_OUT = 0.2


def train_folder(
    folder: Path, methods: Sequence[str], *, model: str, size: int, seeds: Sequence[int], settings: dict[str, Any],
    device: str | None,
) -> None:  # fmt: skip
    """Train ``model``, of torchvision.models, by each method and seed, and report on the images held out: histories,
    weights, states to resume from, report.csv and report.png in ``own/<name of the folder>`` of the store.

    ``folder`` holds a subfolder of images for each class, or two such folders, train and val (or test).
    ``settings``: of :class:`Training`, and where β, γ and a fixed softplus start. OSError, ValueError: as
    :func:`image_folder` and :func:`fit`.
    """
    check_choice(model, list_models(models), "model of torchvision")
    for method in methods:
        check_choice(method, tuple(METHODS), "method")
    start = {name: settings.pop(name, value) for name, value in START.items()}
    for name in settings:
        check_choice(name, tuple(field.name for field in fields(Training)), "setting of a training on a folder")
    where, place = pick_device(device), store_root() / "own" / folder.expanduser().absolute().name
    train, val = (images.to(where) for images in splits(folder, size))
    print(f"{len(train)} images to train on, {len(val)} held out, classes: {', '.join(train.classes)}")
    nets = {}
    for seed in seeds:
        for method in methods:
            with warnings.catch_warnings(record=True) as caught:
                net = network(model, method, train, seed, start)
            print(*(f"{method}: {warning.message}\n" for warning in caught), sep="", end="")
            training = Training(**FOR_A_FOLDER | settings | {"method": method, "seed": seed})
            text = json.dumps([asdict(training), start, size, len(train)], sort_keys=True)
            name = f"{model}-{method}-seed{seed}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
            net, history = fit(net, train, training, val=val, state=place / f"{name}.state.safetensors", device=where)
            write(place / f"{name}.safetensors", net.state_dict(), {"classes": json.dumps(train.classes)})
            history.to_csv(place / f"{name}.csv", index=False)
            print(f"trained: {place / name}.safetensors", flush=True)
            nets[METHOD[method][0] + (f", seed {seed}" if len(seeds) > 1 else "")] = net
    frame = report(nets, val.float(), val.y)
    use_style()
    save(figures.report(frame), "report", {"model": model, "methods": list(methods), "n": len(val)}, place)
    write_text(place / "report.csv", frame.to_csv(index=False))
    columns = ["network", "measure", "eps", "value", "low", "high", "n"]
    print(frame.loc[frame.n > 0, columns].to_string(index=False, na_rep="", float_format="{:.3g}".format))
    print(*figures.remarks(frame), f"the report: {place / 'report.csv'} and {place / 'report.png'}", sep="\n")


def splits(folder: Path, size: int) -> tuple[Images, Images]:
    """Images to train on and images held out: the subfolders train and val or test, or four fifths and one fifth."""
    folder = folder.expanduser()
    for held_out in ("val", "test"):
        if (folder / "train").is_dir() and (folder / held_out).is_dir():
            train, val = image_folder(folder / "train", size), image_folder(folder / held_out, size)
            if train.classes != val.classes:
                raise ValueError(f"{folder}: train has the classes {train.classes}, {held_out} has {val.classes}")
            return train, val
    images = image_folder(folder, size)
    kept, out = validation_split(len(images), HELD_OUT)
    part = lambda index: Images(images.x[index], images.y[index], images.classes, images.name)
    return part(kept), part(out)


def network(name: str, method: str, images: Images, seed: int, start: dict[str, float]) -> nn.Module:
    """The untrained network of torchvision, with the layers that the method needs."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        net, example = get_model(name, num_classes=len(images.classes)), images.float()[:2].cpu()
    activation, lipschitz = METHODS[method]
    if lipschitz:
        return to_low_curvature(net, example, beta=start["beta"], gamma=start["gamma"])
    if activation == "trained":
        return softened(net, start["beta"], trainable=True)
    return softened(net, start["softplus"]) if activation == "softplus" else net
