"""The checks of notebook 05; see :mod:`lcnn_utils.exercises.engine`."""

import math
import re
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..experiments.sweep import dask_distributed, local_cluster
from ..training import Recipe
from .engine import _kind, randn, verdict

__all__ = ["gradient_penalty", "layer_penalty", "lowest_gamma", "run_key"]


def layer_penalty(f: Callable) -> bool | None:
    """f(log_beta, log_gamma, lambda_beta, lambda_gamma) → λ_β Σ β_l + λ_γ Σ |log γ_l|, a number. log_beta (L,) and
    log_gamma (M,) are what is trained: β = e^{log β}. Solution: ``lcnn_utils.training.objectives.layer_penalty``."""
    truth = lambda log_beta, log_gamma, lambda_beta, lambda_gamma: (
        lambda_beta * log_beta.exp().sum() + lambda_gamma * log_gamma.abs().sum()
    )
    mistakes = {
        "γ is pulled to 1, from both sides: take |log γ|": lambda b, g, lb, lg: lb * b.exp().sum() + lg * g.sum(),
        "the price is on |log γ|, not on γ": lambda b, g, lb, lg: lb * b.exp().sum() + lg * g.exp().sum(),
        "the price is on β itself: exponentiate log β": lambda b, g, lb, lg: lb * b.sum() + lg * g.abs().sum(),
        "β is pulled to 0, not to 1": lambda b, g, lb, lg: lb * b.abs().sum() + lg * g.abs().sum(),
        "sums, not means: each layer has its price": lambda b, g, lb, lg: lb * b.exp().mean() + lg * g.abs().mean(),
        "λ_β and λ_γ are two prices": lambda b, g, lb, lg: lb * (b.exp().sum() + g.abs().sum()),
        "λ_β belongs to β, λ_γ to γ": lambda b, g, lb, lg: lg * b.exp().sum() + lb * g.abs().sum(),
        "no squares": lambda b, g, lb, lg: lb * b.exp().square().sum() + lg * g.square().sum(),
    }
    sizes = [(5, 7, 1e-3, 1e-2), (1, 1, 0.3, 0.0), (9, 2, 0.0, 0.7), (3, 12, 0.5, 0.2)]
    inputs = [(randn(i, n), 2 * randn(i + 9, m), lb, lg) for i, (n, m, lb, lg) in enumerate(sizes)]
    return verdict(layer_penalty, f, inputs, truth, mistakes)


def gradient_penalty(f: Callable) -> bool | None:
    """f(losses, x) → mean ‖∂ℓₙ/∂xₙ‖², a number that can be differentiated again: losses (N,) were computed from x (N,
    …), each from its own sample. Solution: ``lcnn_utils.training.objectives.squared_gradient``."""

    def gradient(losses: Tensor, x: Tensor) -> Tensor:
        return torch.autograd.grad(losses.sum(), x, create_graph=True, retain_graph=True)[0]

    def task(f: Callable) -> Callable:
        def value_and_derivative(weight: Tensor, samples: Tensor) -> Tensor:
            weight, x = weight.clone().requires_grad_(), samples.clone().requires_grad_()
            losses = torch.logaddexp((x.flatten(1) @ weight).sin().sum(1), torch.zeros(()).to(x))
            value = f(losses, x)
            if not isinstance(value, Tensor):
                return value
            if not value.requires_grad:
                raise RuntimeError("it can't be differentiated again: take the gradient with create_graph=True")
            (derivative,) = torch.autograd.grad(value, weight)
            return torch.cat([value.detach().view(1), derivative.flatten()])

        return value_and_derivative

    def of(change: Callable[[Tensor], Tensor]) -> Callable:
        return task(lambda losses, x: change(gradient(losses, x)))

    mistakes = {
        "mean over the samples, of the sum over a sample's entries": of(lambda g: g.square().mean()),
        "the squared norm": of(lambda g: g.flatten(1).norm(dim=1).mean()),
        "the mean over the samples: divide by N": of(lambda g: g.square().sum()),
        "each loss by itself: the mean loss has gradients N times too small": of(
            lambda g: (g / len(g)).flatten(1).square().sum(1).mean()
        ),
        "sum the losses for the gradient, and don't square the mean": of(
            lambda g: g.flatten(1).norm(dim=1).mean() ** 2
        ),
    }
    truth = of(lambda g: g.flatten(1).square().sum(1).mean())
    shapes = [(4, (3,)), (2, (1, 2, 2)), (7, (2, 3)), (1, (5,))]
    inputs = [(randn(i, math.prod(s), 3), randn(i + 20, n, *s)) for i, (n, s) in enumerate(shapes)]
    what = "the penalty, and its derivatives by the weights: "
    return verdict(gradient_penalty, task(f), inputs, truth, mistakes, what=what)


def lowest_gamma(f: Callable) -> bool | None:
    """f(gamma, rates, lam, momentum) → the lowest γ that the penalty λ|log γ| alone can pull ``gamma`` down to, 1 at
    the lowest, by gradient descent on log γ with the rates (T,), long enough for momentum to count in full.
    Solution: ``lcnn_utils.measurements.training.lowest_gamma``."""
    log = lambda gamma: torch.tensor(gamma).double().log()
    lowest = lambda log_gamma: log_gamma.clamp(min=0).exp()  # not below γ = 1
    reach = lambda rates, lam, momentum: lam * rates.sum() / (1 - momentum)
    truth = lambda gamma, rates, lam, momentum: lowest(log(gamma) - reach(rates, lam, momentum))
    mistakes = {
        "|log γ| stops pulling at γ = 1": lambda gamma, r, lam, m: (log(gamma) - reach(r, lam, m)).exp(),
        "momentum multiplies every step by 1/(1 − μ)": lambda gamma, r, lam, m: lowest(log(gamma) - reach(r, lam, 0)),
        "log γ moves, not γ": lambda gamma, r, lam, m: (log(gamma).exp() - reach(r, lam, m)).clamp(min=1),
        "this is log γ: exponentiate": lambda gamma, r, lam, m: (log(gamma) - reach(r, lam, m)).clamp(min=0),
        "the sum of the rates, not their mean": lambda gamma, r, lam, m: lowest(log(gamma) - reach(r.mean(), lam, m)),
        "the pull's strength is λ, whatever γ is": lambda gamma, r, lam, m: lowest(log(gamma) * (1 - reach(r, lam, m))),
    }
    settings = [(10.0, 50, 1e-2, 0.9), (10.0, 20, 1.0, 0.9), (4.0, 30, 0.05, 0.5), (2.5, 7, 0.1, 0.0)]
    inputs = [(g, 0.1 * randn(i, n).abs(), lam, m) for i, (g, n, lam, m) in enumerate(settings)]
    return verdict(lowest_gamma, f, inputs, truth, mistakes)


BASE = Recipe("digits", "lcnn", "mlp", width=8, seed=3, epochs=8)
WITHOUT_DASK = "but not tried in another process, which needs Dask (pip install -e '.[cluster]')"
OTHER_NAMES = {"dataset": "cifar10", "method": "minimal", "model": "resnet18"}
OTHER_NAMES |= {"schedule": "steps", "derivative": "difference"}


def run_key(f: Callable) -> bool | None:
    """f(recipe) → a text of at most 100 letters, digits, - . and _ (a file's name): the same for equal recipes in every
    process on every machine, different for different recipes. Solution: ``lcnn_utils.training.run_name``."""
    try:
        key = f(BASE)
        found = "" if key is None or key is ... else _key_problem(f)
    except NotImplementedError:
        key = None
    except (Exception, SystemExit) as error:
        lines = [frame.line for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
        line = f", in the line `{lines[0]}`" if lines else ""
        key, found = "", f"it raised {type(error).__name__}: {error}{line}"
    if key is None or key is ...:
        print("· run_key: not attempted yet: the rest uses lcnn_utils' version")
        return None
    elsewhere = "and the same in another process" if find_spec("distributed") else WITHOUT_DASK
    print(f"✗ run_key: {found}" if found else f"✓ run_key: correct, {elsewhere}")
    return not found


def _key_problem(f: Callable) -> str:
    """What is wrong with a student's key, and a hint; empty if nothing is."""
    key = f(BASE)
    if not isinstance(key, str):
        return f"expected a text, got {_kind(key)}\n  hint: a file's name is a text; a number made by hash() won't do"
    for one, equal in ((BASE, BASE), (BASE, replace(BASE)), (_with(lambda_beta=1), _with(lambda_beta=1.0))):
        if (a := f(one)) != (b := f(equal)):
            return f"{a!r} and {b!r} for equal recipes\n  hint: no clock, no counter, and no id() or address in memory"
    if ignored := [name for name, other in _others().items() if f(other) == key]:
        return (
            f"one key for recipes that differ in {', '.join(ignored)}\n  hint: every field counts: "
            "dataclasses.asdict(recipe) has them all"
        )
    rounded = "numbers must not be rounded: f'{x:g}' keeps six digits; repr, or json.dumps, keeps them all"
    whose = "which value is whose? Put each field's name beside its value"
    joined = "values joined without anything between run into each other"
    alike: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        (dict(lr=0.1), dict(lr=0.1 * (1 + 1e-12)), rounded),
        (dict(seed=1_234_567), dict(seed=1_234_568), rounded),
        (dict(lambda_beta=0.5, lambda_gamma=0.25), dict(lambda_beta=0.25, lambda_gamma=0.5), whose),
        (dict(lambda_beta=0.5), dict(lambda_gamma=0.5), whose),
        (dict(width=1, seed=11), dict(width=11, seed=1), joined),
    ]
    for one_change, other_change, hint in alike:
        if f(_with(**one_change)) == f(_with(**other_change)):
            return f"one key for {one_change} and for {other_change}\n  hint: {hint}"
    many = [f(_with(seed=seed, lambda_beta=number / 7)) for seed in range(40) for number in range(20)]
    if (distinct := len(set(many))) < len(many):
        return (
            f"{len(many)} different recipes have only {distinct} keys\n  hint: too short: by the birthday paradox n "
            "keys of k possible ones collide from n ≈ √k on; keep 12 hex digits"
        )
    if len(key) > 100:
        return (
            f"{len(key)} letters are too long for a file's name\n  hint: shorten it with a hash that is the same "
            "everywhere, hashlib.sha256(text.encode()).hexdigest()"
        )
    if bad := re.search(r"[^A-Za-z0-9._-]", key):
        return f"{bad[0]!r} in {key!r}\n  hint: letters, digits, '-', '.' and '_', such as hexdigest() has"
    recipes = [BASE, *_others().values()]
    if find_spec("distributed") and (there := _in_another_process(f, recipes)) != [f(one) for one in recipes]:
        return (
            f"{key!r} here and {there[0]!r} in another process\n  hint: Python salts hash() of texts anew in each "
            "process, and sets have another order there: use hashlib.sha256 on a text, and sort"
        )
    return ""


def _in_another_process(f: Callable, recipes: list[Recipe]) -> list[str]:
    """The keys of recipes in a new process, as a worker would make them."""
    with local_cluster(1, "cpu") as cluster, dask_distributed().Client(cluster) as client:
        return client.submit(lambda: [f(recipe) for recipe in recipes], pure=False).result()


def _with(**changes: Any) -> Recipe:
    return replace(BASE, **changes)


def _others() -> dict[str, Recipe]:
    """For each field a recipe that differs from BASE in it alone."""
    changed: dict[str, Any] = {}
    for name, value in asdict(BASE).items():
        if isinstance(value, str):
            changed[name] = OTHER_NAMES[name]
        elif isinstance(value, bool | None):
            changed[name] = not value
        else:
            changed[name] = value + 1 if isinstance(value, int) else value / 2 or 0.5
    return {name: _with(**{name: value}) for name, value in changed.items()}
