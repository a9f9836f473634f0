"""What notebook 06 measures: means and intervals by hand, and what is there on a bare machine."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from lcnn_utils import data
from lcnn_utils.curvature import geometry
from lcnn_utils.experiments import append, claims, measured, published
from lcnn_utils.figures.style import METHOD
from lcnn_utils.measurements import saliency as measurements
from lcnn_utils.nn import mlp
from lcnn_utils.saliency import stability
from lcnn_utils.training import recipe

CPU = torch.device("cpu")


def test_scene_needs_no_download(store, monkeypatch, tmp_path):
    monkeypatch.setenv("LCNN_DATA", str(tmp_path / "no data"))
    monkeypatch.setattr(data, "fetch", lambda *_, **__: pytest.fail("it wanted to download"))
    scene = measurements.scene(CPU, ("standard", "lcnn"))
    assert (scene.dataset, list(scene.nets)) == ("digits", ["standard", "lcnn"])
    assert scene.x.shape == (360, 1, 8, 8)
    known = scene.first(50).correct()
    assert 40 < len(known.x) == len(known.y)
    for net in scene.nets.values():
        assert (net(known.x).argmax(1) == known.y).all()


@pytest.mark.parametrize(("on_disk", "shipped"), [(True, True), (True, False), (False, True)])
def test_scene_takes_cifar10_where_it_costs_nothing(monkeypatch, on_disk, shipped):
    monkeypatch.setattr(data, "available", lambda: {"cifar10": "/somewhere" if on_disk else "missing"})
    monkeypatch.setattr(measurements, "shipped", lambda recipes: shipped and len([*recipes]) == 1)
    monkeypatch.setattr(measurements, "samples", lambda *_: (torch.zeros(3, 1, 2, 2), torch.zeros(3).long()))
    monkeypatch.setattr(measurements, "trained_net", lambda recipe, device: recipe)
    monkeypatch.setattr(data, "load", lambda *_: data.Images)
    monkeypatch.setattr(data.Images, "classes", data.TEN_DIGITS, raising=False)
    scene = measurements.scene(CPU, ("cure",))
    expected = "cifar10" if on_disk and shipped else "digits"
    assert scene.nets == {"cure": recipe(expected, "cure")}


def test_frames_have_the_curvature_of_each_image():
    """Of the same scalar, and of those images alone that the net gets right."""
    torch.manual_seed(0)
    net = mlp([16, 6, 3], beta=5.0).eval()
    x = torch.rand(6, 1, 4, 4)
    y = net(x).argmax(1)
    y[[0, 3]] = (y[[0, 3]] + 1) % 3  # it is wrong about these
    options = dict(eps_grid=[0.01], noise=["random"], scalar="margin")
    frame = measurements.nets_frame({"lcnn": net}, x, y, **options)
    assert frame.image.tolist() == [1, 2, 4, 5]
    curvature = geometry(net, x, y, scalar="margin").curvature[frame.image.tolist()]
    np.testing.assert_allclose(frame.curvature, curvature, rtol=1e-5)
    same = stability(net, (x, y), **options)
    pd.testing.assert_frame_equal(frame[same.columns], same)


def stable():
    """Two nets, ten images, two seeds, two lengths, both kinds of noise; and rows that must not count."""
    values = np.random.default_rng(0).uniform(0.5, 1.5, size=(2, 2, 2, 2, 10))
    rows = []
    for (net, seed, eps, noise, image), value in np.ndenumerate(values):
        about = dict(net=("standard", "lcnn")[net], seed=seed, image=image, curvature=40 - 30 * net + image)
        about |= dict(noise=("random", "worst")[noise], eps=(0.01, 0.1)[eps], weights="trained", method="gradient")
        about["label"] = METHOD[about["net"]][0]
        rows.append(about | {"relative_change": value * about["eps"] * (4 - 3 * net) * (1 + noise)})
        rows += [about | {"weights": "random", "relative_change": 9.0}, about | {"method": "x", "relative_change": 9.0}]
    return pd.DataFrame(rows)


def by_seed(net, noise, images=range(10)):
    """Means over images of each seed."""
    frame = stable().query(f"net == '{net}' and noise == '{noise}' and eps == 0.1 and weights == 'trained'")
    frame = frame[(frame.method == "gradient") & frame.image.isin(images)]
    return frame.groupby("seed").relative_change.mean().to_numpy()


def test_lines_are_means_over_images_then_seeds():
    points = measurements.lines(stable()).set_index(["net", "noise", "eps"])
    assert (points.images == 10).all()
    assert (points.seeds == 2).all()
    assert points.theory["lcnn", "worst", 0.1] == pytest.approx(0.1 * 14.5), "ε times mean C"
    worst = points.loc[("lcnn", "worst", 0.1)]
    assert worst.value == pytest.approx(stats.gmean(by_seed("lcnn", "worst")))
    assert worst.low < worst.value < worst.high


def test_the_ratio_is_the_claims(results):
    """Of images that only one net gets right nothing is known: notebook 8's claim takes the same images."""
    frame = stable().assign(eps=lambda frame: frame.eps / 10)
    frame = frame[(frame.image < 8) | (frame.net == "standard")]
    ratios = measurements.stability_ratio(frame, 0.01).set_index("net")
    assert ratios.ratio["standard"] == 1
    changes = [by_seed(net, "random", range(8)) for net in ("standard", "lcnn")]
    assert ratios.ratio["lcnn"] == pytest.approx(stats.gmean(changes[0]) / stats.gmean(changes[1]))
    append(frame, "digits_stability", {})
    stored = measurements.stability_ratio(measured("digits_stability"), 0.01).set_index("net").loc["lcnn"]
    claimed = claims("digits").set_index("claim").loc["LCNN's gradients are more stable than Standard's"]
    assert stored[["ratio", "low", "high"]].tolist() == claimed[["ours", "low", "high"]].tolist()


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_paper_lines_are_the_published_numbers(dataset):
    rows = published("paper gradient-robustness figure").query(f"dataset == '{dataset}'")
    frame = measurements.paper_lines(dataset)
    assert frame.iloc[:, :3].to_numpy().tolist() == rows[["method", "epsilon", "mean"]].to_numpy().tolist()
    assert set(frame.label) == {METHOD[m][0] for m in measurements.PAPER_NETS}
    lines = dict(zip(frame.label, frame.theory / frame.eps, strict=True))
    assert lines["Standard"] == pytest.approx({"cifar10": 173.5, "cifar100": 270.89}[dataset])
    gap = (frame.theory / frame.value)[frame.eps == 0.001]
    assert gap.between(18, 35).all(), "how far the figure's curves begin below its dashed lines"
