"""The exercises of notebook 05; :mod:`lcnn_utils.exercises.engine` checks them."""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ..training import Recipe
from .engine import choice_of, exercise, is_stub, randn


@exercise(
    inputs=[
        (randn(0, 5), 2 * randn(9, 7), 1e-3, 1e-2),
        (randn(1, 1), 2 * randn(10, 1), 0.3, 0.0),
        (randn(2, 9), 2 * randn(11, 2), 0.0, 0.7),
    ],
    mistakes={
        "γ is pulled to 1, from both sides: take |log γ|": lambda b, g, lb, lg: lb * b.exp().sum() + lg * g.sum(),
        "the penalty is on |log γ|, not on γ": lambda b, g, lb, lg: lb * b.exp().sum() + lg * g.exp().sum(),
        "the penalty is on β itself: exponentiate log β": lambda b, g, lb, lg: lb * b.sum() + lg * g.abs().sum(),
        "β is pulled to 0, not to 1": lambda b, g, lb, lg: lb * b.abs().sum() + lg * g.abs().sum(),
        "sums, not means: every layer counts": lambda b, g, lb, lg: lb * b.exp().mean() + lg * g.abs().mean(),
        "λ_β and λ_γ are two weights": lambda b, g, lb, lg: lb * (b.exp().sum() + g.abs().sum()),
        "λ_β belongs to β, λ_γ to γ": lambda b, g, lb, lg: lg * b.exp().sum() + lb * g.abs().sum(),
        "no squares": lambda b, g, lb, lg: lb * b.exp().square().sum() + lg * g.square().sum(),
    },
)
def layer_penalty(log_beta: Tensor, log_gamma: Tensor, lambda_beta: float, lambda_gamma: float) -> Tensor:
    """f(log_beta, log_gamma, lambda_beta, lambda_gamma) → λ_β Σ β_l + λ_γ Σ |log γ_l|, a number. log_beta (L,) and
    log_gamma (M,) are what is trained: β = e^{log β}. Solution: ``lcnn_utils.training.objectives.layer_penalty``."""
    return lambda_beta * log_beta.exp().sum() + lambda_gamma * log_gamma.abs().sum()


def value_and_derivative(function: Callable, losses: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    """The penalty that a function makes of the losses, and its derivatives by x."""
    x.requires_grad_()
    value = function(losses(x), x)
    if not isinstance(value, Tensor) or value.numel() != 1:
        return value
    if not value.requires_grad:
        raise RuntimeError("the penalty can't be differentiated again")
    (derivative,) = torch.autograd.grad(value, x)
    return torch.cat([value.view(1), derivative.flatten()])


network = lambda matrix: lambda x: (x.flatten(1) @ matrix).sin().logsumexp(1)  # x (N, …) → losses (N,)
slopes = lambda losses, x, again=True: torch.autograd.grad(losses.sum(), x, create_graph=again)[0].flatten(1)


@exercise(
    inputs=[(network(randn(0, 3, 3)), randn(1, 4, 3)), (network(randn(2, 4, 3)), randn(3, 2, 1, 2, 2))],
    mistakes={
        "take the gradient with create_graph=True": lambda losses, x: slopes(losses, x, False).square().sum(1).mean(),
        "the penalty is one number, the mean over the samples": lambda losses, x: slopes(losses, x).square().sum(1),
        "mean over samples, of the sum over entries": lambda losses, x: slopes(losses, x).square().mean(),
        "the squared norm": lambda losses, x: slopes(losses, x).norm(dim=1).mean(),
        "the mean over the samples: divide by N": lambda losses, x: slopes(losses, x).square().sum(),
        "the mean loss has slopes N times too small": lambda losses, x: slopes(losses / len(x), x).norm() ** 2 / len(x),
        "square the norms, not their mean": lambda losses, x: slopes(losses, x).norm(dim=1).mean() ** 2,
    },
    call=value_and_derivative,
    compared="the penalty, and its derivatives by x: ",
)
def gradient_penalty(losses: Tensor, x: Tensor) -> Tensor:
    """f(losses, x) → mean ‖∂ℓₙ/∂xₙ‖², a number that can be differentiated again: losses (N,) were computed from x (N,
    …), each from its own sample. Solution: ``lcnn_utils.training.objectives.squared_gradient``."""
    return slopes(losses, x).square().sum(1).mean()


fall = lambda rates, lam, momentum: lam * rates.sum().item() / (1 - momentum)  # of log γ
lower = lambda gamma, fall: max(1.0, gamma * math.exp(-fall))


@exercise(
    inputs=[
        (10.0, 0.1 * randn(0, 50).abs(), 1e-2, 0.9),
        (10.0, 0.1 * randn(1, 20).abs(), 1.0, 0.9),
        (4.0, 0.1 * randn(2, 30).abs(), 0.05, 0.5),
    ],
    mistakes={
        "|log γ| stops pulling at γ = 1": lambda gamma, r, lam, m: gamma * math.exp(-fall(r, lam, m)),
        "momentum multiplies every step by 1/(1 − μ)": lambda gamma, r, lam, m: lower(gamma, fall(r, lam, 0)),
        "log γ moves, not γ": lambda gamma, r, lam, m: max(1.0, gamma - fall(r, lam, m)),
        "this is log γ: exponentiate": lambda gamma, r, lam, m: math.log(lower(gamma, fall(r, lam, m))),
        "the sum of the rates, not their mean": lambda gamma, r, lam, m: lower(gamma, fall(r.mean(), lam, m)),
        "it pulls with λ, whatever γ is": lambda gamma, r, lam, m: lower(gamma, math.log(gamma) * fall(r, lam, m)),
    },
)
def lowest_gamma(gamma: float, rates: Tensor, lam: float, momentum: float) -> float:
    """f(gamma, rates, lam, momentum) → the lowest γ that the penalty λ|log γ| alone can pull ``gamma`` down to, 1 at
    the lowest, by gradient descent on log γ with the rates (T,), long enough for momentum to count in full.
    Solution: ``lowest_gamma`` in notebook 05."""
    return lower(gamma, fall(rates, lam, momentum))


BASE = Recipe(dataset="digits", method="lcnn", model="mlp", width=8, seed=3, epochs=8)
OTHER = dict(  # not BASE's in any field
    dataset="cifar10", method="minimal", model="resnet18", width=9, seed=4, epochs=9, batch_size=64, lr=0.2,
    momentum=0.5, weight_decay=0.1, schedule="steps", augment=True, beta=4, softplus=4, gamma=4, lambda_beta=0.1,
    lambda_gamma=0.1, lambda_grad=0.1, lambda_cure=0.1, h=2, derivative="difference", eps=0.2, attack_steps=2,
    validation_fraction=0.1, max_beta=4, max_gamma=4, compile=True, bfloat16=True,
)  # fmt: skip
MANY = [dict(seed=seed, lambda_beta=number / 7) for seed in range(40) for number in range(20)]
other_hash = lambda value: 0  # in another process Python's hash() of a text is another number


def keys_differ(key: Callable[[Recipe], str], changes: list[dict[str, Any]]) -> Any:
    """Whether BASE with each of these changes has a key of its own. ValueError: a key is none, or not always the same.
    Not found out: the order of a set, ``__hash__()``, the process's number, the machine's name."""
    recipes = [replace(BASE, **change) for change in changes]
    keys = [key(recipe) for recipe in recipes]
    if is_stub(keys[0]):
        return keys[0]
    for text in keys:
        if not isinstance(text, str):
            raise ValueError("a key is a text")
        if len(text) > 100:
            raise ValueError("a key has at most 100 letters")
        if re.fullmatch(r"[A-Za-z0-9._-]+", text) is None:
            raise ValueError("a key has letters, digits, '-', '.' and '_' only")
    if [key(recipe) for recipe in recipes] != keys:
        raise ValueError("asked again, it makes another key of the same recipe")
    with mock.patch("builtins.hash", other_hash):
        if [key(recipe) for recipe in recipes] != keys:
            raise ValueError("another process makes another key of the same recipe")
    return len(set(keys)) == len(keys)


digest = lambda values: hashlib.sha256(str(values).encode()).hexdigest()
texts = lambda recipe: [str(value) for value in asdict(recipe).values()]
rounded = lambda value: f"{value:g}" if isinstance(value, int | float) else value
counter = itertools.count()


@exercise(
    inputs=[
        ([{}, {}],),
        ([{"lambda_beta": 1}, {"lambda_beta": 1.0}],),
        *[([{}, {name: value}],) for name, value in OTHER.items()],
        ([{"lr": 0.1}, {"lr": 0.1 * (1 + 1e-12)}],),
        ([{"seed": 1_234_567}, {"seed": 1_234_568}],),
        ([{"lambda_beta": 0.5, "lambda_gamma": 0.25}, {"lambda_beta": 0.25, "lambda_gamma": 0.5}],),
        ([{"lambda_beta": 0.5}, {"lambda_gamma": 0.5}],),
        ([{"seed": 1, "epochs": 11}, {"seed": 11, "epochs": 1}],),
        (MANY,),
    ],
    mistakes={
        "a file's name is a text; a number made by hash() won't do": lambda recipe: hash(recipe),
        "shorten it with a hash of hashlib, whose hexdigest is a text": lambda recipe: json.dumps(asdict(recipe)),
        "hexdigest() has only letters and digits": lambda recipe: f"runs/{digest(recipe)}",
        "no clock, no counter, no random numbers": lambda recipe: str(next(counter)),
        "no id() or address in memory": lambda recipe: str(id(recipe)),
        "f'{x:g}' keeps six digits; repr, or json.dumps, keeps all": lambda recipe: digest(
            {name: rounded(value) for name, value in asdict(recipe).items()}
        ),
        "values joined without anything between run into each other": lambda recipe: digest("".join(texts(recipe))),
        "which value is whose? Put each field's name beside its value": lambda recipe: digest(sorted(texts(recipe))),
        "Python salts hash() in each process: use hashlib.sha256 of a text": lambda recipe: str(hash(recipe)),
        "too short: n keys of k possible ones collide from n ≈ √k on (birthdays)": lambda recipe: digest(recipe)[:4],
        "every field counts: dataclasses.asdict(recipe) has them all": lambda recipe: f"{recipe.model}-{recipe.seed}",
    },
    call=keys_differ,
    compared="0 is one key for both, 1 a key for each: ",
)
def run_key(recipe: Recipe) -> str:
    """f(recipe) → a text of at most 100 letters, digits, - . and _ (a file's name): the same for equal recipes in every
    process on every machine, different for different recipes. Solution: ``lcnn_utils.training.run_name``."""
    text = json.dumps(asdict(recipe), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


use = choice_of(layer_penalty, gradient_penalty, lowest_gamma, run_key)
