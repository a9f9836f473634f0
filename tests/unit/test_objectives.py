"""The two losses against the formula of the paper, and every field of a recipe."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from lcnn_utils.activations import CenteredSoftplus
from lcnn_utils.lipschitz import LipschitzBatchNorm2d
from lcnn_utils.objectives import DATASETS, MODELS, OBJECTIVES, Recipe, lcnn, standard
from lcnn_utils.training import state_path

BETAS, GAMMAS = (0.5, 3.0, 40.0), (0.25, 8.0)  # one γ below 1, where log γ < 0


@pytest.fixture
def net():
    torch.manual_seed(0)
    (b0, b1, b2), (g0, g1) = BETAS, GAMMAS
    return nn.Sequential(
        nn.Linear(4, 8), LipschitzBatchNorm2d(8, g0), CenteredSoftplus(b0),
        nn.Linear(8, 8), LipschitzBatchNorm2d(8, g1), CenteredSoftplus(b1),
        nn.Linear(8, 8), CenteredSoftplus(b2), nn.Linear(8, 3),
    ).double()  # fmt: skip


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, 4, generator=generator).double(), torch.randint(0, 3, (16,), generator=generator)


def cross_entropy(logits: torch.Tensor, y: torch.Tensor) -> float:
    z = logits.detach().numpy()
    return float(np.mean(np.log(np.exp(z).sum(1)) - z[np.arange(len(z)), y.numpy()]))


def test_standard_is_cross_entropy(net, batch):
    x, y = batch
    loss, terms = standard(net, x, y, Recipe())
    logits = net(x)
    assert loss.item() == pytest.approx(cross_entropy(logits, y), rel=1e-12)
    assert loss.requires_grad
    assert set(terms) == {"loss", "accuracy"}
    assert not any(term.requires_grad for term in terms.values())
    assert terms["loss"].item() == loss.item()
    assert terms["accuracy"].item() == pytest.approx(np.mean(logits.detach().numpy().argmax(1) == y.numpy()))


@pytest.mark.parametrize(("lambda_beta", "lambda_gamma"), [(0.0, 0.0), (1e-3, 1e-3), (0.3, 0.0), (0.0, 0.7)])
def test_lcnn_is_the_formula_by_hand(net, batch, lambda_beta, lambda_gamma):
    x, y = batch
    loss, terms = lcnn(net, x, y, Recipe(method="lcnn", lambda_beta=lambda_beta, lambda_gamma=lambda_gamma))
    sum_beta, sum_gamma = sum(BETAS), sum(abs(math.log(gamma)) for gamma in GAMMAS)
    expected = cross_entropy(net(x), y) + lambda_beta * sum_beta + lambda_gamma * sum_gamma
    assert loss.item() == pytest.approx(expected, rel=1e-7)  # log β is set in float32
    assert terms["sum_beta"].item() == pytest.approx(sum_beta, rel=1e-6)
    assert terms["sum_abs_log_gamma"].item() == pytest.approx(sum_gamma, rel=1e-6)
    assert terms["loss"].item() == pytest.approx(cross_entropy(net(x), y), rel=1e-12), "logged: cross-entropy alone"
    assert not any(term.requires_grad for term in terms.values())


def test_gradients_of_the_penalties(net, batch):
    """∂(λβ Σβ)/∂log β = λβ·β and ∂(λγ Σ|log γ|)/∂log γ = λγ·sign(log γ), on top of cross-entropy's."""
    recipe = Recipe(method="lcnn", lambda_beta=0.3, lambda_gamma=0.7)
    named = dict(net.named_parameters())
    with_penalty = torch.autograd.grad(lcnn(net, *batch, recipe)[0], list(named.values()))
    without = torch.autograd.grad(standard(net, *batch, recipe)[0], list(named.values()))
    extra = {name: (a - b) for name, a, b in zip(named, with_penalty, without, strict=True)}
    betas = [value.item() for name, value in extra.items() if name.endswith("log_beta")]
    gammas = [value.item() for name, value in extra.items() if name.endswith("log_gamma")]
    assert betas == pytest.approx([0.3 * beta for beta in BETAS], rel=1e-6)
    assert gammas == pytest.approx([0.7 * math.copysign(1, math.log(gamma)) for gamma in GAMMAS])
    rest = [value for name, value in extra.items() if not name.endswith(("log_beta", "log_gamma"))]
    assert all(torch.equal(value, torch.zeros_like(value)) for value in rest)


def test_a_net_without_our_layers_has_no_penalty(batch):
    net = nn.Linear(4, 3).double()
    loss, terms = lcnn(net, *batch, Recipe(method="lcnn", lambda_beta=1.0, lambda_gamma=1.0))
    assert loss.item() == standard(net, *batch, Recipe())[0].item()
    assert terms["sum_beta"].item() == terms["sum_abs_log_gamma"].item() == 0


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("dataset", "digit", r"unknown dataset 'digit': known are .*did you mean 'digits'\?"),
        ("dataset", "imagenet", "unknown dataset 'imagenet': known are " + ", ".join(DATASETS)),
        ("method", "lcn", r"unknown method 'lcn': known are standard, lcnn; did you mean 'lcnn'\?"),
        ("model", "resnet-18", r"unknown model 'resnet-18': known are .*did you mean 'resnet18'\?"),
        ("model", "zzz", "unknown model 'zzz': known are " + ", ".join(MODELS)),
    ],
)
def test_unknown_names_are_listed_and_suggested(field, value, says):
    with pytest.raises(ValueError, match=says):
        Recipe(**{field: value})


WHOLE = ("width", "epochs", "batch_size")
POSITIVE = ("lr", "beta", "gamma")
AT_LEAST_ZERO = ("lambda_beta", "lambda_gamma", "weight_decay", "momentum")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[(name, value) for name in WHOLE for value in (0, -3, 2.0, 1.5, math.nan, True, "8")],
        *[(name, value) for name in POSITIVE for value in (0, -1.0, math.nan, math.inf, True, "0.1")],
        *[(name, value) for name in AT_LEAST_ZERO for value in (-1e-9, math.nan, math.inf, True, "0.1")],
        *[("seed", value) for value in (-1, 1.5, math.nan, True, "0")],
        *[("momentum", value) for value in (1.0, 1.5)],  # the steps of SGD would grow without end
        *[("augment", value) for value in (1, "no", None)],
    ],
)
def test_bad_numbers_are_named(field, value):
    with pytest.raises(ValueError, match=rf"{field} must be .*{value!s}"):
        Recipe(**{field: value})


def test_moons_are_points_and_need_the_mlp():
    with pytest.raises(ValueError, match=r"moons.*mlp"):
        Recipe("moons", model="resnet10")


def test_a_recipe_is_a_value():
    assert Recipe() == Recipe()
    assert len({Recipe(), Recipe(), Recipe(seed=1)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().lr = 1.0
    with pytest.raises(ValueError, match="lr"):
        dataclasses.replace(Recipe(), lr=-1.0)


def test_the_names_are_those_of_the_objectives():
    assert {"standard": standard, "lcnn": lcnn} == OBJECTIVES


OTHER = dict(
    dataset="svhn", method="lcnn", model="vgg11", width=17, seed=1, epochs=31, batch_size=127, lr=0.2, momentum=0.8,
    weight_decay=1e-4, augment=True, beta=4.0, gamma=9.0, lambda_beta=1e-2, lambda_gamma=1e-2,
)  # fmt: skip


def test_every_field_has_its_own_path(monkeypatch, tmp_path):
    monkeypatch.setenv("LCNN_STORE", str(tmp_path))
    assert set(OTHER) == {field.name for field in dataclasses.fields(Recipe)}, "a new field: add it here"
    paths = [state_path(dataclasses.replace(Recipe(), **{name: value})) for name, value in OTHER.items()]
    assert len({state_path(Recipe()), *paths}) == len(OTHER) + 1
    assert state_path(Recipe()) == state_path(Recipe())
    assert state_path(Recipe("svhn", "lcnn", seed=7)).name.startswith("svhn-lcnn-seed7-")
    assert state_path(Recipe()).is_relative_to(tmp_path)
    assert not list(tmp_path.iterdir()), "asking for a path makes nothing"


def test_equal_recipes_have_equal_paths(monkeypatch, tmp_path):
    """1 == 1.0 in Python, so the recipes are equal, and so must their states be."""
    monkeypatch.setenv("LCNN_STORE", str(tmp_path))
    assert Recipe(lr=1, beta=5, gamma=10) == Recipe(lr=1.0, beta=5.0, gamma=10.0)
    assert state_path(Recipe(lr=1, beta=5, gamma=10)) == state_path(Recipe(lr=1.0, beta=5.0, gamma=10.0))
