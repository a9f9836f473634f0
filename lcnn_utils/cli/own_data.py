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
from ..files import write_text
from ..lab import check_choice, pick_device, store_root, use_style
from ..measurements.own_network import report
from ..nn import softened, to_low_curvature
from ..training import METHODS, Training, fit
from ..training.batches import fingerprint, validation_split
from ..training.checkpoint import read, write

FOR_A_FOLDER = {"batch_size": 32, "lr": 0.02, "lambda_beta": 0.01, "lambda_gamma": 0.01}  # of a few hundred images
START = {"beta": 5.0, "gamma": 10.0, "softplus": 10.0}  # of a recipe's nets
HELD_OUT = 0.2
COLUMNS = ["network", "measure", "eps", "value", "low", "high", "n"]


def train_folder(
    folder: Path, methods: Sequence[str], *, model: str, size: int, seeds: Sequence[int], settings: dict[str, Any],
    device: str | None,
) -> None:  # fmt: skip
    """Train ``model``, of torchvision.models, by each method and seed, and report on the images held out: histories,
    weights (see :func:`load`), states to resume from, report.csv and report.png in ``own/<name of the folder>`` of the
    store.

    ``folder`` holds a subfolder of images for each class, or two such folders, train and val (or test).
    ``settings``: of :class:`Training`, and where β, γ and a fixed softplus start. OSError, ValueError: as
    :func:`image_folder` and :func:`fit`.
    """
    check_choice(model, list_models(models), "model of torchvision")
    methods = [name for name in METHODS if name != "relu"] if list(methods) == ["all"] else methods  # here as standard
    start = {name: settings.pop(name, value) for name, value in START.items()}
    for name in settings:
        known = [field.name for field in fields(Training) if field.name not in ("method", "seed")]
        check_choice(name, known, "setting of a training on a folder")
    where, place = pick_device(device), store_root() / "own" / folder.expanduser().absolute().name
    train, val = (images.to(where) for images in splits(folder, size))
    print(f"{len(train)} images to train on, {len(val)} held out, classes: {', '.join(train.classes)}")
    runs = {}
    for seed in seeds:
        for method in methods:
            training = Training(**FOR_A_FOLDER | settings | {"method": method, "seed": seed})
            recipe = {"model": model, "method": method, "seed": seed, "size": size, "classes": train.classes} | start
            with warnings.catch_warnings(record=True) as caught:
                runs[training, json.dumps(recipe)] = network(recipe)
            print(*(f"{method}: {warning.message}\n" for warning in caught), sep="", end="")
    nets = {}
    for (training, about), net in runs.items():
        text = json.dumps([asdict(training), about, fingerprint(train.x, train.y)], sort_keys=True)
        name = f"{model}-{training.method}-seed{training.seed}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        state = place / f"{name}.state.safetensors"
        net, history = fit(net, train, val, training=training, state=state, device=where)
        write(place / f"{name}.safetensors", net.state_dict(), {"about": about})
        history.to_csv(place / f"{name}.csv", index=False)
        print(f"trained: {place / name}.safetensors", flush=True)
        nets[METHOD[training.method][0] + (f", seed {training.seed}" if len(seeds) > 1 else "")] = net
    frame = report(nets, val.float(), val.y)
    use_style()
    save(figures.report(frame), "report", {"model": model, "methods": list(methods), "n": len(val)}, place)
    write_text(place / "report.csv", frame.to_csv(index=False))
    print(frame.loc[frame.n > 0, COLUMNS].to_string(index=False, na_rep="", float_format="{:.3g}".format))
    print(*figures.remarks(frame), f"the report: {place / 'report.csv'} and {place / 'report.png'}", sep="\n")
    print(f"a network in Python: lcnn_utils.cli.own_data.load({str(place / name) + '.safetensors'!r})")


def splits(folder: Path, size: int) -> tuple[Images, Images]:
    """Images to train on and images held out: the subfolders train and val or test, or four fifths and one fifth."""
    folder = folder.expanduser()
    for held_out in ("val", "test"):
        if (folder / "train").is_dir() and (folder / held_out).is_dir():
            return image_folder(folder / "train", size), image_folder(folder / held_out, size)
    images = image_folder(folder, size)
    kept, out = validation_split(len(images), HELD_OUT)
    part = lambda index: Images(images.x[index], images.y[index], images.classes, images.name)
    return part(kept), part(out)


def network(about: dict[str, Any]) -> nn.Module:
    """The untrained network of torchvision, with the layers that the method needs."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(about["seed"])
        net = get_model(about["model"], num_classes=len(about["classes"]))
    activation, lipschitz = METHODS[check_choice(about["method"], tuple(METHODS), "method")]
    if lipschitz:
        example = torch.zeros(2, 3, about["size"], about["size"])
        return to_low_curvature(net, example, beta=about["beta"], gamma=about["gamma"])
    if activation == "trained":
        return softened(net, about["beta"], trainable=True)
    return softened(net, about["softplus"]) if activation == "softplus" else net


def load(weights: str | Path) -> tuple[nn.Module, tuple[str, ...]]:
    """The trained network in a file of :func:`train_folder`, in eval mode, and its classes' names."""
    tensors, metadata = read(Path(weights))
    about = json.loads(metadata["about"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what could not be converted was said before training
        net = network(about)
    net.load_state_dict(tensors)
    return net.eval(), tuple(about["classes"])
