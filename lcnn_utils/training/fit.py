"""Training: one loop for every method, one state file a recipe, so that a stopped run goes on where it was."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pandas as pd
import torch
from torch import Generator, Tensor, nn
from tqdm import tqdm

from .. import __version__
from .. import nn as models
from ..curvature import geometry
from ..lab import keep_memory, pick_device
from ..nn import CenteredSoftplus, LipschitzBatchNorm2d, norms_once_a_step, refresh_norms, sigma_error
from .checkpoint import finished, load_state, locked, save_state, state_path
from .objectives import OBJECTIVES
from .recipe import INPUTS, METHODS, Recipe
from .speed import Step, as_written, autocast, compiled, fast_step, memory, worth_compiling
from .splits import Batch, epochs, samples

__all__ = ["accuracy", "build", "fit", "learning_rate", "made_on", "samples", "state_path"]
PRODUCTS = 4  # Hessian-vector products of the history's curvature


def build(recipe: Recipe) -> nn.Module:
    """The untrained network of a recipe, drawn from its seed (the global generator is left alone).

    Its weights lie in memory channels last, with which convolutions are faster on CPUs and GPUs.
    """
    shape, classes = INPUTS[recipe.dataset]
    kind, low = METHODS[recipe.method]
    options: dict[str, Any] = dict(lcnn=low, gamma=recipe.gamma, activation={
        "hard": lambda: CenteredSoftplus(1000.0, trainable=False),
        "trained": lambda: CenteredSoftplus(recipe.beta),
        "softplus": lambda: nn.Softplus(recipe.softplus),
        "relu": nn.ReLU,
    }[kind])  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.seed)  # torch.manual_seed would seed the GPU's too
        if recipe.model == "mlp":
            return models.mlp([math.prod(shape), recipe.width, recipe.width, classes], **options)
        options |= dict(num_classes=classes, width=recipe.width, in_channels=shape[0], image_size=shape[1])
        options |= dict(ordinary=kind == "relu")
        if recipe.model == "vgg11":
            model = models.vgg11(**options)
        else:
            model = models.resnet(int(recipe.model.removeprefix("resnet")), **options)
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def made_on(device: torch.device) -> dict[str, Any]:
    """Where a run was trained, for its provenance: device, threads and versions."""
    cpu = f"{platform.machine()} {device.type.upper()}"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    versions = {"lcnn_utils": __version__, "torch": torch.__version__, "python": platform.python_version()}
    return versions | {"device": name, "threads": torch.get_num_threads()}


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor, batch_size: int = 1024) -> float:
    """Share of x (N, …) that the model, in the mode it is in, gives its label y (N,)."""
    hits = [model(xs).argmax(1) == ys for xs, ys in zip(x.split(batch_size), y.split(batch_size), strict=True)]
    return torch.cat(hits).float().mean().item()


def learning_rate(recipe: Recipe, progress: float) -> float:
    """The rate after a share ``progress`` in [0, 1] of training.

    ``onecycle``: up to ``recipe.lr`` over the first 30 %, then along a cosine to 0 (L. Smith, N. Topin,
    arXiv:1708.07120). ``steps``: a tenth from 75 % on, a hundredth from 87.5 % on (the authors').
    """
    if recipe.schedule == "steps":
        return recipe.lr * (1.0 if progress < 0.75 else 0.1 if progress < 0.875 else 0.01)
    if progress < 0.3:
        return recipe.lr * (0.04 + 0.96 * progress / 0.3)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * (progress - 0.3) / 0.7))


def layer_values(model: nn.Module) -> dict[str, float]:
    """Every trained β and γ of a net, under ``beta LAYER`` and ``gamma LAYER``."""
    values: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, CenteredSoftplus) and isinstance(module.log_beta, nn.Parameter):
            values[f"beta {name}"] = module.beta
        if isinstance(module, LipschitzBatchNorm2d):
            values[f"gamma {name}"] = module.gamma
    return dict(zip(values, torch.stack([*values.values()]).tolist(), strict=True)) if values else {}


def make_optimizer(recipe: Recipe, model: nn.Module) -> tuple[torch.optim.SGD, list[Tensor]]:
    """Nesterov's SGD, no decay on log β and log γ, and its momenta, made at once so that a state can be put back."""
    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"
    ours = {name: p for name, p in model.named_parameters() if name.endswith(("log_beta", "log_gamma"))}
    plain = [p for name, p in model.named_parameters() if name not in ours]
    groups: list[dict[str, Any]] = [{"params": plain}, {"params": [*ours.values()], "weight_decay": 0.0}]
    for group in groups:  # a tensor of its own, which a recorded step reads anew each time
        group["lr"] = torch.tensor(recipe.lr, device=device) if on_gpu else recipe.lr
    optimizer = torch.optim.SGD(
        [group for group in groups if group["params"]], fused=device.type in ("cpu", "cuda"),
        momentum=recipe.momentum, weight_decay=recipe.weight_decay, nesterov=recipe.momentum > 0,
    )  # fmt: skip
    parameters = [*plain, *ours.values()]
    for p in parameters:
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer, [optimizer.state[p]["momentum_buffer"] for p in parameters]


def _row(recipe: Recipe, model: nn.Module, epoch: int, names: list[str], log: Tensor, probe: Batch) -> dict[str, float]:
    """The history of an epoch whose steps logged ``log`` (steps, terms). RuntimeError: something is not finite."""
    bad = (~log.isfinite().all(1)).nonzero().flatten().tolist()
    broken = not all(bool(value.isfinite().all()) for value in model.state_dict().values())
    if bad or broken:
        what = f"the loss is not finite in epoch {epoch}, step {bad[0] + 1} of {len(log)}," if bad else (
            f"a weight is not finite in epoch {epoch}")  # fmt: skip
        raise RuntimeError(f"{what} of {recipe}: lower lr (now {recipe.lr:g}), or the λ of its penalty")
    try:
        with as_written(model):
            curvature = geometry(model, *probe, method="power", max_iter=PRODUCTS).curvature.mean().item()
    except ValueError:  # derivatives overflow while the running statistics are still far off
        curvature = math.nan
    return (
        {"epoch": epoch}
        | dict(zip(names, log.mean(0).tolist(), strict=True))
        | {"curvature": curvature, "sigma_error": sigma_error(model)}
        | layer_values(model)
    )


def training_step(
    recipe: Recipe,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    advance: Callable[[], None],
    now: dict[str, Any],
    names: list[str],
) -> Step:
    """The whole of a step as a function of a batch: power iterations, loss, gradients, optimiser → the terms' values.

    Args:
        advance: of :func:`spectral.norms_once_a_step`.
        now: what the objective is told each time (``progress``, ``generator``).
        names: is filled with the names of the terms.
    """
    device = next(model.parameters()).device

    def step(x: Tensor, y: Tensor) -> Tensor:
        advance()
        with autocast(device):
            loss, terms = OBJECTIVES[recipe.method](model, x, y, recipe, **now)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        names[:] = terms
        return torch.stack([term.float() for term in terms.values()])

    return step


def _train(recipe, model, optimizer, generator, history, device, advance, save, bar) -> None:
    """All epochs that are missing from ``history``; ``save`` is called after each."""
    make, steps, probe = epochs(recipe, device, generator)
    now: dict[str, Any] = {"generator": generator}
    names: list[str] = []
    step = training_step(recipe, model, optimizer, advance, now, names)
    run: Step | None = step if device.type != "cuda" and model._compiled_call_impl is None else None
    for epoch in bar:
        model.train()
        log: list[Tensor] = []
        for index, (x, y) in enumerate(make()):
            now["progress"] = (epoch + index / steps) / recipe.epochs
            rate = learning_rate(recipe, now["progress"])
            for group in optimizer.param_groups:
                group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], Tensor) else rate
            if run is None:
                run = fast_step(step, x, y, model, optimizer, recipe, generator)
            log.append(run(x, y))
        advance()
        row = _row(recipe, model, epoch + 1, names, torch.stack(log).cpu(), probe)  # the only wait for the device
        history.append(row)
        save()
        bar.set_postfix({name: f"{row[name]:.3g}" for name in (*names, "curvature")})


def fit(
    recipe: Recipe,
    *,
    device: str | torch.device | None = None,
    progress: bool = True,
    resume: bool = True,
    watch: Callable[[pd.DataFrame], None] | None = None,
) -> tuple[nn.Module, pd.DataFrame]:
    """Train the recipe: (model in eval mode with its norms refreshed, history with one row an epoch).

    After each epoch the whole state is written (``state_path``), so a run that was stopped goes on from its last
    epoch, on the CPU bit for bit as if it had not been, and one that is finished is read back at once. Two processes
    that want the same run take turns. How a step runs on a GPU is in ``speed``.

    Args:
        recipe: what to train.
        device: default as in ``runtime.pick_device``.
        progress: show a bar with epochs, time left, loss, training accuracy, penalties and curvature.
        resume: False trains anew over an older state.
        watch: called with the history after each epoch, for live curves.

    Returns:
        The history's columns: epoch; the objective's terms, means over the epoch's steps; ``curvature``, mean C_f of 16
        training images after 4 Hessian-vector products; ``sigma_error``, as in :func:`lipschitz.sigma_error`; β and γ
        of each layer. ``history.attrs["seconds"]`` is what training took, all its sittings together, and
        ``["made_on"]`` where: devices, threads and versions.

    Raises:
        RuntimeError: the device is absent, the loss is not finite (with the epoch and the step), there is not enough
            memory (with the batch size that fits), or the saved state is damaged.
        OSError: the state cannot be written.
    """
    device, path = pick_device(device), state_path(recipe)
    with nullcontext() if resume and finished(path, recipe.epochs) else locked(path, progress):
        keep_memory()
        model = build(recipe).to(device)
        optimizer, momenta = make_optimizer(recipe, model)
        generator = Generator().manual_seed(recipe.seed)
        history: list[dict] = []
        about: dict[str, Any] = {"seconds": 0.0, "made_on": []}
        if resume and path.exists():
            history, about = load_state(path, recipe, model, momenta, generator)
        begun, here = time.perf_counter() - about["seconds"], made_on(device)

        def save() -> None:
            about["seconds"] = round(time.perf_counter() - begun, 3)
            if here not in about["made_on"]:
                about["made_on"].append(here)
            save_state(path, recipe, model, momenta, generator, history, about)
            if watch is not None:
                watch(pd.DataFrame(history))

        if len(history) < recipe.epochs:
            missing = range(len(history), recipe.epochs)
            bar = tqdm(missing, f"{recipe.method} seed {recipe.seed}", leave=False, disable=not progress)
            with (
                norms_once_a_step(model) as advance,
                compiled(model, worth_compiling(recipe, device)),
                memory(recipe, model, device),
            ):
                _train(recipe, model, optimizer, generator, history, device, advance, save, bar)
    refresh_norms(model)
    frame = pd.DataFrame(history)
    frame.attrs |= about
    return model.eval(), frame
