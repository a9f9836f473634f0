"""The explorer of notebook 03: what it says and draws equals what is measured on a net changed by hand."""

import copy
import itertools
import math
import re

import numpy as np
import pytest
import torch
from test_explorers import ends, numbers, parts, pixels
from torch import nn

from lcnn_utils import explorers
from lcnn_utils import nn as models
from lcnn_utils.curvature import bounds, geometry
from lcnn_utils.widgets import bound as module
from lcnn_utils.measurements import bound as measurements
from lcnn_utils.training import accuracy


@pytest.fixture(autouse=True)
def seen(monkeypatch):
    """The pictures made by a test; ``CONTROLS`` starts empty."""
    pictures: list[explorers.Picture] = []

    class Seen(explorers.Picture):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            pictures.append(self)

    monkeypatch.setattr(module, "Picture", Seen)
    monkeypatch.setattr(explorers, "CONTROLS", [])
    return pictures


def net() -> nn.Module:
    """βs of 2 and 7, slopes about 1."""
    torch.manual_seed(0)
    model = models.mlp([2, 6, 5, 2], lcnn=True).eval()
    model[3].beta, model[6].beta = 2.0, 7.0
    for layer, seed in ((model[2], 1), (model[5], 2)):
        generator = torch.Generator().manual_seed(seed)
        layer.running_mean.copy_(torch.randn(layer.num_features, generator=generator) / 3)
        layer.running_var.copy_(0.5 + torch.rand(layer.num_features, generator=generator))
    return model


MODEL = net()
X = torch.randn((15, 2), generator=torch.Generator().manual_seed(3))
Y = MODEL(X).argmax(1)
Y[:3] = 1 - Y[:3]


def explorer():
    return parts(module.layer_explorer(MODEL, X, Y))


def changed(layer: str, beta: float, slope: float) -> nn.Module:
    """The same net by hand: β set, and torch's BatchNorm, whose weight is ``slope``, for the γ-BatchNorm before it."""
    layers = list(copy.deepcopy(MODEL))
    layers[int(layer)].beta = beta
    old = layers[int(layer) - 1]
    assert old.lipschitz_constant() < old.gamma, "γ cuts nothing off here"
    layers[int(layer) - 1] = new = nn.BatchNorm1d(old.num_features)
    new.running_mean, new.running_var = old.running_mean, old.running_var
    new.weight.data.fill_(slope)
    return nn.Sequential(*layers).eval()


NUMBER = {"3": "1", "6": "2"}  # activations are numbered
ENDS = [("3", 4.0, 1.0), *itertools.product(("3", "6"), (0.01, 1000.0), module.SLOPES)]


def test_every_control_moved_to_both_ends_changes_the_picture_and_back():
    controls, image, text = explorer()
    assert [(control, image) for control in controls] == explorers.CONTROLS
    assert ends(controls[2]) == pytest.approx(module.SLOPES)
    first, words = pixels(image), text.value
    for control in controls:
        start = control.value
        for value in [*(value for value in ends(control) if value != start), start]:
            before, said = image.value, text.value
            control.value = value
            assert image.value != before, f"{control.description} at {value}"
            assert text.value != said
            assert pixels(image).shape == first.shape
    np.testing.assert_array_equal(pixels(image), first)
    assert text.value == words


def test_the_numbers_in_the_text_and_nothing_leaves_the_picture(seen):
    (chosen, sharpness, factor), _, text = explorer()
    left, right = seen[0].canvas.figure.axes
    trained, seen_hits = bounds.curvature_bound(MODEL, (2,)), set()
    for layer, beta, slope in ENDS:
        chosen.value = NUMBER[layer]
        sharpness.value, factor.value = beta, slope
        model = changed(layer, beta, slope)
        now = bounds.curvature_bound(model, (2,))
        terms = bounds.layer_terms(model, input_shape=(2,)).set_index("layer").contribution
        truth = geometry(model, X, Y, scalar="margin", method="exact").hessian_norm.max().item()
        share, ratio, hits = numbers(text)
        assert float(share.rstrip("%")) == pytest.approx(100 * terms[layer] / now, abs=0.51)
        assert float(ratio) == pytest.approx(now / truth, rel=1e-2)
        assert hits == f"{accuracy(model, X, Y):.1%}"
        seen_hits.add(hits)
        low, high = right.get_xlim()
        assert all(low < x < high for x in right.lines[1].get_xdata()), (layer, beta, slope)
        low, high = left.get_ylim()
        assert all(low <= bar.get_height() < high for bar in left.containers[1]), (layer, beta, slope)
        plain = re.search(
            r"Activation (\d): .* of the bound (\S+) \(as trained (\S+)\), .* of the points, (\S+)\. Acc", text.value
        )
        assert plain[1] == NUMBER[layer]
        assert [float(value) for value in plain.groups()[1:]] == pytest.approx([now, trained, truth], rel=1e-2)
    assert len(seen_hits) > 1, "the settings change what the net says"


@pytest.mark.parametrize(("layer", "beta", "slope"), [("6", 30.0, 0.5)])
def test_bars_and_dots_are_what_is_measured(layer, beta, slope, seen):
    (chosen, sharpness, factor), _, _ = explorer()
    chosen.value = NUMBER[layer]
    sharpness.value, factor.value = beta, slope
    model, names = changed(layer, beta, slope), ["3", "6"]
    left, right = seen[0].canvas.figure.axes
    now = bounds.layer_terms(model, input_shape=(2,)).set_index("layer").contribution[names]
    then = bounds.layer_terms(MODEL, input_shape=(2,)).set_index("layer").contribution[names]
    grey, moving = left.containers
    np.testing.assert_allclose([bar.get_height() for bar in grey], then, rtol=1e-6)
    np.testing.assert_allclose([bar.get_height() for bar in moving], now, rtol=1e-5)
    assert [text.get_text() for text in left.get_xticklabels()] == ["1", "2"]
    for line, net_ in zip(right.lines, (MODEL, model), strict=True):
        expected = [
            bounds.curvature_bound(net_, (2,)),
            bounds.local_bound(net_, X, Y).max().item(),
            geometry(net_, X, Y, scalar="margin", method="exact").hessian_norm.max().item(),
        ]
        np.testing.assert_allclose(line.get_xdata(), expected, rtol=1e-4)
        assert list(line.get_ydata()) == [0, 1, 2]
    assert [bar.get_linewidth() > 0 for bar in moving] == [name == layer for name in names], "the chosen one is marked"
    assert left.get_yscale() == right.get_xscale() == "log"
    assert left.get_ylabel()
    assert right.get_xlabel()
    assert list(seen[0].moving) == [*moving, right.lines[1]]


def test_another_layer_starts_as_trained():
    (layer, beta, slope), image, text = explorer()
    first, words = pixels(image), text.value
    beta.value, slope.value = 100.0, 0.2
    layer.value = "2"
    assert beta.value == pytest.approx(7.0)
    assert slope.value == 1.0
    (other, _, _), other_image, other_text = explorer()
    other.value = "2"
    assert text.value == other_text.value
    np.testing.assert_array_equal(pixels(image), pixels(other_image))
    bound = measurements.layer_numbers(MODEL, X, Y)["bound"]
    assert f"of the bound {bound:.3g} (as trained {bound:.3g})" in text.value
    beta.value = 0.3
    layer.value = "1"
    assert beta.value == pytest.approx(2.0)
    np.testing.assert_array_equal(pixels(image), first)
    assert text.value == words


def test_a_model_in_training_mode_is_not_changed_and_read_in_eval_mode():
    model = copy.deepcopy(MODEL).train()
    before = copy.deepcopy(model.state_dict())
    (_, beta, _), _, text = parts(module.layer_explorer(model, X, Y))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module_.training for module_ in model.modules())
    assert text.value == explorer()[2].value
    beta.value = 9.0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_net_without_any_curvature_left_at_the_points():
    """A sharp step far from all points: every φ″ is 0 in float32."""
    torch.manual_seed(0)
    model, x = models.mlp([2, 4, 2], lcnn=True).eval(), torch.tensor([[3.0, 1.0], [-2.0, 2.0]])
    (_, beta, slope), _, text = parts(module.layer_explorer(model, x, torch.tensor([0, 1])))
    beta.value, slope.value = 1000.0, module.SLOPES[1]
    assert "nan" not in text.value
    assert math.isfinite(float(numbers(text)[0].rstrip("%")))
