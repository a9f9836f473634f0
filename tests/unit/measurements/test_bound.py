"""The measurements of notebook 03 against closed forms, sums by hand and the exact geometry, in float64."""

import copy
import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from networks import Scale, same_weights
from torch import nn

from lcnn_utils.curvature import curvature_bound, geometry, layer_terms, local_bound, normalised_bound
from lcnn_utils.measurements import bound as measurements
from lcnn_utils.nn import CenteredSoftplus, LipschitzBatchNorm2d, mlp


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def norm(matrix: torch.Tensor) -> float:
    return torch.linalg.matrix_norm(matrix, 2).item()


def lcnn(sizes=(2, 6, 5, 2), seed: int = 1) -> nn.Module:
    return measurements.scramble(mlp(sizes, lcnn=True), seed)


def test_scramble_leaves_nothing_at_its_default_and_depends_on_the_seed_alone():
    def every_kind():
        first = [nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), CenteredSoftplus(), LipschitzBatchNorm2d(3, affine=True)]
        return nn.Sequential(*first, nn.Flatten(), nn.Linear(12, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    model = every_kind()
    default = copy.deepcopy(model.state_dict())
    measurements.scramble(model, 3)
    other = measurements.scramble(every_kind(), 3)  # had other weights
    for name, value in model.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert (value != default[name].double()).all(), name
            torch.testing.assert_close(other.state_dict()[name], value, rtol=0, atol=0)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(("seed", "scalar"), [(0, "margin"), (2, "margin"), (5, "logit")])
def test_audit_against_the_exact_geometry(seed, scalar):
    model = measurements.random_mlp(seed)
    d, y = model[1].in_features, torch.arange(3) % model[-1].out_features
    x = normal(3, d, seed=seed)
    frame = measurements.audit(model, x, y, scalar)
    exact = geometry(model, x, y, scalar=scalar, method="exact")
    np.testing.assert_array_equal(frame[["gradient", "hessian"]].T, [exact.grad_norm, exact.hessian_norm])
    np.testing.assert_allclose(frame.curvature, frame.hessian / frame.gradient)
    np.testing.assert_allclose(frame.local, local_bound(model, x, y, scalar=scalar))
    bound, kappa = normalised_bound(model, x, y, scalar=scalar)
    np.testing.assert_allclose(frame[["normalised", "kappa"]].T, [bound, kappa.amax(1)])
    assert (frame.data_free == curvature_bound(model, (d,), scalar=scalar)).all()
    slope, published, times_units = 1.0, 0.0, 0.0  # the published sums, by hand
    for layer in model:
        if isinstance(layer, nn.Linear):
            weight = layer.weight
        if isinstance(layer, LipschitzBatchNorm2d):
            weight = (layer.running_var + layer.eps).rsqrt().clamp(max=layer.gamma)[:, None] * weight
        if isinstance(layer, CenteredSoftplus):
            slope *= norm(weight)
            published += layer.beta.item() * slope
            times_units += layer.beta.item() * slope * len(weight)
    np.testing.assert_allclose(frame[["published", "published_widths"]], [[published, times_units]] * 3)


def test_certificates_of_a_line():
    line = nn.Sequential(nn.Linear(2, 2)).double()  # logits (0, 3x₁ + 4x₂ − 2.5)
    line[0].weight.data = torch.tensor([[0.0, 0.0], [3.0, 4.0]]).double()
    line[0].bias.data = torch.tensor([0.0, -2.5]).double()
    x, y = torch.tensor([[0.5, 0.5], [0.9, 0.5], [0.2, 0.1], [0.4, 0.9]]).double(), torch.tensor([1, 1, 0, 0])
    frame = measurements.certificates({"line": line}, x, y, steps=12, restarts=1)
    distances = [0.2, 0.44, 0.3, 0.0]  # 0 where the net is wrong
    np.testing.assert_allclose(frame.certified, distances, rtol=1e-6)
    np.testing.assert_allclose(frame.attacked, distances, rtol=5e-3)
    assert (frame.attacked >= frame.certified).all()


def test_a_linear_net_is_logistic_regression():
    """At its optimum the gradient of Σ loss + ‖W‖²/2 is 0 (scikit-learn's C = 1; the intercept is free)."""
    x, y = normal(60, 1, 2, 2), torch.arange(60) % 3
    net = measurements.linear_net(x, y).double()
    (F.cross_entropy(net(x), y, reduction="sum") + net[1].weight.square().sum() / 2).backward()
    assert net[1].weight.grad.abs().max() < 0.02
    assert net[1].bias.grad.abs().max() < 0.02


def test_robust_accuracy_and_its_table_by_hand():
    radii = dict(certified=[0, 0.1, 0.3, 0.4, 0, 0.2], attacked=[0, 0.3, math.inf, 0.5, 0.1, 0.3])
    frame = pd.DataFrame(dict(net=list("bbbbaa"), seed=[0, 0, 1, 1, 0, 0], **radii))
    shares = measurements.robust_accuracy(frame, (0, 0.2, 1.0)).set_index(["net", "seed", "eps"]).sort_index()
    expected = {("b", 0): [(0.5, 0.5), (0, 0.5), (0, 0)], ("b", 1): [(1, 1), (1, 1), (0, 0.5)]}
    expected |= {("a", 0): [(0.5, 1), (0, 0.5), (0, 0)]}  # (certified, attacked) longer than each ε
    for (net, seed), rows in expected.items():
        np.testing.assert_array_equal(shares.loc[(net, seed), ["certified", "attacked"]], rows)
    table = measurements.certified_table(frame, [0.2]).set_index("net")
    means = table.map(lambda text: [float(part.split(" ± ")[0]) for part in text.rstrip(")").split(" (")])
    assert means.loc["b"].tolist() == [[75.0], [50.0, 75.0]]
    assert means.loc["a"].tolist() == [[100.0], [0.0, 50.0]]


@pytest.mark.parametrize("layer", ["3", "6"])
@pytest.mark.parametrize(("beta", "factor"), [(0.37, 0.1), (30.0, 7.0)])
def test_a_changed_layer_is_the_net_changed_by_hand(layer, beta, factor):
    model, x = lcnn(seed=8), normal(5, 2, seed=5)
    model[2].gamma, model[5].gamma = 1.0, 1.0  # cuts off some channels and not others
    y = model(x).argmax(1)
    y[[1, 4]] = 1 - y[[1, 4]]
    before = copy.deepcopy(model)
    changed = measurements.slope_scaled(model, layer, beta, factor).train()
    numbers = measurements.layer_numbers(changed, x, y)
    assert changed.training, "left as it was"
    assert same_weights(model, before)
    by_hand, number = copy.deepcopy(model), int(layer)
    by_hand[number].beta = beta
    by_hand[number - 1] = nn.Sequential(by_hand[number - 1], Scale(factor))
    exact = geometry(by_hand, x, y, scalar="margin", method="exact")
    assert numbers["truth"] == pytest.approx(exact.hessian_norm.max().item(), rel=1e-5)
    assert numbers["accuracy"] == pytest.approx((by_hand(x).argmax(1) == y).double().mean().item())
    assert numbers["local"] == local_bound(changed.eval(), x, y).max().item()
    terms = layer_terms(model, (2,)).set_index("layer").contribution
    scale = beta / model.get_submodule(layer).beta.item()
    if layer == "3":  # its slope is squared in both terms; that of "6" enters the first term once
        expected = terms["3"] * scale * factor**2 + terms["6"] * factor**2
    else:
        expected = terms["3"] * factor + terms["6"] * scale * factor**2
    assert numbers["bound"] == pytest.approx(expected, rel=1e-5)
