"""What a training step costs, and the two forms of a penalty on the gradient."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from statistics import median

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from ..figures.style import METHOD
from ..nn import norms_once_a_step
from ..training import METHODS, Recipe, build, make_optimizer, objectives, recipe, samples, training_step


def two_forms(steps: Iterable[float], images: int = 32) -> pd.DataFrame:
    """GradReg's penalty of an untrained LCNN in float64, exact and as a difference.

    Columns: step (of the difference), exact, difference, gradient_error (relative, over all weights).
    """
    one = recipe("digits", "lcnn_gradreg", lambda_grad=1.0)
    net = build(one).double().train()
    x, y = (part[:images] for part in samples(one, "train"))
    weights, rows = [p for name, p in net.named_parameters() if "log_" not in name], []
    with norms_once_a_step(net) as advance:
        advance()
        for step in steps:
            found = {}
            for form in ("exact", "difference"):
                at = x.double().requires_grad_()
                loss = F.cross_entropy(net(at), y)
                _, squared = objectives.squared_gradient(net, at, y, loss, replace(one, derivative=form), step=step)
                slopes = torch.autograd.grad(squared, weights)
                found[form] = squared.item(), torch.cat([slope.flatten() for slope in slopes])
            (value, slope), (other, tilted) = found["exact"], found["difference"]
            rows.append((step, value, other, ((tilted - slope).norm() / slope.norm()).item()))
    return pd.DataFrame(rows, columns=["step", "exact", "difference", "gradient_error"])


def stepper(recipe: Recipe, x: Tensor, y: Tensor) -> tuple[Callable[[], Tensor], Callable[[], None]]:
    """A training step of a recipe on one batch, as ``fit`` takes it but uncompiled, and what ends it."""
    model, stack = build(recipe).to(x.device).train(), contextlib.ExitStack()
    advance = stack.enter_context(norms_once_a_step(model))
    now = {"progress": 1.0, "generator": torch.Generator().manual_seed(recipe.seed)}
    step = training_step(recipe, model, make_optimizer(recipe, model)[0], advance, now, [])
    return lambda: step(x, y), stack.close


def cost_frame(methods: Sequence[str] = tuple(METHODS), rounds: int = 5, seed: int = 0) -> pd.DataFrame:
    """Seconds of a training step on the CPU, 128 digits, relative to Standard's: columns label, method, round, ratio.

    The methods take turns, and each round divides by that round's Standard, so that a disturbance hits all alike.
    """
    recipes = [recipe("digits", method, seed) for method in dict.fromkeys(("standard", *methods))]
    x, y = (part[:128] for part in samples(recipes[0], "train"))
    steps = {one.method: stepper(one, x, y) for one in recipes}
    times: list[dict[str, float]] = []
    for turn in range(rounds + 1):  # the first isn't counted
        taken = {}
        for method, (step, _) in steps.items():
            start = time.perf_counter()
            step()
            taken[method] = time.perf_counter() - start
        times += [taken] if turn else []
    for _, end in steps.values():
        end()
    rows = [(m, i, t[m] / t["standard"]) for m in methods for i, t in enumerate(times)]
    frame = pd.DataFrame(rows, columns=["method", "round", "ratio"])
    return frame.assign(label=frame.method.map(lambda m: METHOD[m][0]))


def iteration_share(rounds: int = 9) -> float:
    """The share of an LCNN's training step (as in :func:`cost_frame`) that its power iterations take, a median."""
    one = recipe("digits", "lcnn")
    x, y = (part[:128] for part in samples(one, "train"))
    model, spent, shares = build(one).train(), [0.0], []
    with norms_once_a_step(model) as advance:

        def timed() -> None:
            start = time.perf_counter()
            advance()
            spent[0] = time.perf_counter() - start

        step = training_step(one, model, make_optimizer(one, model)[0], timed, {}, [])
        for turn in range(rounds + 1):  # the first isn't counted
            start = time.perf_counter()
            step(x, y)
            shares += [spent[0] / (time.perf_counter() - start)] if turn else []
    return median(shares)
