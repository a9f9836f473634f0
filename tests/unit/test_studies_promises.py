"""What notebooks 06 and 07 measure: by hand, on linear and quadratic nets, and on a bare machine."""

import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from lcnn_utils import data
from lcnn_utils import nn as models
from lcnn_utils.attacks import Headed, pgd, wilson
from lcnn_utils.curvature import geometry
from lcnn_utils.experiments import SHIPPED, published
from lcnn_utils.figures.style import METHOD
from lcnn_utils.saliency import MAPS, compare, explain, randomized, stability
from lcnn_utils.measurements import attacks, saliency
from lcnn_utils.measurements import saliency as scenes
from lcnn_utils.measurements.training import plus_minus
from lcnn_utils.training import recipe, run_name

CPU = torch.device("cpu")
needs_digits = pytest.mark.skipif(
    not all((SHIPPED / f"{run_name(recipe('digits', m))}.safetensors").exists() for m in scenes.PAPER_NETS),
    reason="no digits networks are shipped: data/checkpoints is empty",
)


def linear(weight, bias=None) -> nn.Module:
    """Logits W x + b of points (N, d)."""
    weight = torch.as_tensor(weight)
    net = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None).to(weight.dtype)
    net.weight.data.copy_(weight)
    if bias is not None:
        net.bias.data.copy_(torch.as_tensor(bias))
    return net


def half_plane() -> tuple[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A linear net of the square whose decision boundary is x₁ = ½, points, their labels, distances to the boundary."""
    x = torch.tensor([[0.45, 0.5], [0.6, 0.4], [0.2, 0.5], [0.9, 0.6], [0.48, 0.3], [0.7, 0.5]])
    y = torch.tensor([0, 1, 0, 1, 1, 1])  # the fifth is wrong
    return linear([[-6.0, 0.0], [6.0, 0.0]], [3.0, -3.0]), x, y, (x[:, 0] - 0.5).abs()


def images(n: int = 4) -> tuple[dict[str, nn.Module], torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    nets = {name: models.mlp([16, 6, 3], lcnn=name == "lcnn", beta=5.0).eval() for name in ("standard", "lcnn")}
    x = torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return nets, x, torch.arange(n) % 3


# ---- PGD's way ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("seed", range(3))
def test_path_of_a_point_that_stays_right(norm, seed):
    net, x, y, _ = half_plane()
    start = torch.Generator().manual_seed(seed)
    points = attacks.path(net, x[2:3], y[2:3], 0.2, norm=norm, steps=7, step_size=0.05, generator=start)
    assert points.shape == (9, 2), "x, the random start, seven steps"
    assert torch.equal(points[0], x[2])
    assert not points.requires_grad
    assert (net(points).argmax(1) == 0).all()
    order = 2 if norm == "l2" else math.inf
    assert (torch.linalg.vector_norm(points - x[2], order, dim=1) <= 0.2 * (1 + 1e-5)).all(), "inside the ball"
    lengths = torch.linalg.vector_norm(points[2:] - points[1:-1], order, dim=1)
    assert (lengths <= 0.05 * (1 + 1e-5)).all()
    assert (points[2:, 0] >= points[1:-1, 0] - 1e-6).all(), "it goes to the boundary, which is at larger x₁"


def test_path_ends_where_the_network_is_wrong():
    net, x, y, _ = half_plane()
    points = attacks.path(net, x[2:3], y[2:3], 0.4, steps=50, step_size=0.05)
    assert 3 <= len(points) < 52
    wrong = net(points).argmax(1) != y[2]
    assert wrong.tolist() == [False] * (len(points) - 1) + [True]
    found = pgd(net, x[2:3], y[2:3], 0.4, steps=50, step_size=0.05, box=None)
    torch.testing.assert_close(points[-1:], found)


def test_path_may_leave_the_unit_square_and_leaves_no_hook():
    net, y = linear([[-1.0, 0.0], [1.0, 0.0]]), torch.tensor([0])
    points = attacks.path(net, torch.tensor([[-3.0, 5.0]]), y, 1.0, steps=3)
    assert torch.equal(points[0], torch.tensor([-3.0, 5.0]))
    assert len(points) == 5
    assert not net._forward_pre_hooks
    with pytest.raises(ValueError, match="unknown norm"):
        attacks.path(net, torch.zeros(1, 2), y, 1.0, norm="l1")
    assert not net._forward_pre_hooks


# ---- what PGD leaves ---------------------------------------------------------------------------------------------


def test_step_size_frame():
    net, x, y, distance = half_plane()
    grid = (0.08, 0.15, 0.25)
    frame = attacks.step_size_frame(net, x, y, grid, steps=10, fixed=0.005)
    assert list(frame.columns) == ["rule", "eps", "accuracy"]
    rules = ["2ε, falling to 0", "2.5ε/10", "ε/10", "always 0.005"]
    assert list(dict.fromkeys(frame.rule)) == rules
    for rule in rules:
        assert frame[frame.rule == rule].eps.tolist() == list(grid)
    right = net(x).argmax(1) == y
    exact = np.array([(right & (distance > eps)).float().mean().item() for eps in grid])
    by_rule = {rule: part.accuracy.to_numpy() for rule, part in frame.groupby("rule")}
    for rule, left in by_rule.items():
        assert (left >= exact - 1e-6).all(), f"{rule}: no attack finds what is not there"
    for rule in rules[:2]:
        np.testing.assert_allclose(by_rule[rule], exact, err_msg=f"{rule} is enough for a linear net")
    assert (by_rule[rules[3]] > exact).any(), "ten steps of 0.005 don't get to the end of a ball of 0.25"


def test_margin_does_not_see_the_scale_of_logits_and_cross_entropy_may():
    """Float32's smallest number is 1e-45: cross-entropy of a logit gap above 104 has no gradient left."""
    net, x, y, distance = half_plane()
    frame = attacks.logit_scale_frame(net, x, y, 0.25, (1.0, 1e4), steps=10)
    assert {"loss", "scale", "eps", "accuracy", "low", "high"} <= set(frame.columns)
    assert [*zip(frame.loss, frame.scale, strict=True)] == [("ce", 1), ("ce", 1e4), ("margin", 1), ("margin", 1e4)]
    assert set(frame.eps) == {0.25}, "the clean accuracy is left out"
    exact = ((net(x).argmax(1) == y) & (distance > 0.25)).float().mean().item()
    ce, blind, *margin = frame.accuracy
    assert margin == pytest.approx([exact, exact])
    assert ce == pytest.approx(exact)
    assert blind > exact
    for row in frame.itertuples():
        assert (row.low, row.high) == pytest.approx(wilson(round(6 * row.accuracy), 6))


def test_scaled_logits_never_change_the_clean_decisions():
    net, x, y, _ = half_plane()
    frame = attacks.logit_scale_frame(net, x, y, 1e-4, (0.01, 1.0, 100.0), steps=1)
    assert frame.accuracy.tolist() == pytest.approx([5 / 6] * 6)


def seeds_frame(*shares, n: int = 1000, method: str = "lcnn", norm: str = "l2", eps: float = 0.1) -> pd.DataFrame:
    rows = []
    for seed, share in enumerate(shares):
        correct = round(share * n)
        about = dict(dataset="digits", method=method, label=METHOD[method][0], seed=seed, norm=norm, loss="margin")
        low, high = wilson(correct, n)
        rows.append(about | dict(eps=eps, correct=correct, n=n, accuracy=correct / n, low=low, high=high))
    return pd.DataFrame(rows)


def test_over_seeds_takes_the_wider_interval():
    (row,) = attacks.over_seeds(seeds_frame(0.5, 0.7)).itertuples()
    assert row.accuracy == pytest.approx(0.6)
    assert (row.low, row.high) == pytest.approx((0.4, 0.8)), "mean ± 2·0.1, the standard error of two seeds"
    (row,) = attacks.over_seeds(seeds_frame(0.6, 0.6)).itertuples()
    assert (row.low, row.high) == pytest.approx(wilson(1200, 2000)), "of all images together"
    (row,) = attacks.over_seeds(seeds_frame(0.3)).itertuples()
    assert (row.low, row.high, row.seeds) == pytest.approx((*wilson(300, 1000), 1))
    (row,) = attacks.over_seeds(seeds_frame(0.02, 0.9, 0.99)).itertuples()
    assert (row.low, row.high, row.seeds) == pytest.approx((0.0178, 1.0, 3), abs=1e-3), "shares end at 1"
    (row,) = attacks.over_seeds(seeds_frame(0.0, 0.9)).itertuples()
    assert (row.low, row.high) == (0, 1)


def test_over_seeds_keeps_methods_norms_and_lengths_apart():
    settings = [(m, norm, eps) for m in ("standard", "lcnn") for norm in ("l2", "linf") for eps in (0.0, 0.1)]
    parts = [
        seeds_frame(0.1 * i, 0.1 * i + 0.05, method=m, norm=norm, eps=eps) for i, (m, norm, eps) in enumerate(settings)
    ]
    frame = attacks.over_seeds(pd.concat(parts))
    expected = ["dataset", "method", "label", "norm", "eps", "accuracy", "low", "high", "seeds"]
    assert list(frame.columns) == expected
    assert [*zip(frame.method, frame.norm, frame.eps, strict=True)] == settings
    assert frame.accuracy.tolist() == pytest.approx([0.1 * i + 0.025 for i in range(8)])
    assert ((frame.low <= frame.accuracy) & (frame.accuracy <= frame.high)).all()


def test_table():
    parts = [seeds_frame(0.90, 0.92, eps=0.0), seeds_frame(0.5, 0.7, eps=0.1), seeds_frame(0.8, norm="linf", eps=0.1)]
    parts += [seeds_frame(0.3, eps=0.1, method="minimal")]
    table = attacks.table(pd.concat(parts), (0, 0.1, 0.7))
    assert list(table.columns) == ["net", "clean", "ε = 0.1", "ε = 0.7"]
    assert table.net.tolist() == ["LCNN", "Minimal recipe"]
    paper = published("paper table 2")
    (theirs,) = paper[(paper.method == "LCNN") & (paper.epsilon == 0.1)]["mean"]
    (clean,) = paper[(paper.method == "LCNN") & (paper.epsilon == 0)]["mean"]
    assert table.loc[0, "clean"] == f"{plus_minus(pd.Series([90.0, 92.0]))} ({clean:.1f})" == "91.0 ± 1.4 (77.2)"
    assert table.loc[0, "ε = 0.1"] == f"60 ± 14 ({theirs:.1f})", "of L2 only"
    assert table.loc[1, "ε = 0.1"] == "30 (–)", "the paper has no such net"
    assert table.loc[0, "ε = 0.7"] == "– (–)"


def test_paper_table():
    frame = attacks.paper_table()
    assert list(frame.columns) == ["label", "eps", "accuracy", "spread"]
    assert not frame.isna().any(axis=None)
    wide = frame.pivot(index="label", columns="eps", values="accuracy")
    assert list(wide.columns) == [0, *attacks.PAPER_EPS]
    assert wide.notna().all(axis=None)
    assert (wide.diff(axis=1).iloc[:, 1:] < 0).all(axis=None), "a larger ε leaves less"
    assert wide.loc["Standard", 0.2] == 16.11


# ---- is it to be believed ----------------------------------------------------------------------------------------


def test_masking_table_marks():
    rows = [("one step", 0.5, 0.4, True), ("longer", 0.1234, 0.4, False), ("ce", 0.25, 0.4, None)]
    columns = ["check", "value", "standard", "passed"]
    first = pd.DataFrame(rows, columns=columns).assign(net="LCNN")
    second = pd.DataFrame([("one step", 0.0, 0.7, False), ("longer", 1.0, 0.7, np.True_), ("ce", 0.3, 0.7, np.nan)],
                          columns=columns).assign(net="A net")  # fmt: skip
    table = attacks.masking_table(pd.concat([first, second], ignore_index=True))
    name, *nets = table.columns
    assert nets == ["LCNN", "A net"], "in the order of the frame"
    assert name == "accuracy left, or share, in %"
    assert table[name].tolist() == ["PGD, 20 steps (what is checked)", "one step", "longer", "ce"]
    assert table["LCNN"].tolist() == ["40.0", "50.0 ✓", "12.3 ✗", "25.0"]
    assert table["A net"].tolist() == ["70.0", "0.0 ✗", "100.0 ✓", "30.0"]


def test_masking_frame_tries_the_first_other_net():
    net, x, y, _ = half_plane()
    other = linear([[-1.0, 0.2], [1.0, -0.2]], [0.4, -0.4])
    frame = attacks.masking_frame({"standard": net, "lcnn": other, "cure": net}, x, y, 0.1, steps=2)
    assert list(dict.fromkeys(frame.net)) == ["Standard", "LCNN", "CURE"]
    assert frame.groupby("method", sort=False).other.first().to_dict() == {
        "standard": "LCNN",
        "lcnn": "Standard",
        "cure": "Standard",
    }
    sizes = frame.groupby("method").size()
    assert sizes.nunique() == 1
    assert frame.check.str.contains("another net").sum() == 3
    table = attacks.masking_table(frame)
    assert len(table) == sizes.iloc[0] + 1
    assert table.notna().all(axis=None)


# ---- how much maps jump ------------------------------------------------------------------------------------------


class Quadratic(nn.Module):
    """Logits (½ xᵀA x, 0), so that the Hessian of the first is A everywhere."""

    def __init__(self, a: torch.Tensor) -> None:
        super().__init__()
        self.a = nn.Parameter(a)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        first = 0.5 * torch.einsum("ni,ij,nj->n", x, self.a, x)
        return torch.stack([first, 0 * first], 1)


def test_random_meets_against_a_known_hessian():
    a = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a = a + a.mT
    x = torch.rand(3, 1, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    frame = saliency.random_meets(Quadratic(a), x, torch.zeros(3, dtype=torch.long), directions=2000, scalar="logit")
    assert list(frame.columns) == ["sample", "spectral", "frobenius", "measured"]
    assert frame["sample"].tolist() == [0, 1, 2]
    values = torch.linalg.eigvalsh(a)
    np.testing.assert_allclose(frame.spectral, values.abs().max(), rtol=1e-12)
    np.testing.assert_allclose(frame.frobenius, values.square().mean().sqrt(), rtol=1e-12)
    np.testing.assert_allclose(frame.measured, frame.frobenius, rtol=0.05)
    assert frame.measured.nunique() == 3, "each sample has directions of its own"


def test_random_meets_where_all_directions_are_alike():
    eye = 3 * torch.eye(4, dtype=torch.float64)
    x = torch.rand(2, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    frame = saliency.random_meets(Quadratic(eye), x, torch.zeros(2, dtype=torch.long), directions=1, scalar="logit")
    np.testing.assert_allclose(frame[["spectral", "frobenius", "measured"]], 3, rtol=1e-12)


def test_nets_frame_adds_the_curvature_of_each_image():
    nets, x, _ = images(6)
    with torch.no_grad():
        right = {name: net(x).argmax(1) for name, net in nets.items()}
    y = right["standard"]
    frame = saliency.nets_frame({"standard": nets["standard"]}, x, y, eps_grid=[0.01], noise=["random"])
    assert set(frame.net) == {"standard"}
    assert set(frame.label) == {"Standard"}
    assert frame.image.tolist() == list(range(6))
    expected = geometry(nets["standard"], x, y).curvature.numpy()
    np.testing.assert_allclose(frame.curvature, expected, rtol=1e-5)
    some = y.clone()
    some[[0, 3]] = (some[[0, 3]] + 1) % 3  # it is wrong about these
    frame = saliency.net_frame(nets["standard"], x, some, eps_grid=[0.01], noise=["random"], scalar="margin")
    assert frame.image.tolist() == [1, 2, 4, 5]
    expected = geometry(nets["standard"], x, some, scalar="margin").curvature.numpy()[[1, 2, 4, 5]]
    np.testing.assert_allclose(frame.curvature, expected, rtol=1e-5)
    same = stability(nets["standard"], (x, some), eps_grid=[0.01], noise=["random"], scalar="margin")
    pd.testing.assert_frame_equal(frame[same.columns], same)


def stable(**change) -> pd.DataFrame:
    """Two nets, ten images each, two lengths, both kinds of noise; and rows that must not count."""
    rng = np.random.default_rng(0)
    rows = []
    for net, size in (("standard", 4.0), ("lcnn", 1.0)):
        for image in range(10):
            for eps in (0.01, 0.1):
                for noise, factor in (("random", 1.0), ("worst", 3.0)):
                    value = size * factor * eps * rng.uniform(0.5, 1.5)
                    rows.append(
                        (net, METHOD[net][0], image, "trained", noise, eps, "gradient", value, 10 * size + image)
                    )
                    rows.append((net, METHOD[net][0], image, "random", noise, eps, "gradient", 99.0, 1e6))
                    rows.append((net, METHOD[net][0], image, "trained", noise, eps, "smoothgrad", 77.0, 1e5))
    names = ["net", "label", "image", "weights", "noise", "eps", "method", "relative_change", "curvature"]
    return pd.DataFrame(rows, columns=names).assign(**change)


def kept(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[(frame.weights == "trained") & (frame.method == "gradient")]


def test_lines():
    frame = stable()
    points = saliency.lines(frame)
    assert {"net", "label", "noise", "eps", "n", "value", "low", "high", "theory"} == set(points.columns)
    assert len(points) == 2 * 2 * 2
    for row in points.itertuples():
        of = kept(frame)
        values = of[(of.net == row.net) & (of.noise == row.noise) & (of.eps == row.eps)].relative_change
        assert row.n == 10
        assert row.value == pytest.approx(values.mean())
        assert row.low <= row.value <= row.high
        assert row.theory == pytest.approx(row.eps * ({"standard": 40, "lcnn": 10}[row.net] + 4.5)), "ε times mean C"


def test_steadier():
    frame = stable()
    found = saliency.steadier(frame, 0.1, resamples=300)
    assert list(found.columns) == ["net", "label", "change", "ratio", "low", "high"]
    of = kept(frame)
    of = of[(of.noise == "random") & (of.eps == 0.1)]
    mean = of.groupby("net").relative_change.mean()
    standard, lcnn = found.itertuples()
    assert (standard.net, standard.ratio, standard.low, standard.high) == ("standard", 1.0, 1.0, 1.0)
    assert (lcnn.net, lcnn.label) == ("lcnn", "LCNN")
    assert standard.change == pytest.approx(mean["standard"])
    assert lcnn.change == pytest.approx(mean["lcnn"])
    assert lcnn.ratio == pytest.approx(mean["standard"] / mean["lcnn"])
    assert lcnn.low < lcnn.ratio < lcnn.high
    pd.testing.assert_frame_equal(found, saliency.steadier(frame, 0.1, resamples=300))
    certain = saliency.steadier(stable(relative_change=0.5), 0.1, resamples=20)
    np.testing.assert_allclose(certain[["ratio", "low", "high"]], 1)


def test_promises_table():
    frame = stable()
    clean, hit = ((0.98, 0.96), (0.97, 0.95)), ((0.25, 0.35), (0.5, 0.5))
    parts = []
    for method, before, after in zip(("standard", "lcnn"), clean, hit, strict=True):
        for norm in ("linf", "l2"):  # of L2 only
            shift = 0.2 if norm == "linf" else 0.0
            parts.append(seeds_frame(*(v - shift for v in before), method=method, norm=norm, eps=0.0))
            parts.append(seeds_frame(*(v - shift for v in after), method=method, norm=norm, eps=0.1))
    curves = attacks.over_seeds(pd.concat(parts))
    table = saliency.promises_table(frame, curves, 0.1)
    assert table.net.tolist() == ["Standard", "LCNN"]
    assert table["accuracy %"].tolist() == ["97.0", "96.0"]
    low, high = wilson(1000, 2000)
    assert table.loc[1, "survives ε = 0.1, %"] == f"50.0 ({100 * low:.1f} – {100 * high:.1f})"
    assert table.loc[0, "survives ε = 0.1, %"].startswith("30.0 (20.0 – 40.0"), "the spread over seeds"
    steady = saliency.steadier(frame, 0.1).iloc[1]
    assert table["change of ∇ℓ, random η"][1] == f"{steady.change:.3g}"
    assert table["steadier than Standard, times"].tolist() == [
        "1", f"{steady.ratio:.2f} ({steady.low:.2f} – {steady.high:.2f})"
    ]  # fmt: skip
    points = saliency.lines(frame)
    worst = points[(points.net == "lcnn") & (points.noise == "worst") & (points.eps == 0.1)].iloc[0]
    assert table["change, worst η"][1] == f"{worst.value:.3g} ({worst.low:.3g} – {worst.high:.3g})"
    without = saliency.promises_table(frame[frame.noise == "random"], curves, 0.1)
    assert "change, worst η" not in without
    assert without["steadier than Standard, times"].tolist() == table["steadier than Standard, times"].tolist()


def test_by_map():
    frame = stable().assign(cosine=0.5)
    frame.loc[frame.noise == "worst", "cosine"] = np.nan
    found = saliency.by_map(frame, ("relative_change", "cosine", "infidelity"), 0.1)
    expected = {"net", "label", "method", "map", "weights", "noise", "measure", "n", "value", "low", "high"}
    assert set(found.columns) == expected
    assert set(found.measure) == {"relative_change", "cosine"}, "infidelity was not measured"
    assert set(found[found.measure == "cosine"].noise) == {"random"}, "rows without a value are left out"
    assert (found["map"] == found.method.map(MAPS)).all()
    assert not found.isna().any(axis=None)
    assert not found.duplicated(["net", "method", "weights", "noise", "measure"]).any()
    (row,) = found[(found.net == "lcnn") & (found.method == "gradient") & (found.weights == "trained")
                   & (found.noise == "worst")].itertuples()  # fmt: skip
    of = kept(frame)
    of = of[(of.net == "lcnn") & (of.noise == "worst") & (of.eps == 0.1)]
    assert row.value == pytest.approx(of.relative_change.median())
    assert row.low <= row.value <= row.high


def test_weights_matter():
    nets, x, y = images()
    frame = saliency.weights_matter(nets, x, y, ("gradient", "input_x_gradient"))
    assert len(frame) == 2 * 2 * len(x)
    assert [*dict.fromkeys(zip(frame.net, frame.label, frame.method, frame["map"], strict=True))] == [
        (name, METHOD[name][0], method, MAPS[method]) for name in nets for method in ("gradient", "input_x_gradient")
    ]
    of = frame[(frame.net == "lcnn") & (frame.method == "gradient")]
    shuffled = randomized(nets["lcnn"], x)
    by_hand = compare(explain(nets["lcnn"], x, y, "gradient"), explain(shuffled, x, y, "gradient"))
    np.testing.assert_allclose(of.relative_change, by_hand["relative_change"], rtol=1e-5)
    np.testing.assert_allclose(of.cosine, by_hand["cosine"], rtol=1e-4, atol=1e-5)
    assert (frame.relative_change > 0).all(), "other weights, other maps"


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_paper_lines(dataset):
    frame = saliency.paper_lines(dataset)
    assert list(frame.columns) == ["label", "eps", "value"]
    assert frame.index.tolist() == list(range(28))
    wide = frame.pivot(index="label", columns="eps", values="value")
    assert wide.shape == (4, 7)
    assert set(wide.index) == {METHOD[m][0] for m in scenes.PAPER_NETS}
    assert (wide > 0).all(axis=None)
    assert (wide.loc["LCNN + GradReg"] < wide.loc["Standard"]).all()


# ---- what there is to look at ------------------------------------------------------------------------------------


@pytest.fixture
def bare(store, monkeypatch, tmp_path):
    """A machine without datasets and without a network."""
    monkeypatch.setenv("LCNN_DATA", str(tmp_path / "no data"))
    monkeypatch.setattr(data, "fetch", lambda *_, **__: pytest.fail("it wanted to download"))


@needs_digits
def test_scene_of_digits_needs_nothing(bare):
    found = scenes.scene(CPU, ("standard", "lcnn"))
    assert (found.dataset, found.scale, found.classes) == ("digits", "lab", data.TEN_DIGITS)
    assert list(found.nets) == ["standard", "lcnn"]
    assert found.x.shape == (360, 1, 8, 8)
    assert 0 <= found.x.min() < found.x.max() <= 1
    with torch.no_grad():
        assert (found.nets["lcnn"](found.x).argmax(1) == found.y).float().mean() > 0.9
    assert str(found) == "360 test images of digits; networks of scale 'lab': Standard, LCNN"
    few = found.first(5)
    assert str(few).startswith("5 test images of digits")
    assert torch.equal(few.x, found.x[:5])
    assert torch.equal(few.y, found.y[:5])
    assert few.nets is found.nets


@pytest.mark.parametrize("dataset", ["cifar100", "mnist", ""])
def test_scene_of_another_dataset(bare, dataset):
    with pytest.raises(ValueError, match=f"no networks to look at for '{dataset}': use 'digits' or 'cifar10'"):
        scenes.scene(CPU, dataset=dataset)


@pytest.mark.parametrize("asked", [None, "digits", "cifar10"])
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("here", [False, True])
def test_scene_takes_cifar10_where_it_costs_nothing(monkeypatch, here, weights, asked):
    runs = []

    def run(one, **options):
        runs.append((one, options))
        return SimpleNamespace(model=nn.Identity())

    known = {"digits": "embedded", "cifar10": "/somewhere" if here else "missing"}
    monkeypatch.setattr(data, "available", lambda: known)
    monkeypatch.setattr(scenes, "shipped", lambda recipes: weights and len([*recipes]) == 2)
    monkeypatch.setattr(scenes, "run", run)
    monkeypatch.setattr(scenes, "samples", lambda *_: (torch.zeros(3, 1, 2, 2), torch.zeros(3).long()))
    monkeypatch.setattr(data, "load", lambda *_: SimpleNamespace(classes=data.TEN_DIGITS))
    found = scenes.scene(CPU, ("standard", "cure"), seed=2, dataset=asked)
    expected = asked or ("cifar10" if here and weights else "digits")
    scale = {"digits": "lab", "cifar10": "tiny"}[expected]
    assert (found.dataset, found.scale) == (expected, scale)
    assert [one for one, _ in runs] == [recipe(expected, m, 2, scale) for m in ("standard", "cure")]
    assert all(options["device"] == CPU for _, options in runs)
    assert str(found).endswith("Standard, CURE")


def test_shipped(monkeypatch, tmp_path):
    monkeypatch.setattr(scenes, "SHIPPED", tmp_path)
    recipes = [recipe("digits", method) for method in ("standard", "lcnn")]
    (tmp_path / f"{run_name(recipes[0])}.safetensors").touch()
    (tmp_path / f"{run_name(recipes[1])}.json").touch()
    assert scenes.shipped(recipes[:1])
    assert not scenes.shipped(recipes), "numbers are not weights"
    (tmp_path / f"{run_name(recipes[1])}.safetensors").touch()
    assert scenes.shipped(iter(recipes))


def test_the_linear_distance_is_exact_for_a_linear_net_and_blind_to_the_logits_scale():
    model = nn.Linear(4, 2).double()
    x, y = torch.randn(5, 4).double(), torch.tensor([0, 1, 0, 1, 1])
    logits, apart = model(x).detach(), (model.weight[0] - model.weight[1]).norm().item()
    margin = logits.gather(1, y[:, None]) - logits.gather(1, 1 - y[:, None])
    found = attacks.linear_distance(model, x, y)
    torch.testing.assert_close(found, margin.squeeze(1) / apart)
    torch.testing.assert_close(attacks.linear_distance(Headed(model, lambda z: 10 * z), x, y), found)
