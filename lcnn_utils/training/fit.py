"""Training: a recipe's samples and network, one step, and the loop, which goes on where it was stopped."""

from __future__ import annotations

import math
import platform
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from torch import Generator, Tensor, nn
from tqdm import tqdm

from .. import __version__, data
from ..curvature import geometry
from ..lab import check_choice, keep_memory, pick_device
from ..nn import (
    CenteredSoftplus,
    LipschitzBatchNorm2d,
    mlp,
    norms_once_a_step,
    refresh_norms,
    resnet,
    sigma_error,
    vgg11,
)
from .checkpoint import State, epochs_done, locked, state_path
from .objectives import OBJECTIVES
from .recipe import INPUTS, METHODS, ONLY, Recipe

TRAINING = {"moons": 400, "digits": 1437, "cifar10": 50_000, "cifar100": 50_000, "svhn": 73_257}  # samples to train on
MOONS = {"train": (TRAINING["moons"], 0), "test": (1000, 1_000_000)}  # points, offset of the seed
MOONS_STEPS = 20  # an epoch, each on all points
SPLIT_SEED = 20_221_128  # of the one permutation that says what is held out
PROBES, PRODUCTS = 16, 4  # training images of the history's curvature, and its Hessian-vector products
Batch = tuple[Tensor, Tensor]
Device = str | torch.device | None
Watch = Callable[[pd.DataFrame], None] | None
Step = Callable[[Tensor, Tensor], Tensor]  # a batch (x, y) → the terms to log, (T,)


def held_out(n: int, share: float) -> tuple[Tensor, Tensor]:
    """Ascending indices of those of n samples to train on, and of those held out: the same for all methods and seeds; a
    larger share holds out the same and more. ValueError: one of the two parts would be empty."""
    count = round(share * n)
    if share and not 0 < count < n:
        raise ValueError(f"held_out={share:g} holds out {count} of {n} samples: leave at least one on each side")
    order = torch.randperm(n, generator=Generator().manual_seed(SPLIT_SEED))
    return order[count:].sort().values, order[:count].sort().values


def _part(recipe: Recipe, split: str) -> tuple[str, Tensor | slice]:
    """The dataset's own split that a recipe's split is part of, and which of its samples."""
    check_choice(split, ("train", "held_out", "test"), "split")
    if split == "held_out" and not recipe.held_out:
        raise ValueError("this recipe holds nothing out: give it held_out=0.2, say, or ask for 'test'")
    if split == "test" or not recipe.held_out:
        return split, slice(None)
    return "train", held_out(TRAINING[recipe.dataset], recipe.held_out)[split == "held_out"]


def _images(recipe: Recipe, split: str, device: torch.device | str) -> data.Images:
    """A split of the recipe's images, as uint8."""
    source, chosen = _part(recipe, split)
    whole = data.load(recipe.dataset, source)  # on the CPU, so that the device never holds both
    return replace(whole, x=whole.x[chosen], y=whole.y[chosen]).to(pick_device(device))


def samples(recipe: Recipe, split: str, device: torch.device | str = "cpu") -> Batch:
    """A split as (x, y): images (N, C, H, W) in [0, 1] or points (N, 2), and labels (N,). ``split``: ``train`` without
    what is held out, ``held_out`` or ``test``. ValueError: another split, or nothing is held out."""
    if recipe.dataset != "moons":
        images = _images(recipe, split, device)
        return images.float(), images.y
    source, chosen = _part(recipe, split)
    n, offset = MOONS[source]
    x, y = data.two_moons(n, noise=0.15, seed=recipe.seed + offset)
    return x[chosen].to(device), y[chosen].to(device)


def steps_an_epoch(recipe: Recipe) -> int:
    """Training steps an epoch, the last partial batch left out. Moons: the full batch, 20 times."""
    if recipe.dataset == "moons":
        return MOONS_STEPS
    n = TRAINING[recipe.dataset]
    return max(1, (n - round(recipe.held_out * n)) // recipe.batch_size)


def build(recipe: Recipe) -> nn.Module:
    """The untrained network of a recipe, drawn from its seed (the global generator is left alone)."""
    shape, classes = INPUTS[recipe.dataset]
    kind, lipschitz = METHODS[recipe.method]
    activations: dict[str, Callable[[], nn.Module]] = {
        "hard": lambda: CenteredSoftplus(1000.0, trainable=False),
        "trained": lambda: CenteredSoftplus(recipe.beta),
        "softplus": lambda: nn.Softplus(recipe.softplus),
        "relu": nn.ReLU,
    }
    options: dict[str, Any] = dict(lcnn=lipschitz, gamma=recipe.gamma, activation=activations[kind])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.seed)  # torch.manual_seed would seed the GPU's too
        if recipe.model == "mlp":
            return mlp([math.prod(shape), recipe.width, recipe.width, classes], **options)
        options |= dict(num_classes=classes, width=recipe.width, in_channels=shape[0], image_size=shape[1])
        options |= dict(ordinary=kind == "relu")
        depth = recipe.model.removeprefix("resnet")
        model = vgg11(**options) if recipe.model == "vgg11" else resnet(int(depth), **options)
    return model if recipe.channels_last is False else model.to(memory_format=torch.channels_last)  # type: ignore


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor, batch_size: int = 1024) -> float:
    """Share of x (N, …) that the model, in the mode it is in, gives its label y (N,)."""
    hits = [model(xs).argmax(1) == ys for xs, ys in zip(x.split(batch_size), y.split(batch_size), strict=True)]
    return torch.cat(hits).float().mean().item()


def learning_rate(recipe: Recipe, progress: float) -> float:
    """The rate after a share ``progress`` in [0, 1] of training. ``onecycle``: up to ``recipe.lr`` over the first 30 %,
    then along a cosine to 0 (L. Smith, N. Topin, arXiv:1708.07120). ``steps``: the authors'."""
    if recipe.schedule == "steps":
        return recipe.lr * (1.0 if progress < 0.75 else 0.1 if progress < 0.875 else 0.01)
    if progress < 0.3:
        return recipe.lr * (0.04 + 0.96 * progress / 0.3)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * (progress - 0.3) / 0.7))


def make_optimizer(recipe: Recipe, model: nn.Module) -> tuple[torch.optim.SGD, list[Tensor]]:
    """Nesterov's SGD, no decay on log β and log γ, and its momenta, made at once so that a state can be put back."""
    ours = [p for name, p in model.named_parameters() if name.endswith(("log_beta", "log_gamma"))]
    plain = [p for name, p in model.named_parameters() if not name.endswith(("log_beta", "log_gamma"))]
    groups: list[dict[str, Any]] = [{"params": plain}, {"params": ours, "weight_decay": 0.0}]
    options: dict[str, Any] = dict(weight_decay=recipe.weight_decay, fused=plain[0].device.type in ("cpu", "cuda"))
    optimizer = torch.optim.SGD(groups, recipe.lr, recipe.momentum, nesterov=recipe.momentum > 0, **options)
    for p in (*plain, *ours):
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer, [optimizer.state[p]["momentum_buffer"] for p in (*plain, *ours)]


def autocast(recipe: Recipe, device: torch.device) -> torch.autocast:
    """bfloat16 as the recipe says; by default where a GPU computes in it."""
    able = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=able if recipe.bfloat16 is None else recipe.bfloat16)


def compiles(recipe: Recipe, device: torch.device) -> bool:
    """As the recipe says; by default on a GPU (a CPU's fused kernels are faster than what the compiler makes), a CNN
    without second derivatives, which compiled code doesn't have."""
    second = recipe.method in ONLY["derivative"] and recipe.derivative == "exact"
    default = device.type == "cuda" and recipe.model != "mlp" and not second
    return default if recipe.compile is None else recipe.compile


def training_step(
    recipe: Recipe,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    advance: Callable[[], None],
    now: dict[str, Any],
    names: list[str],
    compiled: bool = False,
) -> Step:
    """A step as a function of a batch: ``advance`` (of ``nn.norms_once_a_step``), loss, gradients, optimiser → the
    terms' values. ``now`` is what the objective is told (``progress``, ``generator``); ``names`` is filled with the
    terms' names. If the compiler fails, the step warns once and goes on without."""
    device = next(model.parameters()).device
    networks: list[Any] = [torch.compile(model, dynamic=False), model] if compiled else [model]

    def attempt(x: Tensor, y: Tensor) -> Tensor:
        advance()
        with autocast(recipe, device):
            loss, terms = OBJECTIVES[recipe.method](networks[0], x, y, recipe, **now)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        names[:] = terms
        return torch.stack([term.float() for term in terms.values()])

    def step(x: Tensor, y: Tensor) -> Tensor:
        try:
            return attempt(x, y)
        except Exception as error:
            if len(networks) == 1 or isinstance(error, torch.OutOfMemoryError):
                raise
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            warnings.warn(f"training goes on without torch.compile: {reason}", RuntimeWarning, stacklevel=2)
            del networks[0]
            return attempt(x, y)

    return step


def made_on(device: torch.device) -> dict[str, Any]:
    """Where a run was trained, for its provenance: device, threads and versions."""
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else f"{platform.machine()} {device.type.upper()}"
    versions = {"lcnn_utils": __version__, "torch": torch.__version__, "python": platform.python_version()}
    return versions | {"device": name, "threads": torch.get_num_threads()}


def _row(recipe: Recipe, model: nn.Module, epoch: int, names: list[str], log: Tensor, probe: Batch) -> dict[str, float]:
    """The history of an epoch whose steps logged ``log`` (steps, terms). RuntimeError: something is not finite."""
    steps = (~log.isfinite().all(1)).nonzero().flatten().tolist()
    what = f"the loss is not finite in epoch {epoch}, step {steps[0] + 1} of {len(log)}," if steps else ""
    if not steps and not all(bool(value.isfinite().all()) for value in model.state_dict().values()):
        what = f"a weight is not finite in epoch {epoch}"
    if what:
        raise RuntimeError(f"{what} of {recipe}: lower lr (now {recipe.lr:g}), or the λ of its penalty")
    row = {"epoch": epoch} | dict(zip(names, log.mean(0).tolist(), strict=True))
    try:
        row["curvature"] = geometry(model, *probe, method="power", max_iter=PRODUCTS).curvature.mean().item()
    except ValueError:  # derivatives overflow while the running statistics are still far off
        row["curvature"] = math.nan
    row["sigma_error"] = sigma_error(model)
    for name, module in model.named_modules():
        if isinstance(module, CenteredSoftplus) and isinstance(module.log_beta, nn.Parameter):
            row[f"beta {name}"] = module.beta.item()
        if isinstance(module, LipschitzBatchNorm2d):
            row[f"gamma {name}"] = module.gamma.item()
    return row


def _train(
    state: State, optimizer: torch.optim.SGD, device: torch.device, progress: bool, save: Callable[[], None]
) -> None:
    """All epochs that are missing from the state; ``save`` is called after each."""
    recipe, model, generator = state.recipe, state.model, state.generator
    if recipe.dataset == "moons":
        x, y = samples(recipe, "train", device)
        batches: Callable[[], Iterable[Batch]] = lambda: [(x, y)] * MOONS_STEPS
        probe = x[:PROBES], y[:PROBES]
    else:
        images = _images(recipe, "train", device)  # bytes: CIFAR's training set as float32 would be 600 MB
        options: dict[str, Any] = dict(augment=recipe.augment, generator=generator, drop_last=True)
        batches = lambda: data.batches(images, recipe.batch_size, **options)
        probe = images.x[:PROBES].float() / 255, images.y[:PROBES]
    now: dict[str, Any] = {"generator": generator}
    names: list[str] = []
    missing = range(len(state.history), recipe.epochs)
    bar = tqdm(missing, f"{recipe.method} seed {recipe.seed}", leave=False, disable=not progress)
    with norms_once_a_step(model) as advance:
        step = training_step(recipe, model, optimizer, advance, now, names, compiles(recipe, device))
        for epoch in bar:
            model.train()
            log: list[Tensor] = []
            for index, (x, y) in enumerate(batches()):
                now["progress"] = (epoch + index / steps_an_epoch(recipe)) / recipe.epochs
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(recipe, now["progress"])
                log.append(step(x, y))
            advance()
            row = _row(recipe, model, epoch + 1, names, torch.stack(log).cpu(), probe)  # waits for the device
            state.history.append(row)
            save()
            bar.set_postfix({name: f"{row[name]:.3g}" for name in (*names, "curvature")})


def fit(
    recipe: Recipe, *, device: Device = None, progress: bool = True, resume: bool = True, watch: Watch = None
) -> tuple[nn.Module, pd.DataFrame]:
    """Train the recipe: (model in eval mode with its norms refreshed, history with one row an epoch).

    After each epoch the whole state is written, so a run that was stopped goes on from there, on the CPU bit for bit,
    and one that is finished is read back; processes that want the same run take turns.
    ``resume=False`` trains again over an older state; ``watch`` is called with the history after each epoch.

    The history's columns: epoch; the objective's terms, means over the epoch's steps; ``curvature``, mean C_f of 16
    training images after 4 Hessian-vector products; ``sigma_error``; β and γ of each layer. ``history.attrs``: the
    ``seconds`` of all sittings together, and where they were ``made_on``. RuntimeError: no such device, a loss that is
    not finite (in which epoch and step), not enough memory, or a damaged state. OSError: it cannot be written.
    """
    device, path = pick_device(device), state_path(recipe)
    with nullcontext() if resume and epochs_done(path) == recipe.epochs else locked(path):
        keep_memory()
        model = build(recipe).to(device)
        optimizer, momenta = make_optimizer(recipe, model)
        state = State(recipe, model, momenta, Generator().manual_seed(recipe.seed))
        if resume and path.exists():
            state.load(path)
        begun, place = time.perf_counter() - state.about["seconds"], made_on(device)

        def save() -> None:
            state.about["seconds"] = round(time.perf_counter() - begun, 3)
            if place not in state.about["made_on"]:
                state.about["made_on"].append(place)
            state.save(path)
            if watch is not None:
                watch(pd.DataFrame(state.history))

        try:
            if len(state.history) < recipe.epochs:
                _train(state, optimizer, device, progress, save)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
                raise RuntimeError(f"not enough memory on {device} for {recipe}: use a smaller batch_size") from None
            raise
        finally:
            if compiles(recipe, device):
                torch._dynamo.reset()  # the number of versions that it keeps of a function is limited
    refresh_norms(model)
    history = pd.DataFrame(state.history)
    history.attrs |= state.about
    return model.eval(), history
