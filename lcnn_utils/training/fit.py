"""Training: a recipe's samples and network, one step, and the loop, which goes on where it was stopped."""

from __future__ import annotations

import functools
import math
import platform
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
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
MOONS_TEST = 1000, 1_000_000  # points to test on, and what is added to the seed for them
MOONS_STEPS = 20  # an epoch, each on all points
SPLIT_SEED = 20_221_128  # of the one permutation that says what is held out
PROBES, PRODUCTS = 16, 4  # training images of the history's curvature, and its Hessian-vector products
Batch = tuple[Tensor, Tensor]
Device = str | torch.device | None
Watch = Callable[[pd.DataFrame, nn.Module], None] | None  # history, model


def validation_split(n: int, fraction: float) -> tuple[Tensor, Tensor]:
    """Ascending indices of those of n samples to train on, and of those held out: the same for all methods and seeds; a
    larger fraction holds out the same and more. ValueError: one of the two parts would be empty."""
    count = round(fraction * n)
    if fraction and not 0 < count < n:
        what = f"validation_fraction={fraction:g} holds out {count} of {n} samples"
        raise ValueError(f"{what}: leave at least one on each side")
    order = torch.randperm(n, generator=Generator().manual_seed(SPLIT_SEED))
    return order[count:].sort().values, order[:count].sort().values


def _split(recipe: Recipe, split: str, device: Device) -> Batch:
    """:func:`samples`, but images as bytes: CIFAR's training set as float32 would be 600 MB."""
    check_choice(split, ("train", "validation", "test"), "split")
    if split == "validation" and not recipe.validation_fraction:
        raise ValueError("this recipe holds nothing out: give it validation_fraction=0.2, say, or ask for 'test'")
    source = "test" if split == "test" else "train"
    if recipe.dataset == "moons":
        points, offset = MOONS_TEST if source == "test" else (TRAINING["moons"], 0)
        x, y = data.two_moons(points, noise=0.15, seed=recipe.seed + offset)
    else:
        images = data.load(recipe.dataset, source)  # on the CPU, so that the device never holds what isn't chosen
        x, y = images.x, images.y
    if source == "train" and recipe.validation_fraction:
        kept, out = validation_split(len(y), recipe.validation_fraction)
        chosen = out if split == "validation" else kept
        x, y = x[chosen], y[chosen]
    device = pick_device(device)
    return x.to(device), y.to(device)


def _floats(x: Tensor) -> Tensor:
    """Bytes of images as numbers in [0, 1]; points as they are."""
    return x.float() / 255 if x.dtype == torch.uint8 else x


def samples(recipe: Recipe, split: str, device: torch.device | str = "cpu") -> Batch:
    """A split as (x, y): images (N, C, H, W) in [0, 1] or points (N, 2), and labels (N,). ``split``: ``train`` without
    what is held out, ``validation`` or ``test``. ValueError: another split, or nothing is held out."""
    x, y = _split(recipe, split, device)
    return _floats(x), y


def steps_an_epoch(recipe: Recipe) -> int:
    """Training steps an epoch, the last partial batch left out. Moons: the full batch, 20 times."""
    if recipe.dataset == "moons":
        return MOONS_STEPS
    n = TRAINING[recipe.dataset]
    return max(1, (n - round(recipe.validation_fraction * n)) // recipe.batch_size)


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
    return model.to(memory_format=torch.channels_last)  # type: ignore  # up to 1.2 times as fast, on CPUs too


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


@functools.cache
def has_compiler(device: torch.device) -> bool:
    """Whether torch.compile works on this device, which takes more than torch; if not, a warning says why."""
    try:
        torch.compile(lambda x: 2 * x)(torch.ones(8, device=device))
    except Exception as error:  # whatever is missing
        reason = " ".join(str(error).split())[:200]  # the first of its lines may say nothing
        warnings.warn(f"training goes on without torch.compile: {reason}", RuntimeWarning, stacklevel=2)
        return False
    return True


def compiles(recipe: Recipe, device: torch.device) -> bool:
    """As the recipe says. By default on a GPU (a CPU's fused kernels are faster than what the compiler makes), a CNN
    without second derivatives, which compiled code doesn't have."""
    if recipe.compile is not None:
        return recipe.compile
    if device.type != "cuda" or recipe.model == "mlp":
        return False
    if recipe.derivative == "exact" and recipe.method in ONLY["derivative"]:
        return False
    return has_compiler(device)


def training_step(
    recipe: Recipe, model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, **told: Any
) -> dict[str, Tensor]:
    """Loss of a batch, gradients, optimiser → the objective's terms. ``told``: what else the objective is told
    (``progress``, ``generator``). Within ``nn.norms_once_a_step``, call its function before each step."""
    with autocast(recipe, x.device):
        loss, terms = OBJECTIVES[recipe.method](model, x, y, recipe, **told)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return terms


def made_on(device: torch.device) -> dict[str, Any]:
    """Where a run was trained, for its provenance: device, threads and versions."""
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else f"{platform.machine()} {device.type.upper()}"
    versions = {"lcnn_utils": __version__, "torch": torch.__version__, "python": platform.python_version()}
    return versions | {"device": name, "threads": torch.get_num_threads()}


def _measured(model: nn.Module, probe: Batch) -> dict[str, float]:
    """What the history says of the model after an epoch."""
    try:
        curvature = geometry(model, *probe, method="power", max_iter=PRODUCTS).curvature.mean().item()
    except ValueError:  # derivatives overflow while the running statistics are still far off
        curvature = math.nan
    row = {"curvature": curvature, "sigma_error": sigma_error(model)}
    for name, module in model.named_modules():
        if isinstance(module, CenteredSoftplus) and isinstance(module.log_beta, nn.Parameter):
            row[f"beta {name}"] = module.beta.item()
        if isinstance(module, LipschitzBatchNorm2d):
            row[f"gamma {name}"] = module.gamma.item()
    return row


def _batches(recipe: Recipe, x: Tensor, y: Tensor, generator: Generator) -> Iterable[Batch]:
    """An epoch's batches."""
    if recipe.dataset == "moons":
        return [(x, y)] * MOONS_STEPS
    images = data.Images(x, y, (), recipe.dataset)
    return data.batches(images, recipe.batch_size, augment=recipe.augment, generator=generator, drop_last=True)


def _train(
    state: State, path: Path, optimizer: torch.optim.SGD, device: torch.device, progress: bool, watch: Watch
) -> None:
    """All epochs that are missing from the state, which is written to ``path`` after each."""
    begun = time.perf_counter() - state.about["seconds"]
    if (place := made_on(device)) not in state.about["made_on"]:
        state.about["made_on"].append(place)
    recipe, model, generator = state.recipe, state.model, state.generator
    x_train, y_train = _split(recipe, "train", device)
    probe = _floats(x_train[:PROBES]), y_train[:PROBES]
    network: Any = torch.compile(model, dynamic=False) if compiles(recipe, device) else model
    missing = range(len(state.history), recipe.epochs)
    bar = tqdm(missing, f"{recipe.method} seed {recipe.seed}", leave=False, disable=not progress)
    with norms_once_a_step(model) as advance:
        for epoch in bar:
            model.train()
            log: list[Tensor] = []
            for index, (x, y) in enumerate(_batches(recipe, x_train, y_train, generator)):
                done = (epoch + index / steps_an_epoch(recipe)) / recipe.epochs
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(recipe, done)
                advance()
                terms = training_step(recipe, network, optimizer, x, y, progress=done, generator=generator)
                log.append(torch.stack([term.float() for term in terms.values()]))
            advance()
            values = torch.stack(log).cpu()  # waits for the device
            if not all(bool(value.isfinite().all()) for value in (values, *model.state_dict().values())):
                what = f"the loss or a weight is not finite in epoch {epoch + 1} of {recipe}"
                raise RuntimeError(f"{what}: lower lr (now {recipe.lr:g}), or the λ of its penalty")
            means = dict(zip(terms, values.mean(0).tolist(), strict=True))
            state.history.append({"epoch": epoch + 1} | means | _measured(model, probe))
            state.about["seconds"] = round(time.perf_counter() - begun, 3)
            state.save(path)
            if watch is not None:
                watch(pd.DataFrame(state.history), model)
            bar.set_postfix({name: f"{state.history[-1][name]:.3g}" for name in (*means, "curvature")})


def fit(
    recipe: Recipe, *, device: Device = None, progress: bool = True, resume: bool = True, watch: Watch = None
) -> tuple[nn.Module, pd.DataFrame]:
    """Train the recipe: (model in eval mode with its norms refreshed, history with one row an epoch).

    After each epoch the whole state is written, so a run that was stopped goes on from there, on the CPU bit for bit,
    and one that is finished is read back; processes that want the same run take turns.
    ``resume=False`` trains again over an older state; ``watch`` is called with history and model after each epoch.

    The history's columns: epoch; the objective's terms, means over the epoch's steps; ``curvature``, mean C_f of 16
    training images after 4 Hessian-vector products; ``sigma_error``; β and γ of each layer. ``history.attrs``: the
    ``seconds`` of all sittings together, and where they were ``made_on``. RuntimeError: no such device, a loss or a
    weight is not finite, not enough memory, or a damaged state. OSError: it cannot be written.
    """
    device, path = pick_device(device), state_path(recipe)
    with nullcontext() if resume and epochs_done(path) == recipe.epochs else locked(path):
        keep_memory()
        model = build(recipe).to(device)
        optimizer, momenta = make_optimizer(recipe, model)
        state = State(recipe, model, momenta, Generator().manual_seed(recipe.seed))
        if resume and path.exists():
            state.load(path)
        if len(state.history) < recipe.epochs:
            try:
                _train(state, path, optimizer, device, progress, watch)
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
                    why = f"not enough memory on {device} for {recipe}: use a smaller batch_size"
                    raise RuntimeError(why) from None
                raise
            finally:
                if compiles(recipe, device):
                    torch._dynamo.reset()  # the number of versions that it keeps of a function is limited
    refresh_norms(model)
    history = pd.DataFrame(state.history)
    history.attrs |= state.about
    return model.eval(), history
