"""The report of any classifier: the numbers of the functions underneath, and a reason for every one it lacks."""

import copy

import networks
import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torchvision import models

from lcnn_utils.attacks import curve_of, first_success, wilson
from lcnn_utils.curvature import certified_radius, geometry
from lcnn_utils.measurements import own_network
from lcnn_utils.measurements.own_network import report
from lcnn_utils.nn import mlp, refresh_statistics, softened
from lcnn_utils.saliency import stability

EPS = [0.05, 0.3]
ONCE = {"accuracy", "certified_radius", "curvature", "margin_curvature"}  # measures without ε


def case(seed: int = 0, n: int = 40, **options):
    """An MLP with some slope, images, and labels of which a few are not what it says."""
    torch.manual_seed(seed)
    net = mlp([16, 8, 3], **options)
    net[-1].weight.data *= 20
    x = torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    y = net(x).argmax(1)
    y[::7] = (y[::7] + 1) % 3
    return net, x, y


def rows(frame, measure: str) -> np.ndarray:
    return frame[frame.measure == measure][["value", "low", "high", "n"]].to_numpy(float)


def test_numbers_are_those_of_the_functions_underneath():
    """On the images that the report takes; C by the dense Hessian."""
    net, x, y = case(beta=5.0)
    frame = report(net, x, y, eps=EPS, images=20, curvature_images=9)
    assert list(frame[frame.measure == "robust_accuracy"].eps) == [0, *EPS]
    assert (frame.note[frame.n == 0] == "").all(), "everything can be measured of this net"
    right = int((net(x).argmax(1) == y).sum())
    np.testing.assert_allclose(rows(frame, "accuracy"), [[right / 40, *wilson(right, 40), 40]])
    index = own_network._spread(40, 20)
    xs, ys = x[index], y[index]
    curve = curve_of(first_success(net, xs, ys, EPS, steps=own_network.STEPS, batch_size=25), EPS)
    np.testing.assert_allclose(rows(frame, "robust_accuracy"), curve[["accuracy", "low", "high", "n"]])
    change = stability(net, (xs, ys), EPS, noise=["random"]).groupby("eps").relative_change.agg(["median", "size"])
    np.testing.assert_allclose(rows(frame, "relative_change")[:, [0, 3]], change, rtol=1e-4)
    radius = certified_radius(net, xs, ys)
    assert rows(frame, "certified_radius")[0, 0] == pytest.approx(np.median(radius), rel=1e-6)
    np.testing.assert_allclose(rows(frame, "certified_accuracy")[:, 0], [(radius > e).float().mean() for e in EPS])
    index = own_network._spread(40, 9)
    for measure, scalar in (("curvature", "loss"), ("margin_curvature", "margin")):
        exact = geometry(net, x[index], y[index], scalar=scalar, method="exact").curvature.median()
        value, low, high, n = rows(frame, measure)[0]
        assert value == pytest.approx(exact.item(), rel=own_network.TOLERANCE)
        assert low <= value <= high
        assert n == 9


@pytest.mark.parametrize(("n", "wanted"), [(7, 100), (100, 100), (1000, 100), (107, 25), (5, 1)])
def test_images_are_spread_evenly(n, wanted):
    """None twice, and of classes that follow each other as many as there are, to one."""
    index = own_network._spread(n, wanted)
    size = min(n, wanted)
    assert len(set(index.tolist())) == len(index) == size
    for classes in (2, 5):
        labels = np.arange(n) * classes // n
        taken = np.bincount(labels[index.numpy()], minlength=classes)
        assert (np.abs(taken - np.bincount(labels, minlength=classes) * size / n) <= 2).all()


def test_a_relu_is_read_as_a_sharp_softplus():
    """C is that of the same weights with β = 1000, all else that of the net itself, which stays as it was."""
    relu, x, y = case(activation=nn.ReLU)
    relu.train()
    sharp = mlp([16, 8, 3], beta=1000.0)
    sharp.load_state_dict(relu.state_dict(), strict=False)
    before = copy.deepcopy(relu)
    frame = report({"relu": relu, "sharp": sharp}, x, y, eps=EPS).set_index(["network", "measure"])
    for measure in ("curvature", "margin_curvature"):
        assert frame.value["relu", measure] == pytest.approx(frame.value["sharp", measure], rel=1e-4)
        assert "1000" in frame.note["relu", measure]
        assert "softplus" not in frame.note["sharp", measure]
    assert frame.n["relu", "certified_radius"] == 0
    assert "ReLU" in frame.note["relu", "certified_radius"]
    assert relu.training
    assert networks.same_weights(relu, before)


@pytest.mark.parametrize(
    ("name", "kinks"),
    [("resnet18", "MaxPool"), ("mobilenet_v2", ""),
     pytest.param("densenet121", "MaxPool, Relu", marks=pytest.mark.slow)],
)  # fmt: skip
def test_torchvision_nets(name, kinks, monkeypatch):
    """Their certificates are refused with a reason; which kinks are left is said."""
    monkeypatch.setattr(own_network, "PRODUCTS", 2)
    torch.manual_seed(0)
    net = getattr(models, name)(num_classes=3)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    x = torch.rand(4, 3, 64, 64)
    net(x)  # fills the running statistics: without them the logits vanish
    y = net.eval()(x).argmax(1)
    frame = report(net, x, y, eps=[0.1], images=2, curvature_images=1)
    lacking = frame[frame.n == 0]
    assert set(lacking.measure) == {"certified_radius", "certified_accuracy"}
    assert lacking.note.str.contains("no bound is known").all()
    assert np.isfinite(frame[frame.n > 0][["value", "low", "high"]].to_numpy()).all()
    note = frame.set_index("measure").note.curvature
    assert "read as softplus" in note
    assert f"kinks of {kinks};" in note if kinks else "kinks" not in note


def test_a_paired_test_against_the_first_network():
    (net, x, y), (other, _, _) = case(beta=5.0), case(seed=1, beta=0.5)
    frame = report({"a": net, "same": net, "b": other}, x, y, eps=EPS, images=40).set_index(["network", "measure"])
    assert frame.p["a"].isna().all()
    assert (frame.p["same"] == 1).all()
    right, right_b = net(x).argmax(1) == y, other(x).argmax(1) == y
    only_b, only_a = int((right_b & ~right).sum()), int((right & ~right_b).sum())
    p = stats.binomtest(only_b, only_a + only_b).pvalue
    assert frame.p["b", "accuracy"].item() == pytest.approx(p)


class Cubes(nn.Module):
    def forward(self, x):
        return networks.Once.apply(x.flatten(1)[:, :3])


def test_what_can_not_be_measured_has_a_reason():
    """No second derivatives, no bound, and a net that is never right; the rest is there."""
    _, x, _ = case()
    net = Cubes()
    wrong = (net(x).argmax(1) + 1) % 3
    frame = report({"first": net, "again": net}, x, wrong, eps=EPS)
    assert (frame.p.isna() == ((frame.network == "first") | (frame.n == 0))).all()
    frame = frame[frame.network == "again"]
    lacking = frame[frame.n == 0].set_index("measure")
    assert set(lacking.index) == {*(ONCE - {"accuracy"}), "certified_accuracy", "relative_change"}
    assert lacking.value.isna().all()
    assert "differentiate" in lacking.note.curvature
    assert "right about 0" in lacking.note.relative_change
    assert rows(frame, "robust_accuracy")[:, 0].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [(dict(y=torch.full((40,), 3)), "labels"), (dict(x=2 * torch.ones(40, 1, 4, 4)), "outside"),
     (dict(x=torch.full((40, 1, 4, 4), torch.nan)), "outside"), (dict(y=torch.zeros(39).long()), "labels"),
     (dict(eps=[0.0]), "eps"), (dict(eps=[]), "eps"), (dict(nets=nn.Linear(3, 3)), "does not take"),
     (dict(nets={"a": "net"}), "nn.Module")],
)  # fmt: skip
def test_bad_input_is_raised(change, message):
    net, x, y = case()
    with pytest.raises(ValueError, match=message):
        report(**{"nets": net, "x": x, "y": y} | change)


def test_points_have_no_box():
    torch.manual_seed(0)
    net = mlp([2, 8, 2], beta=5.0)
    x = 3 * torch.randn(30, 2)
    frame = report(net, x, net(x).argmax(1), eps=EPS)
    assert (frame.n > 0).all()
    assert set(frame[frame.eps.isna()].measure) == ONCE


def test_softening_reports_softened_nets_with_both_statistics():
    net, x, y = networks.case("relu", n=10)
    before = copy.deepcopy(net)
    frame = own_network.softening(net, x, y, (1.0, 100.0), train=x, images=3)
    assert frame.beta.unique().tolist() == [100, 1]
    soft = softened(net, 1.0)
    for statistics, model in (("as trained", copy.deepcopy(soft)), ("measured again", refresh_statistics(soft, x))):
        part = frame[(frame.beta == 1) & (frame.statistics == statistics)]
        alone = report(model, x, y, eps=[0.25], images=3, certify=False)
        assert part.value.tolist() == pytest.approx(alone[alone.eps != 0].value.tolist())
    again = frame.statistics == "measured again"
    assert frame[again].value.tolist() != frame[~again].value.tolist()
    assert networks.same_weights(net, before)
    assert set(own_network.softening(net, x, y, (1.0,), images=3).statistics) == {"as trained"}
    with pytest.raises(ValueError, match="nothing to soften"):
        own_network.softening(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), x, y)


def test_a_net_too_sure_of_itself_is_not_called_flat():
    """Where ‖∇ℓ‖ vanishes beside ε, C of the loss is 0 whatever the net; that of the margin does not change."""
    net, x, y = case(beta=5.0)
    frame = report(
        {k: nn.Sequential(net, networks.Scale(k)) for k in (1, 100)}, x, y, eps=EPS, certify=False
    ).set_index(["network", "measure"])
    assert frame.value[100, "margin_curvature"] == pytest.approx(frame.value[1, "margin_curvature"], rel=1e-2)
    assert frame.n[100, "curvature"] < frame.n[1, "curvature"] == 25
    assert "too sure" in frame.note[100, "curvature"]


@pytest.mark.parametrize("kinked", [nn.PReLU(), nn.RReLU(), nn.Threshold(0, 0), nn.Hardtanh()])
def test_kinks_are_named(kinked):
    net, x, y = case()
    frame = report(nn.Sequential(net[:2], kinked, net[-1]), x, y, eps=EPS, images=4, certify=False)
    assert "does not see the kinks" in frame.set_index("measure").note.curvature
