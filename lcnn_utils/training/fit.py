"""Training: a recipe's network, one step, and the loop for any network, which goes on where it was stopped."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import MethodType
from typing import Any

import pandas as pd
import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .. import __version__
from ..curvature import geometry
from ..lab import check_choice, keep_memory, pick_device, track
from ..nn import (
    CenteredSoftplus,
    LipschitzBatchNorm2d,
    mlp,
    norms_once_a_step,
    refresh_norms,
    refresh_statistics,
    resnet,
    vgg11,
)
from ..nn.softplus import wide
from .batches import Batch, Device, Feed, Samples, check_validation, own_feed, read_batches, recipe_feed
from .checkpoint import State, epochs_done, locked, state_path
from .objectives import OBJECTIVES
from .recipe import INPUTS, METHODS, ONLY, Recipe, Training

SETTLE = 512  # training images on which BatchNorm's statistics are taken again in the end
PRODUCTS = 4  # Hessian-vector products of the history's curvature
Watch = Callable[[pd.DataFrame, nn.Module], None] | None  # history, model


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


def learning_rate(recipe: Training, progress: float) -> float:
    """The rate after a share ``progress`` in [0, 1] of training. ``onecycle``: up to ``recipe.lr`` over the first 30 %,
    then along a cosine to 0 (L. Smith, N. Topin, arXiv:1708.07120). ``steps``: the authors'."""
    if recipe.schedule == "steps":
        return recipe.lr * (1.0 if progress < 0.75 else 0.1 if progress < 0.875 else 0.01)
    if progress < 0.3:
        return recipe.lr * (0.04 + 0.96 * progress / 0.3)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * (progress - 0.3) / 0.7))


def make_optimizer(recipe: Training, model: nn.Module) -> tuple[torch.optim.SGD, list[Tensor]]:
    """Nesterov's SGD, no decay on log β and log γ, and its momenta, made at once so that a state can be put back."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    ours = [p for name, p in trained if name.endswith(("log_beta", "log_gamma"))]
    plain = [p for name, p in trained if not name.endswith(("log_beta", "log_gamma"))]
    groups: list[dict[str, Any]] = [{"params": plain}, {"params": ours, "weight_decay": 0.0}]
    options: dict[str, Any] = dict(weight_decay=recipe.weight_decay, fused=trained[0][1].device.type in ("cpu", "cuda"))
    optimizer = torch.optim.SGD(groups, recipe.lr, recipe.momentum, nesterov=recipe.momentum > 0, **options)
    for p in (*plain, *ours):
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer, [optimizer.state[p]["momentum_buffer"] for p in (*plain, *ours)]


def in_bfloat16(recipe: Training, device: torch.device) -> bool:
    """Whether a training computes in bfloat16: on an NVIDIA GPU that does so unless the recipe says no, elsewhere where
    it says yes, but on no CPU that would emulate it."""
    able = True
    if device.type == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        able = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return able and (device.type == "cuda" if recipe.bfloat16 is None else recipe.bfloat16)


def _precise(self: nn.Module, x: Tensor) -> Tensor:
    kind, plain = x.device.type, type(self).forward
    if not torch.is_autocast_enabled(kind):
        return plain(self, x)
    with torch.autocast(kind, enabled=False):
        return plain(self, wide(x)).to(torch.get_autocast_dtype(kind))


@contextmanager
def precise_input(model: nn.Module) -> Iterator[None]:
    """Let the first convolution or linear layer compute in float32 within autocast. In bfloat16 a pixel near 1 moves by
    4e-3 or not at all, and penalties by differences move an image by a tenth of that."""
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)), nn.Identity())
    first.forward = MethodType(_precise, first)  # type: ignore[method-assign]  # a method: a copy's is the copy's
    try:
        yield
    finally:
        del first.forward


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


def compiles(recipe: Training, device: torch.device) -> bool:
    """As the recipe says. By default on a GPU (a CPU's fused kernels are faster than what the compiler makes), a CNN of
    ours without second derivatives, which compiled code doesn't have."""
    if recipe.compile is not None:
        return recipe.compile
    if device.type != "cuda" or not isinstance(recipe, Recipe) or recipe.model == "mlp":
        return False
    if recipe.derivative == "exact" and recipe.method in ONLY["derivative"]:
        return False
    return has_compiler(device)


def training_step(
    recipe: Training, model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, **told: Any
) -> dict[str, Tensor]:
    """Loss of a batch, gradients, optimiser → the objective's terms. ``told``: what else the objective is told
    (``progress``, ``generator``). Within ``nn.norms_once_a_step``, call its function before each step; in
    bfloat16, within :func:`precise_input`."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=in_bfloat16(recipe, x.device)):
        loss, terms = OBJECTIVES[recipe.method](model, x, y, **recipe.objective(), **told)
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
    row = {}
    if len(probe[0]):
        try:
            row["curvature"] = geometry(model, *probe, method="power", max_iter=PRODUCTS).curvature.mean().item()
        except ValueError:  # derivatives overflow while the running statistics are still far off
            row["curvature"] = math.nan
    for name, module in model.named_modules():
        if isinstance(module, CenteredSoftplus) and isinstance(module.log_beta, nn.Parameter):
            row[f"beta {name}"] = module.beta.item()
        if isinstance(module, LipschitzBatchNorm2d):
            row[f"gamma {name}"] = module.gamma.item()
    return row


def _validated(model: nn.Module, val: Samples | None, classes: int, device: torch.device) -> dict[str, float]:
    """What the history says of the samples held out."""
    if val is None:
        return {}
    parts = [(accuracy(model, x, y), len(y)) for x, y in read_batches(val, classes, device)]
    return {"val_accuracy": sum(part * n for part, n in parts) / sum(n for _, n in parts)}


def _frozen(model: nn.Module) -> list[nn.Module]:
    """The norms of which no weight is trained: their statistics stay as well."""
    norms = [module for module in model.modules() if isinstance(module, _NormBase)]
    return [norm for norm in norms if (own := [*norm.parameters()]) and not any(p.requires_grad for p in own)]


def _train_mode(model: nn.Module) -> None:
    model.train()
    for norm in _frozen(model):
        norm.eval()


def _settle(model: nn.Module, feed: Feed, recipe: Training) -> None:
    """Take BatchNorm's statistics again, which lag behind a short training, and leave the model in eval mode."""
    batches = feed.batches(Generator().manual_seed(recipe.seed))
    enough = itertools.islice(batches, math.ceil(SETTLE / recipe.batch_size))
    refresh_statistics(model.eval(), (x for x, _ in enough), but=_frozen(model))


def _logs(model: nn.Module) -> dict[str, list[Tensor]]:
    """log β and log γ of all layers."""
    logs: dict[str, list[Tensor]] = {"max_beta": [], "max_gamma": []}
    for module in model.modules():
        if isinstance(module, CenteredSoftplus):
            logs["max_beta"].append(module.log_beta.detach())
        if isinstance(module, LipschitzBatchNorm2d):
            logs["max_gamma"].append(module.log_gamma.detach())
    return logs


def _lower_ceilings(recipe: Training, model: nn.Module, starts: dict[str, float], progress: float) -> None:
    """Cut every β to a ceiling that falls from its start to ``max_beta`` in the first half of training; γ likewise."""
    if recipe.max_beta is recipe.max_gamma is None:
        return
    for name, logs in _logs(model).items():
        if (end := getattr(recipe, name)) is not None and logs:
            ceiling = starts[name] + (math.log(end) - starts[name]) * min(2 * progress, 1.0)
            for log in logs:
                log.clamp_(max=ceiling)


def _train(
    state: State, path: Path | None, optimizer: torch.optim.SGD, feed: Feed, val: Samples | None, progress: bool,
    watch: Watch,
) -> None:  # fmt: skip
    """All epochs that are missing from the state, which is written to ``path`` after each, if that is quick."""
    device, own, starts = feed.probe[0].device, state.samples is not None, state.about["ceilings"]
    begun, saving = time.perf_counter() - state.about["seconds"], 0.0
    place = made_on(device) | {"precision": "bfloat16" if in_bfloat16(state.recipe, device) else "float32"}
    if place not in state.about["made_on"]:
        state.about["made_on"].append(place)
    recipe, model, generator = state.recipe, state.model, state.generator
    network: Any = torch.compile(model, dynamic=False) if compiles(recipe, device) else model
    missing = range(len(state.history), recipe.epochs)
    bar = track(missing, f"{recipe.method} seed {recipe.seed}", progress=progress)
    with norms_once_a_step(model) as advance, precise_input(model):
        for epoch in bar:
            _train_mode(model)
            log: list[Tensor] = []
            for index, (x, y) in enumerate(feed.batches(generator)):
                done = (epoch + index / feed.steps) / recipe.epochs
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(recipe, done)
                _lower_ceilings(recipe, model, starts, done)
                advance()
                terms = training_step(recipe, network, optimizer, x, y, progress=done, generator=generator)
                log.append(torch.stack([term.float() for term in terms.values()]))
            _lower_ceilings(recipe, model, starts, (epoch + 1) / recipe.epochs)
            advance()
            values = torch.stack(log).cpu()  # waits for the device
            if not all(bool(value.isfinite().all()) for value in (values, *model.state_dict().values())):
                what = f"the loss or a weight is not finite in epoch {epoch + 1} of {recipe}"
                raise RuntimeError(f"{what}: lower lr (now {recipe.lr:g}), or the λ of its penalty")
            means = dict(zip(terms, values.mean(0).tolist(), strict=True))
            if own and epoch + 1 == recipe.epochs:
                refresh_norms(model)
                advance()
            if own and (val is not None or len(feed.probe[0]) or epoch + 1 == recipe.epochs):
                _settle(model, feed, recipe)
            means |= _validated(model, val, feed.classes, device)
            state.history.append({"epoch": epoch + 1} | means | _measured(model, feed.probe))
            state.about["seconds"] = round(time.perf_counter() - begun, 3)
            state.random = torch.get_rng_state()
            due = epoch + 1 == recipe.epochs or saving < 5 + 0.1 * state.about["seconds"]
            if path is not None and due:
                saving -= time.perf_counter()
                state.save(path)
                saving += time.perf_counter()
            try:
                if watch is not None:
                    watch(pd.DataFrame(state.history), model)
            except BaseException:
                if path is not None and not due:
                    state.save(path)
                raise
            shown = {name: value for name, value in state.history[-1].items() if name in (*means, "curvature")}
            bar.set_postfix({name: f"{value:.3g}" for name, value in shown.items()})


def _run(
    recipe: Training, model: nn.Module, feed: Callable[[], Feed], path: Path | None, device: torch.device,
    val: Samples | None, progress: bool, resume: bool, watch: Watch, samples: str | None = None,
) -> tuple[nn.Module, pd.DataFrame]:  # fmt: skip
    """Train ``model``, or read it back from ``path``: what both ``fit`` and ``fit_recipe`` do."""
    keep_memory()
    model.to(device)
    optimizer, momenta = make_optimizer(recipe, model)
    generators = [Generator().manual_seed(recipe.seed) for _ in range(2)]
    state = State(recipe, model, momenta, generators[0], generators[1].get_state(), samples)
    starts = {name: max(log.item() for log in logs) for name, logs in _logs(model).items() if logs}
    if resume and path is not None and path.exists():
        state.load(path)
    state.about.setdefault("ceilings", starts)
    if len(state.history) < recipe.epochs:
        try:
            with torch.random.fork_rng(devices=[]):  # dropout draws from the global generator
                torch.set_rng_state(state.random)
                _train(state, path, optimizer, feed(), val, progress, watch)
        finally:
            if compiles(recipe, device):
                torch._dynamo.reset()  # the number of versions that it keeps of a function is limited
    if samples is None:  # own nets are refreshed before their last row of the history
        refresh_norms(model)
    model.zero_grad()
    history = pd.DataFrame(state.history)
    history.attrs |= state.about
    return model.eval(), history


def fit(
    model: nn.Module,
    train: Samples,
    val: Samples | None = None,
    *,
    training: Training | None = None,
    state: str | Path | None = None,
    device: Device = None,
    progress: bool = True,
    resume: bool = True,
    workers: int = 0,
    curvature: bool = True,
    watch: Watch = None,
    **settings: Any,
) -> tuple[nn.Module, pd.DataFrame]:
    """Train any network on any data, in place → (it in eval mode, history with a row an epoch).

    After each epoch BatchNorm's statistics are taken again from about 500 training images, without which they would lag
    behind a short training; those of a norm whose weights are frozen stay. At the end spectral norms are refreshed.

    Args:
        model: gives logits (N, K). For ``lcnn``, ``lcnn_gradreg`` and ``minimal`` with layers of ``nn``, as
            ``nn.to_low_curvature`` makes them. What lies outside [0, 1] it normalises itself: begin it with
            ``torchvision.transforms.Normalize``.
        train: images (N, C, H, W) in [0, 1] or points (N, d), with labels (N,) in 0..K−1: a pair of tensors, Images,
            or a torch Dataset, which ``workers`` processes read. The last, smaller batch of an epoch is left out.
        val: samples held out, of the same kinds, for the history's ``val_accuracy``.
        training, settings: fields of :class:`Training`: ``method="lcnn"``, ``epochs``, ``batch_size``, ``lr``,
            ``lambda_beta``, …
        state: a file (safetensors) that is written after each epoch, less often where that would take a tenth of the
            time: what was stopped goes on from there, on the CPU bit for bit, and what is finished is read back;
            ``resume=False`` trains again over it.
        curvature: whether the history has C, the mean over one training image for 250, 16 at most, after 4
            Hessian-vector products; this takes about as long as a few steps.
        watch: called with history and model after each epoch.

    The history's columns: epoch; the objective's terms, means over the epoch's steps; ``val_accuracy``;
    ``curvature``; β and γ of each layer. ``history.attrs``: the ``seconds`` of all sittings together, and where they
    were ``made_on``.

    Raises ValueError before training: unknown settings, images that are not float in [0, 1], labels out of range or all
    the same, a model that can't be trained on them or has nothing that the method trains, a state of another training.
    (Of a Dataset the first batches are looked at before, all others as they come.) RuntimeError: no such device, a loss
    or a weight is not finite, not enough memory, a damaged state. OSError: it cannot be written.
    """
    known = tuple(field.name for field in dataclasses.fields(training or Training))
    for name in settings:
        check_choice(name, known, "setting of a training")
    training = dataclasses.replace(training or Training(), **settings)
    device, path = pick_device(device), None if state is None else Path(state).expanduser()
    model.to(device)
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(training.seed)  # transforms may draw from it
        feed = own_feed(model, train, training, device, workers, watched=curvature)
        if val is not None:
            check_validation(model, val, train, feed.classes, device)
        with nullcontext() if path is None else locked(path):
            return _run(training, model, lambda: feed, path, device, val, progress, resume, watch, feed.samples)


def fit_recipe(
    recipe: Recipe, *, device: Device = None, progress: bool = True, resume: bool = True, watch: Watch = None
) -> tuple[nn.Module, pd.DataFrame]:
    """Train the network of a recipe on its dataset: what it returns, ``watch`` and the errors as of :func:`fit`.

    Its state lies in the store, under a name made of the recipe. A run that is finished is read back; processes that
    want the same run take turns. ``resume=False`` trains again over an older state. The history's ``curvature`` is the
    mean over 16 training images.
    """
    device, path = pick_device(device), state_path(recipe)
    feed = lambda: recipe_feed(recipe, device)
    with nullcontext() if resume and epochs_done(path) == recipe.epochs else locked(path):
        return _run(recipe, build(recipe), feed, path, device, None, progress, resume, watch)
