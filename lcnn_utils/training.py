"""Training: one loop for every method, one state file a recipe, so that a stopped run goes on where it was."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import safetensors
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from tqdm import tqdm

from . import data, models
from .lipschitz import refresh_norms
from .objectives import OBJECTIVES, Recipe
from .runtime import atomic_path, pick_device, store_root

MOONS = {"train": (400, 0), "test": (1000, 1_000_000)}  # points, offset of the seed


def samples(recipe: Recipe, split: str, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """A whole split of the recipe's data as (x, y): images (N, C, H, W) in [0, 1] or points (N, 2), and labels (N,)."""
    if recipe.dataset != "moons":
        images = data.load(recipe.dataset, split, device=device)
        return images.float(), images.y
    n, offset = MOONS[split]
    x, y = data.two_moons(n, noise=0.15, seed=recipe.seed + offset)
    return x.to(device), y.to(device)


def build(recipe: Recipe) -> nn.Module:
    """The untrained network of a recipe, drawn from its seed (the global generator is left alone)."""
    channels, side, classes = {
        "moons": (2, 1, 2), "digits": (1, 8, 10), "cifar10": (3, 32, 10), "cifar100": (3, 32, 100), "svhn": (3, 32, 10),
    }[recipe.dataset]  # fmt: skip
    low = recipe.method != "standard"
    beta = recipe.beta if low else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        if recipe.model == "mlp":
            return models.mlp(
                [channels * side**2, recipe.width, recipe.width, classes], lcnn=low, beta=beta, gamma=recipe.gamma
            )
        shape: dict[str, Any] = dict(num_classes=classes, width=recipe.width, in_channels=channels, image_size=side)
        options = shape | dict(lcnn=low, beta=beta, gamma=recipe.gamma)
        if recipe.model == "vgg11":
            return models.vgg11(**options)
        return models.resnet(int(recipe.model.removeprefix("resnet")), **options)


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor, batch_size: int = 1024) -> float:
    """Share of x (N, …) that the model, in the mode it is in, gives its label y (N,)."""
    hits = [model(xs).argmax(1) == ys for xs, ys in zip(x.split(batch_size), y.split(batch_size), strict=True)]
    return torch.cat(hits).float().mean().item()


def state_path(recipe: Recipe) -> Path:
    """Where the state of a recipe is kept: the name holds a hash of every field."""
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(recipe), sort_keys=True).encode()).hexdigest()[:12]
    return store_root() / "runs" / f"{recipe.dataset}-{recipe.method}-seed{recipe.seed}-{digest}.safetensors"


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """SHA-256 of a state: safetensors has no checksum of its own."""
    digest = hashlib.sha256(f"{metadata['epoch']} {metadata['history']}".encode())
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _save(path: Path, epoch: int, model: nn.Module, optimizer: torch.optim.Optimizer, generator, history) -> None:
    tensors = {f"model.{name}": value.detach().clone() for name, value in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        if (buffer := state.get("momentum_buffer")) is not None:
            tensors[f"momentum.{index}"] = buffer.clone()
    tensors["generator"] = generator.get_state()
    metadata = {"epoch": str(epoch), "history": json.dumps(history)}
    content = save(tensors, metadata | {"sha256": _digest(tensors, metadata)})
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)  # not save_file, whose error on a full disk is no OSError


def _load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, generator) -> tuple[int, list[dict]]:
    """Put the saved state back; returns the number of finished epochs and their history."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        if metadata.get("sha256") != _digest(tensors, metadata):
            raise ValueError("its content does not match its SHA-256")
        model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
        momentum = {
            int(k.split(".")[1]): {"momentum_buffer": v} for k, v in tensors.items() if k.startswith("momentum")
        }
        optimizer.load_state_dict({"state": momentum, "param_groups": optimizer.state_dict()["param_groups"]})
        generator.set_state(tensors["generator"])
        return int(metadata["epoch"]), json.loads(metadata["history"])
    except (safetensors.SafetensorError, RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise RuntimeError(
            f"{path} is damaged or of another version ({str(error).splitlines()[0]}): "
            "delete it, or call fit(…, resume=False) to train anew"
        ) from None


def learning_rate(recipe: Recipe, progress: float) -> float:
    """One cycle: up to ``recipe.lr`` over the first 30 % of training, then along a cosine to 0; ``progress`` in [0, 1].

    L. Smith, N. Topin, arXiv:1708.07120.
    """
    if progress < 0.3:
        return recipe.lr * (0.04 + 0.96 * progress / 0.3)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * (progress - 0.3) / 0.7))


def fit(
    recipe: Recipe, *, device: str | torch.device | None = None, progress: bool = True, resume: bool = True
) -> tuple[nn.Module, pd.DataFrame]:
    """Train the recipe: (model in eval mode with its norms refreshed, history with one row an epoch).

    After each epoch the whole state is written (``state_path``), so a run that was stopped goes on from its last
    epoch, on the CPU bit for bit as if it had not been, and one that is finished is read back at once.

    Args:
        recipe: what to train.
        device: default as in ``runtime.pick_device``.
        progress: show a bar with epochs, loss, training accuracy and Σβ.
        resume: False trains anew over an older state.

    Raises:
        RuntimeError: the device is absent, the loss is not finite (with the epoch), or the saved state is damaged.
        OSError: the state cannot be written.
    """
    device, path = pick_device(device), state_path(recipe)
    batches: Callable[[], Iterable[tuple[Tensor, Tensor]]]
    if recipe.dataset == "moons":  # full batch, 20 steps an epoch
        points, steps = samples(recipe, "train", device), 20
        batches = lambda: [points] * steps
    else:
        images = data.load(recipe.dataset, "train", device=device)
        steps = math.ceil(len(images) / recipe.batch_size)
        batches = lambda: data.batches(images, recipe.batch_size, augment=recipe.augment, generator=generator)
    model = build(recipe).to(device)
    plain = [p for name, p in model.named_parameters() if not name.endswith(("log_beta", "log_gamma"))]
    ours = [p for name, p in model.named_parameters() if name.endswith(("log_beta", "log_gamma"))]
    groups: list[dict[str, Any]] = [{"params": plain}, {"params": ours, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(
        groups,
        lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay, nesterov=recipe.momentum > 0,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(recipe.seed)
    first, history = _load(path, model, optimizer, generator) if resume and path.exists() else (0, [])

    bar = tqdm(range(first, recipe.epochs), f"{recipe.method} seed {recipe.seed}", leave=False, disable=not progress)
    for epoch in bar:
        model.train()
        logged: list[dict[str, Tensor]] = []
        for step, (x, y) in enumerate(batches()):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe, (epoch + step / steps) / recipe.epochs)
            loss, terms = OBJECTIVES[recipe.method](model, x, y, recipe)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            logged.append(terms)
        row = {name: torch.stack([terms[name] for terms in logged]).mean().item() for name in logged[0]}
        if not math.isfinite(row["loss"]) or not all(bool(v.isfinite().all()) for v in model.state_dict().values()):
            raise RuntimeError(
                f"the loss or a weight is not finite in epoch {epoch + 1} of {recipe}: lower lr (now {recipe.lr})"
            )
        history.append({"epoch": epoch + 1} | row)
        _save(path, epoch + 1, model, optimizer, generator, history)
        bar.set_postfix({name: f"{value:.3g}" for name, value in row.items()})
    refresh_norms(model)
    return model.eval(), pd.DataFrame(history)
