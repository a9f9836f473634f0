"""Every field of a recipe: what it may be, and that it has a part in the name of the recipe's files."""

import dataclasses
import hashlib
import importlib
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lcnn_utils import nn as models
from lcnn_utils.nn import CenteredSoftplus, LipschitzBatchNorm2d
from lcnn_utils.training import (
    DATASETS,
    INPUTS,
    METHODS,
    MODELS,
    ONLY,
    Recipe,
    build,
    fit,
    objectives,
    run_name,
    samples,
    state_path,
)
from lcnn_utils.training.recipe import DERIVATIVES, SCHEDULES

recipe = importlib.import_module("lcnn_utils.training.recipe")

OTHER = dict(
    dataset="svhn", method="lcnn", model="vgg11", width=17, seed=1, epochs=31, batch_size=127, lr=0.2, momentum=0.8,
    weight_decay=1e-4, schedule="steps", augment=True, beta=4.0, softplus=9.0, gamma=9.0, lambda_beta=1e-2,
    lambda_gamma=1e-2, lambda_grad=1e-2, lambda_cure=1e-2, h=0.5, penalty_eval=True, derivative="difference", eps=0.2,
    attack_steps=4, published=True, held_out=0.2,
)  # fmt: skip


# ---- what a field may be -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("dataset", "digit", r"unknown dataset 'digit': known are .*did you mean 'digits'\?"),
        ("dataset", "imagenet", "unknown dataset 'imagenet': known are " + ", ".join(DATASETS)),
        ("method", "lcn", "unknown method 'lcn': known are " + ", ".join(METHODS) + r"; did you mean 'lcnn'\?"),
        ("method", "lcnn-gradreg", r"did you mean 'lcnn_gradreg'\?"),
        ("model", "resnet-18", r"unknown model 'resnet-18': known are .*did you mean 'resnet18'\?"),
        ("model", "zzz", "unknown model 'zzz': known are " + ", ".join(MODELS)),
        ("schedule", "step", "unknown schedule 'step': known are " + ", ".join(SCHEDULES)),
        ("derivative", "differences", "unknown derivative 'differences': known are " + ", ".join(DERIVATIVES)),
    ],
)
def test_unknown_names_are_listed_and_suggested(field, value, says):
    with pytest.raises(ValueError, match=says):
        Recipe(**{field: value})


YES_OR_NO = ("augment", "published", "penalty_eval")
WHOLE = ("width", "epochs", "batch_size", "attack_steps")
POSITIVE = ("lr", "beta", "softplus", "gamma", "h", "eps")
AT_LEAST_ZERO = ("lambda_beta", "lambda_gamma", "lambda_grad", "lambda_cure", "weight_decay", "momentum", "held_out")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[(name, value) for name in WHOLE for value in (0, -3, 2.0, 1.5, math.nan, True, "8")],
        *[(name, value) for name in POSITIVE for value in (0, -1.0, math.nan, math.inf, True, "0.1")],
        *[(name, value) for name in AT_LEAST_ZERO for value in (-1e-9, math.nan, math.inf, True, "0.1")],
        *[("seed", value) for value in (-1, 1.5, math.nan, True, "0", 2**31, 2**64, np.int64(3))],
        *[(name, value) for name in WHOLE for value in (2**31, 10**400, np.int64(8), np.float64(8))],
        *[(name, value) for name in (*POSITIVE, *AT_LEAST_ZERO) for value in (10**400, np.float32(0.5), np.True_)],
        *[(name, np.True_) for name in YES_OR_NO],
        *[("momentum", value) for value in (1.0, 1.5)],  # the steps of SGD would grow without end
        *[("held_out", value) for value in (1, 1.0, 20)],  # nothing would be left to train on
        *[(name, value) for name in YES_OR_NO for value in (1, "no", None)],
    ],
)
def test_bad_numbers_are_named(field, value):
    with pytest.raises(ValueError, match=rf"{field} must be .*{value!s}"):
        Recipe(**{field: value})


@pytest.mark.parametrize("seed", [0, 2**31 - 1])
def test_whatever_draws_takes_the_smallest_and_the_largest_seed(seed):
    recipe = Recipe("moons", model="mlp", seed=seed)
    build(recipe)
    assert all(len(samples(recipe, split)[0]) for split in ("train", "test"))


def test_zero_switches_a_penalty_off():
    assert all(getattr(Recipe(**{name: 0}), name) == 0.0 for name in AT_LEAST_ZERO)


def test_every_field_is_checked():
    """A new field: say above what it may be."""
    names = {"dataset", "method", "model", "schedule", "derivative", "seed"}
    assert names | {*YES_OR_NO, *WHOLE, *POSITIVE, *AT_LEAST_ZERO} == {
        field.name for field in dataclasses.fields(Recipe)
    }


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
    assert eval(repr(Recipe(**OTHER))) == Recipe(**OTHER)


def test_the_tables_agree():
    assert tuple(INPUTS) == DATASETS
    assert set(METHODS) == set(objectives.OBJECTIVES), "each method has an objective, each objective a net"
    assert [name for name, (_, lipschitz) in METHODS.items() if lipschitz] == ["lcnn", "lcnn_gradreg"]
    for name in ("DATASETS", "METHODS", "MODELS", "Recipe"):
        assert getattr(objectives, name) is getattr(recipe, name)


# ---- the name of its files ---------------------------------------------------------------------------------------


def test_every_field_has_its_own_path(monkeypatch, tmp_path):
    monkeypatch.setenv("LCNN_STORE", str(tmp_path))
    assert set(OTHER) == {field.name for field in dataclasses.fields(Recipe)}, "a new field: add it here"
    paths = [state_path(dataclasses.replace(Recipe(), **{name: value})) for name, value in OTHER.items()]
    assert len({state_path(Recipe()), *paths}) == len(OTHER) + 1
    assert state_path(Recipe()) == state_path(Recipe())
    assert state_path(Recipe("svhn", "lcnn", seed=7)).name.startswith("svhn-lcnn-seed7-")
    assert state_path(Recipe()).is_relative_to(tmp_path)
    assert state_path(Recipe()).name == run_name(Recipe()) + ".safetensors"
    assert not list(tmp_path.iterdir()), "asking for a path makes nothing"


def digest(**changed) -> str:
    return hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:12]


def test_the_name_holds_a_hash_of_what_is_not_at_its_default():
    """So that a field which is new, and has today's way as its default, leaves the names of all files as they are."""
    assert run_name(Recipe()) == f"digits-standard-seed0-{digest()}" == "digits-standard-seed0-44136fa355b3"
    assert run_name(Recipe(lr=0.1, seed=0)) == run_name(Recipe())
    assert run_name(Recipe("svhn", lr=0.5)) == f"svhn-standard-seed0-{digest(dataset='svhn', lr=0.5)}"
    assert run_name(Recipe(**OTHER)) == f"svhn-lcnn-seed1-{digest(**OTHER)}"


def test_holding_nothing_out_is_the_default_and_comes_last():
    """So that the files from before this field keep their names, and positional arguments their meaning."""
    assert dataclasses.fields(Recipe)[-1].name == "held_out"
    assert Recipe(held_out=0) == Recipe(held_out=-0.0) == Recipe()
    assert run_name(Recipe(held_out=0)) == run_name(Recipe())
    assert run_name(Recipe(held_out=0.2)) == f"digits-standard-seed0-{digest(held_out=0.2)}"


@settings(deadline=None, max_examples=100)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "seed": st.integers(0, 3),
            "lr": st.sampled_from([0.1, 1, 1.0, 0.5]),
            "momentum": st.sampled_from([0, 0.0, -0.0, 0.9]),
            "lambda_grad": st.sampled_from([0, -0.0, 1e-3, 1]),
            "published": st.booleans(),
        },
    ),
    st.fixed_dictionaries({}, optional={"seed": st.integers(0, 3), "momentum": st.sampled_from([0, 0.0, -0.0, 0.9])}),
)
def test_recipes_are_equal_just_if_their_names_are(fields, others):
    """1 == 1.0 and 0.0 == −0.0 in Python, so such recipes are equal, and so must their states be."""
    for a, b in ((fields, others), (fields, fields | others)):
        assert (Recipe(**a) == Recipe(**b)) == (run_name(Recipe(**a)) == run_name(Recipe(**b)))


# ---- its net -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["standard", "lcnn"])
@pytest.mark.parametrize(
    ("dataset", "model"), [("moons", "mlp"), *[(dataset, model) for dataset in DATASETS[1:] for model in MODELS]]
)
def test_build_makes_what_the_recipe_says(dataset, model, method):
    recipe = Recipe(dataset, method, model, width=2, beta=3.0, gamma=4.0)
    net = build(recipe).eval()
    shape = {"moons": (2,), "digits": (1, 8, 8)}.get(dataset, (3, 32, 32))
    assert net(torch.rand(2, *shape)).shape == (2, {"moons": 2, "cifar100": 100}.get(dataset, 10))
    betas = [m for m in net.modules() if isinstance(m, CenteredSoftplus)]
    gammas = [m.gamma.item() for m in net.modules() if isinstance(m, LipschitzBatchNorm2d)]
    low = method == "lcnn"
    assert [m.beta.item() for m in betas] == pytest.approx([3.0 if low else 1000.0] * len(betas))
    assert any(name.endswith("log_beta") for name, _ in net.named_parameters()) == low
    assert bool(gammas) == low
    assert gammas == pytest.approx([4.0] * len(gammas))


def test_build_is_drawn_from_the_seed_alone():
    recipe = Recipe(method="lcnn", width=2)
    torch.manual_seed(5)
    first = build(recipe).state_dict()
    torch.manual_seed(6)
    second, other = build(recipe).state_dict(), build(dataclasses.replace(recipe, seed=1)).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


ACTIVATIONS = dict.fromkeys(METHODS, CenteredSoftplus) | {"softplus_wd": nn.Softplus, "relu": nn.ReLU}


@pytest.mark.parametrize("model", ["resnet10", "vgg11", "mlp"])
@pytest.mark.parametrize("method", METHODS)
def test_each_method_has_its_net(method, model):
    net = build(Recipe(method=method, model=model, width=2, beta=3.0, softplus=7.0))
    activations = [m for m in net.modules() if isinstance(m, CenteredSoftplus | nn.Softplus | nn.ReLU)]
    assert {type(m) for m in activations} == {ACTIVATIONS[method]}
    trained, lipschitz = method in ("lcnn", "lcnn_gradreg", "minimal"), method in ("lcnn", "lcnn_gradreg")
    betas = [torch.as_tensor(m.beta).item() for m in activations if method != "relu"]
    assert betas == pytest.approx([7.0 if method == "softplus_wd" else 3.0 if trained else 1000.0] * len(betas))
    assert sum(name.endswith("log_beta") for name, _ in net.named_parameters()) == trained * len(activations)
    kinds = {type(m) for m in net.modules()}
    assert (LipschitzBatchNorm2d in kinds) == lipschitz
    assert (nn.BatchNorm2d in kinds) == (not lipschitz and model != "mlp")
    assert (models.OrdinaryBlock in kinds) == (method == "relu" and model == "resnet10")
    layers = [m for m in net.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    normed = [m for m in layers if nn.utils.parametrize.is_parametrized(m)]
    if model == "mlp":
        assert normed == (layers[:-1] if lipschitz else []), "its read-out is free"
    else:
        assert normed == (layers if lipschitz else [] if method == "relu" else layers[-1:])


# ---- to which methods a field makes a difference -----------------------------------------------------------------

CHANGES = dict(OTHER, method=None, h=0.25)


@pytest.mark.parametrize("method", METHODS)
def test_fields_that_mean_nothing_to_a_method(method, monkeypatch, tmp_path):
    """Training with another value comes to the same net exactly where ``ONLY`` says so."""
    monkeypatch.setenv("LCNN_STORE", str(tmp_path))
    one = Recipe(method=method, model="resnet10", width=1, epochs=1, batch_size=700, lr=0.05, lambda_grad=1.0,
                 lambda_cure=1.0, lambda_beta=1.0, lambda_gamma=1.0, momentum=0.0)  # fmt: skip

    def trained(recipe):
        return {name: value for name, value in fit(recipe, device="cpu", progress=False)[0].state_dict().items()}

    plain = trained(one)
    for field, methods in ONLY.items():
        other = trained(dataclasses.replace(one, **{field: CHANGES[field]}))
        same = plain.keys() == other.keys() and all(torch.equal(plain[name], other[name]) for name in plain)
        assert same == (method not in methods), field
