"""The checks of notebook 05: right answers pass, each likely mistake gets its own hint, the package agrees."""

import dataclasses
import hashlib
import inspect
import itertools
import json
import math
import sys

import numpy as np
import pytest
import torch

from lcnn_utils.exercises import training as check
from lcnn_utils.nn import CenteredSoftplus, LipschitzBatchNorm2d
from lcnn_utils.measurements.training import lowest_gamma
from lcnn_utils.training import Recipe, run_name
from lcnn_utils.training.objectives import layer_penalty, squared_gradient


def gradients(losses, x):
    return torch.autograd.grad(losses.sum(), x, create_graph=True)[0]


def squares(losses, x):
    return gradients(losses, x).flatten(1).square().sum(1)


def penalty(log_beta, log_gamma, lambda_beta, lambda_gamma):
    return lambda_beta * torch.exp(log_beta).sum() + lambda_gamma * log_gamma.abs().sum()


def penalty_by_package(log_beta, log_gamma, lambda_beta, lambda_gamma):
    """Layers with these values, priced by the objective."""
    layers = [CenteredSoftplus(value) for value in log_beta.exp().tolist()]
    layers += [LipschitzBatchNorm2d(1, value) for value in log_gamma.exp().tolist()]
    recipe = Recipe(lambda_beta=lambda_beta, lambda_gamma=lambda_gamma)
    return layer_penalty(torch.nn.Sequential(*layers).double(), recipe)[0].detach()


def by_package(losses, x):
    return squared_gradient(torch.nn.Identity(), x, x, losses.mean(), Recipe())[1]


def without_a_graph(losses, x):
    (g,) = torch.autograd.grad(losses.sum(), x, retain_graph=True)
    return g.flatten(1).square().sum(1).mean()


def by_backward(losses, x):
    losses.sum().backward(retain_graph=True)
    return x.grad.flatten(1).square().sum(1).mean()


def fall(rates, lam, momentum):
    return lam * rates.sum() / (1 - momentum)


def lowest(gamma, rates, lam, momentum):
    return max(1.0, gamma * math.exp(-fall(rates, lam, momentum)))


RIGHT = [
    ("layer_penalty", penalty),
    ("layer_penalty", penalty_by_package),
    ("layer_penalty", lambda b, g, lb, lg: lb * sum(math.exp(v) for v in b) + lg * sum(abs(v) for v in g)),
    ("gradient_penalty", lambda losses, x: squares(losses, x).mean()),
    ("gradient_penalty", lambda losses, x: gradients(losses, x).square().sum() / len(x)),
    ("gradient_penalty", lambda losses, x: len(x) * gradients(losses / len(x), x).square().sum()),
    ("gradient_penalty", by_package),
    ("lowest_gamma", lowest_gamma),
    ("lowest_gamma", lowest),
    ("lowest_gamma", lambda g, r, lam, m: torch.exp(torch.relu(math.log(g) - (lam * r / (1 - m)).sum()))),
]
WRONG = [
    ("layer_penalty", lambda b, g, lb, lg: lb * b.exp().sum() + lg * g.sum(), "from both sides: take |log γ|"),
    ("layer_penalty", lambda b, g, lb, lg: lb * b.exp().sum() + lg * g.exp().sum(), "on |log γ|, not on γ"),
    ("layer_penalty", lambda b, g, lb, lg: lb * b.sum() + lg * g.abs().sum(), "exponentiate log β"),
    ("layer_penalty", lambda b, g, lb, lg: lb * b.abs().sum() + lg * g.abs().sum(), "pulled to 0, not to 1"),
    ("layer_penalty", lambda b, g, lb, lg: lb * b.exp().mean() + lg * g.abs().mean(), "sums, not means"),
    ("layer_penalty", lambda b, g, lb, lg: lb * (b.exp().sum() + g.abs().sum()), "are two prices"),
    ("layer_penalty", lambda b, g, lb, lg: penalty(b, g, lg, lb), "λ_β belongs to β, λ_γ to γ"),
    ("layer_penalty", lambda b, g, lb, lg: lb * (b.exp() ** 2).sum() + lg * (g**2).sum(), "no squares"),
    (
        "layer_penalty",
        lambda b, g, lb, lg: lb * b.exp() + lg * g.abs().sum(),
        "→ λ_β Σ β_l + λ_γ Σ |log γ_l|, a number",
    ),
    ("layer_penalty", lambda b, g, lb, lg: (lb * b.exp().sum(), lg * g.abs().sum()), "a number"),
    ("gradient_penalty", lambda losses, x: gradients(losses, x).square().mean(), "of the sum over a sample's entries"),
    ("gradient_penalty", lambda losses, x: squares(losses, x).sqrt().mean(), "the squared norm"),
    ("gradient_penalty", lambda losses, x: squares(losses, x).sum(), "divide by N"),
    (
        "gradient_penalty",
        lambda losses, x: squares(losses.mean()[None], x).mean(),
        "the mean loss has gradients N times",
    ),
    ("gradient_penalty", lambda losses, x: squares(losses, x).sqrt().mean() ** 2, "don't square the mean"),
    ("gradient_penalty", without_a_graph, "create_graph=True"),
    ("gradient_penalty", by_backward, "create_graph=True"),
    ("gradient_penalty", lambda losses, x: squares(losses, x).mean().item(), "that can be differentiated again"),
    ("gradient_penalty", lambda losses, x: squares(losses, x).mean().detach(), "create_graph=True"),
    ("gradient_penalty", lambda losses, x: squares(losses, x), "only a number can be differentiated backward"),
    (
        "gradient_penalty",
        lambda losses, x: torch.autograd.grad(losses, x, create_graph=True)[0],
        "only a number can be",
    ),
    ("lowest_gamma", lambda g, r, lam, m: g * math.exp(-fall(r, lam, m)), "|log γ| stops pulling at γ = 1"),
    ("lowest_gamma", lambda g, r, lam, m: lowest(g, r, lam, 0.0), "momentum multiplies every step by 1/(1 − μ)"),
    ("lowest_gamma", lambda g, r, lam, m: max(1.0, g - fall(r, lam, m)), "log γ moves, not γ"),
    ("lowest_gamma", lambda g, r, lam, m: max(0.0, math.log(g) - fall(r, lam, m)), "this is log γ: exponentiate"),
    ("lowest_gamma", lambda g, r, lam, m: lowest(g, r.mean(), lam, m), "the sum of the rates, not their mean"),
    (
        "lowest_gamma",
        lambda g, r, lam, m: math.exp(max(0.0, math.log(g) * (1 - fall(r, lam, m)))),
        "the pull's strength is λ, whatever γ is",
    ),
    ("lowest_gamma", lambda g, r, lam, m: lowest(g, r.cumsum(0), lam, m), "the penalty λ|log γ| alone can pull"),
]


@pytest.mark.parametrize(("name", "answer"), RIGHT)
def test_right_answers_pass(name, answer, capsys):
    assert getattr(check, name)(answer) is True, capsys.readouterr().out
    assert capsys.readouterr().out.startswith(f"✓ {name}: correct on 4 inputs")


@pytest.mark.parametrize(("name", "answer", "hint"), WRONG)
def test_a_wrong_answer_gets_its_hint(name, answer, hint, capsys):
    assert getattr(check, name)(answer) is False
    out = capsys.readouterr().out
    assert out.startswith(f"✗ {name}: ")
    assert hint in out.split("hint: ")[1], out


def test_an_answer_without_a_graph_is_not_told_to_detach(capsys):
    """The losses come from x as it is: detached from it, there would be no gradient at all."""
    assert check.gradient_penalty(without_a_graph) is False
    assert "detach" not in capsys.readouterr().out


@pytest.mark.parametrize("name", check.__all__)
def test_stubs_errors_and_nonsense(name, capsys):
    def raising(error):
        def answer(*args):
            raise error

        return answer

    for stub in (raising(NotImplementedError), lambda *_: ..., lambda *_: None):
        assert getattr(check, name)(stub) is None
        assert f"· {name}: not attempted yet" in capsys.readouterr().out
    assert getattr(check, name)(raising(KeyError("oh"))) is False
    assert "it raised KeyError: 'oh', in the line `raise error`" in capsys.readouterr().out
    for value in ("text", (), np.zeros(3), torch.zeros(3, 5, 7), torch.zeros(()), math.nan, 0.0, 2.0, True):
        assert getattr(check, name)(lambda *_, value=value: value) is False
    text = inspect.getdoc(getattr(check, name))
    assert text.startswith("f(")
    solution = text.split("Solution: ``")[1].split("``")[0].removeprefix("lcnn_utils.")
    module, function = solution.rsplit(".", 1)
    assert callable(getattr(__import__(f"lcnn_utils.{module}", fromlist=[function]), function)), "it is where it says"


def test_the_penalty_says_where_it_differs(capsys):
    check.gradient_penalty(lambda losses, x: squares(losses, x).sum())
    assert "the penalty, and its derivatives by the weights: expected " in capsys.readouterr().out


def test_a_penalty_right_in_value_but_not_in_its_derivative(capsys):
    """The value of the right answer on the graph of another: only the derivatives give it away."""
    answer = lambda losses, x: (wrong := losses.mean()) + (squares(losses, x).mean() - wrong).detach()
    assert check.gradient_penalty(answer) is False
    out = capsys.readouterr().out
    assert "nearly right" not in out


def test_the_global_random_state_and_the_inputs_are_left_alone():
    state = torch.random.get_rng_state()
    for name, answer in RIGHT:
        getattr(check, name)(answer)
    assert torch.equal(state, torch.random.get_rng_state())

    def spoil(*args):
        for arg in args:
            if isinstance(arg, torch.Tensor) and arg.is_leaf and not arg.requires_grad:
                arg.fill_(math.nan)
        return None

    for name in check.__all__:
        getattr(check, name)(spoil)
    for name, answer in RIGHT:
        assert getattr(check, name)(answer) is True
    public = {n for n, v in vars(check).items() if inspect.isfunction(v) and v.__module__ == check.__name__}
    assert {n for n in public if n[0] != "_"} == set(check.__all__)


# ---------------------------------------------------------------------------------------------------- a run's key
def text(recipe):
    return json.dumps(dataclasses.asdict(recipe), sort_keys=True)


def values(recipe):
    return list(dataclasses.asdict(recipe).values())


def sha(value):
    return hashlib.sha256(str(value).encode()).hexdigest()


counter = itertools.count()
KEYS = [
    (run_name, None),
    (lambda recipe: hash(recipe), "a number made by hash() won't do"),
    (lambda recipe: f"{next(counter)}", "no clock, no counter"),
    (lambda recipe: object.__repr__(recipe), "no id() or address in memory"),
    (lambda recipe: f"{recipe.dataset}-{recipe.method}-{recipe.seed}", "every field counts"),
    (lambda recipe: sha([f"{v:g}" if isinstance(v, float) else v for v in values(recipe)]), "must not be rounded"),
    (lambda recipe: sha("".join(map(str, values(recipe)))), "without anything between"),
    (lambda recipe: sha(sorted(map(str, values(recipe)))), "which value is whose"),
    (lambda recipe: sha(text(recipe))[:4], "birthday paradox"),
    (lambda recipe: text(recipe), "shorten it with a hash"),
    (lambda recipe: f"run/{sha(text(recipe))}", "'-', '.' and '_'"),
    (lambda recipe: str(hash(recipe)), "Python salts hash()"),
]


def test_run_key_without_dask(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert check.run_key(run_name)
    assert "not tried in another process" in capsys.readouterr().out


@pytest.mark.parametrize(("answer", "hint"), KEYS)
def test_run_key(answer, hint, capsys):
    assert check.run_key(answer) is (hint is None)
    assert hint is None or hint in capsys.readouterr().out.split("hint: ")[1]
