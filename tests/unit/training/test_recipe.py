"""Recipes: what each field may be, the name of a recipe's files, its network, and the recipes of each scale."""

import dataclasses
import hashlib
import itertools
import json
import math

import pytest
import torch
from networks import same_weights
from torch import nn

from lcnn_utils.experiments import SHIPPED
from lcnn_utils.nn import CenteredSoftplus, LipschitzBatchNorm2d, OrdinaryBlock
from lcnn_utils.training import (
    DATASETS,
    METHODS,
    MODELS,
    OBJECTIVES,
    ONLY,
    SCALES,
    Recipe,
    build,
    make_optimizer,
    recipe,
    run_name,
    training_step,
)
from lcnn_utils.training.checkpoint import recipe_of

OTHER = dict(
    dataset="svhn", method="lcnn", model="vgg11", width=17, seed=1, epochs=31, batch_size=127, lr=0.2, momentum=0.8,
    weight_decay=1e-4, schedule="steps", augment=True, beta=4.0, softplus=9.0, gamma=9.0, lambda_beta=1e-2,
    lambda_gamma=1e-2, lambda_grad=1e-2, lambda_cure=1e-2, h=0.5, derivative="difference", eps=0.2, attack_steps=4,
    validation_fraction=0.2, max_beta=4.0, max_gamma=2.0, compile=False, bfloat16=True,
)  # fmt: skip
POSITIVE = ("lr", "beta", "softplus", "gamma", "h", "eps", "max_beta", "max_gamma")
AT_LEAST_ZERO = (
    "lambda_beta",
    "lambda_gamma",
    "lambda_grad",
    "lambda_cure",
    "weight_decay",
    "momentum",
    "validation_fraction",
)
BAD = {
    **dict.fromkeys(("width", "epochs", "batch_size", "attack_steps"), (0, 2.0, math.nan, "8")),
    **dict.fromkeys(POSITIVE, (0, -1.0, math.nan, math.inf, "0.1")),
    **dict.fromkeys(AT_LEAST_ZERO, (-1e-9, math.nan, math.inf, "0.1")),
    "augment": (1, "no", None),
    **dict.fromkeys(("compile", "bfloat16"), (0, "no")),
    "seed": (-1, 1.5, "0", 2**31),
    "dataset": ("digit",),
    "method": ("lcn",),
    "model": ("resnet-18",),
    "schedule": ("step",),
    "derivative": ("differences",),
}


def test_every_field_is_checked_and_named():
    fields = {field.name for field in dataclasses.fields(Recipe)}
    assert fields == set(BAD) == set(OTHER), "a new field: say above what it may not be, and another value"
    for name, values in BAD.items():
        for value in values:
            with pytest.raises(ValueError, match=rf"{name} .*{value!s}"):
                Recipe(**{name: value})
    for name in ("momentum", "validation_fraction"):
        with pytest.raises(ValueError, match=name):
            Recipe(**{name: 1.0})
    assert all(getattr(Recipe(**{name: 0}), name) == 0.0 for name in AT_LEAST_ZERO), "0 switches a penalty off"
    with pytest.raises(ValueError, match=r"moons.*mlp"):
        Recipe(dataset="moons", model="resnet10")
    with pytest.raises(ValueError, match=r"no second derivatives.*difference"):
        Recipe(method="gradreg", compile=True)


def digest(**changed) -> str:
    return hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:12]


def test_the_name_holds_a_hash_of_what_is_not_at_its_default():
    """So that a new field, with what was done before as its default, leaves the names of all files as they are."""
    assert run_name(Recipe()) == "digits-standard-seed0-44136fa355b3"
    assert run_name(Recipe(dataset="svhn", lr=0.5)) == f"svhn-standard-seed0-{digest(dataset='svhn', lr=0.5)}"
    assert run_name(Recipe(**OTHER)) == f"svhn-lcnn-seed1-{digest(**OTHER)}"
    assert len({run_name(Recipe(**{name: value})) for name, value in OTHER.items()}) == len(OTHER)
    for path in SHIPPED.glob("*.json"):
        assert run_name(recipe_of(json.loads(path.read_text())["recipe"])) == path.stem


def test_older_names_of_fields_are_understood():
    fields = dataclasses.asdict(Recipe(validation_fraction=0.2)) | {"held_out": 0.2, "channels_last": None}
    del fields["validation_fraction"]
    assert recipe_of(fields) == Recipe(validation_fraction=0.2)
    assert run_name(Recipe(lr=1)) == run_name(Recipe(lr=1.0)), "equal recipes have one name"


ACTIVATIONS = dict.fromkeys(METHODS, CenteredSoftplus) | {"softplus_wd": nn.Softplus, "relu": nn.ReLU}


@pytest.mark.parametrize("model", ["resnet10", "mlp"])
@pytest.mark.parametrize("method", METHODS)
def test_each_method_has_its_net(method, model):
    net = build(Recipe(method=method, model=model, width=2, beta=3.0, gamma=4.0, softplus=7.0))
    activations = [m for m in net.modules() if isinstance(m, CenteredSoftplus | nn.Softplus | nn.ReLU)]
    assert {type(m) for m in activations} == {ACTIVATIONS[method]}
    trained, lipschitz = method in ("lcnn", "lcnn_gradreg", "minimal"), method in ("lcnn", "lcnn_gradreg")
    betas = [torch.as_tensor(m.beta).item() for m in activations if method != "relu"]
    assert betas == pytest.approx([7.0 if method == "softplus_wd" else 3.0 if trained else 1000.0] * len(betas))
    assert sum(name.endswith("log_beta") for name, _ in net.named_parameters()) == trained * len(activations)
    gammas = [m.gamma.item() for m in net.modules() if isinstance(m, LipschitzBatchNorm2d)]
    assert gammas == pytest.approx([4.0] * len(gammas))
    assert bool(gammas) == lipschitz
    kinds = {type(m) for m in net.modules()}
    assert (nn.BatchNorm2d in kinds) == (not lipschitz and model != "mlp")
    assert (OrdinaryBlock in kinds) == (method == "relu" and model == "resnet10")
    layers = [m for m in net.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    normed = [m for m in layers if nn.utils.parametrize.is_parametrized(m)]
    if model == "mlp":
        assert normed == (layers[:-1] if lipschitz else []), "its read-out is free"
    else:
        assert normed == (layers if lipschitz else [] if method == "relu" else layers[-1:])


@pytest.mark.parametrize("dataset", DATASETS)
def test_build_fits_the_dataset_and_is_drawn_from_the_seed_alone(dataset):
    """Logits of the right shape, and a finite gradient for every parameter."""
    shape, classes = {"moons": (2,), "digits": (1, 8, 8)}.get(dataset, (3, 32, 32)), {"moons": 2, "cifar100": 100}
    for method, model in itertools.product(("standard", "lcnn"), ("mlp",) if dataset == "moons" else MODELS):
        one = Recipe(dataset=dataset, method=method, model=model, width=2)
        net = build(one)
        logits = net(torch.rand(4, *shape))
        assert logits.shape == (4, classes.get(dataset, 10))
        logits.logsumexp(1).sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters()), one
    state = torch.get_rng_state()
    first, second, other = (build(dataclasses.replace(one, seed=seed)) for seed in (0, 0, 1))
    assert same_weights(first, second)
    assert not same_weights(first, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("method", METHODS)
def test_fields_that_mean_nothing_to_a_method(method):
    """A step with another value comes to the same net exactly where ``ONLY`` says so."""
    one = Recipe(method=method, width=1, lr=0.05, lambda_grad=1.0, lambda_cure=1.0, lambda_beta=1.0, lambda_gamma=1.0)
    x, y = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8)

    def trained(recipe):
        model = build(recipe).train()
        optimizer, _ = make_optimizer(recipe, model)
        training_step(recipe, model, optimizer, x, y, generator=torch.Generator().manual_seed(0))
        return model

    plain = trained(one)
    for field, methods in ONLY.items():
        other = trained(dataclasses.replace(one, **{field: OTHER[field] if field != "h" else 0.25}))
        assert same_weights(plain, other) == (method not in methods), field


def test_every_scale():
    assert set(METHODS) == set(OBJECTIVES)
    places = [(dataset, scale) for scale, table in SCALES.items() for dataset in table]
    for dataset, scale in places:
        recipes = [recipe(dataset, method, seed, scale) for method in METHODS for seed in (0, 7)]
        assert len({run_name(one) for one in recipes}) == len(recipes)
        assert all(dataclasses.replace(one, method="lcnn", seed=0) == recipe(dataset, "lcnn", 0, scale)
                   for one in recipes), "a scale treats all methods alike"  # fmt: skip
    one = recipe("cifar100", "lcnn_gradreg", scale="paper")  # paper §5 and the authors' code of 2022
    assert (one.model, one.width, one.epochs, one.schedule, one.augment) == ("resnet18", 64, 200, "steps", True)
    assert (one.lr, one.momentum, one.weight_decay, one.batch_size) == (0.1, 0.9, 5e-4, 128)
    assert (one.lambda_beta, one.lambda_gamma, one.lambda_grad, one.beta, one.gamma) == (1e-3, 1e-3, 6.1e-3, 5, 10)
    with pytest.raises(ValueError, match="unknown scale of digits 'paper'"):
        recipe("digits", "lcnn", scale="paper")
