"""The measurements of notebook 09, against what each is made of."""

import copy

import pytest
import torch
from networks import case, means_of_digits
from torch import nn

from lcnn_utils.attacks import pgd
from lcnn_utils.curvature import geometry
from lcnn_utils.measurements import own_network as measurements
from lcnn_utils.nn import refresh_statistics, softened

QUANTITIES = ["accuracy", "robust", "curvature", "margin_curvature", "change"]


def test_qualities_against_their_definitions():
    net, x, y = case(family="mlp", n=30)
    frame = measurements.qualities(net.train(), x, y, eps=0.5, images=7).set_index("quantity")
    assert net.training
    net.eval()
    assert list(frame.index) == QUANTITIES
    assert frame.n.tolist() == [30, 7, 7, 7, 7]
    x7, y7 = x[:7], y[:7]
    predicted = net(x7).argmax(1)
    share = lambda images, labels: (net(images).argmax(1) == labels).double().mean().item()
    assert frame.value.accuracy == pytest.approx(share(x, y))
    assert frame.value.robust <= share(pgd(net, x7, y7, 0.5), y7)
    for column, scalar in (("curvature", "loss"), ("margin_curvature", "margin")):
        exact = geometry(net, x7, y7, scalar=scalar, method="exact").curvature
        assert frame.value[column] == pytest.approx(exact.mean().item(), rel=0.02)
    most = 0.1 * geometry(net, x7, predicted, method="exact").curvature
    assert 0 < frame.value.change < 2 * most.mean()
    assert ((frame.low <= frame.value) & (frame.value <= frame.high)).all()


def test_several_nets_have_a_mean_and_a_range():
    linear, test = means_of_digits()
    x, y = test.float(), test.y
    other = copy.deepcopy(linear)
    other[1].bias.data.zero_()
    frames = [measurements.qualities(net, x, y, images=5).set_index("quantity") for net in (linear, other)]
    both = measurements.qualities([linear, other], x, y, images=5).set_index("quantity")
    values = [frame.value for frame in frames]
    assert both.value.tolist() == pytest.approx(((values[0] + values[1]) / 2).tolist())
    assert both.low.accuracy == min(value.accuracy for value in values)
    assert both.high.accuracy == max(value.accuracy for value in values)


def test_softening_measures_softened_nets_with_both_statistics():
    net, x, y = case("relu", n=10)
    before = copy.deepcopy(net.state_dict())
    frame = measurements.softening(net, x, y, (1.0, 100.0), train=x, images=3)
    assert frame.beta.unique().tolist() == [100, 1]
    soft = softened(net, 1.0)
    expected = {"as trained": copy.deepcopy(soft), "measured again": refresh_statistics(soft, x)}
    for statistics, model in expected.items():
        part = frame[(frame.beta == 1) & (frame.statistics == statistics)]
        assert part.value.tolist() == pytest.approx(measurements.qualities(model, x, y, images=3).value.tolist())
    again = frame.statistics == "measured again"
    assert frame[again].value.tolist() != frame[~again].value.tolist()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert set(measurements.softening(net, x, y, (1.0,), images=3).statistics) == {"as trained"}
    with pytest.raises(ValueError, match="nothing to soften"):
        measurements.softening(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), x, y)
