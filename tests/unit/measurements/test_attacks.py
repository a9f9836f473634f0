"""What notebook 07 measures: PGD's way on a linear net, intervals over seeds by hand, the paper's Table 2."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import nn

from lcnn_utils.attacks import pgd
from lcnn_utils.experiments import measured
from lcnn_utils.figures.style import METHOD
from lcnn_utils.measurements import attacks as measurements

X = torch.tensor([[0.2, 0.5]])
Y = torch.tensor([0])


@pytest.fixture
def net():
    """A linear net of the square whose decision boundary is x₁ = ½."""
    net = nn.Linear(2, 2)
    net.load_state_dict({"weight": torch.tensor([[-6.0, 0.0], [6.0, 0.0]]), "bias": torch.tensor([3.0, -3.0])})
    return net


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_path_of_a_point_that_stays_right(net, norm):
    """x, the random start and seven steps, inside the ball, none longer than asked, all towards the boundary."""
    points = measurements.path(net, X, Y, 0.2, norm=norm, steps=7, step_size=0.05)
    assert points.shape == (9, 2)
    assert torch.equal(points[:1], X)
    order = 2 if norm == "l2" else math.inf
    assert (torch.linalg.vector_norm(points - X, order, dim=1) <= 0.2 * (1 + 1e-5)).all()
    assert (torch.linalg.vector_norm(points[1:].diff(dim=0), order, dim=1) <= 0.05 * (1 + 1e-5)).all()
    assert (points[1:, 0].diff() >= -1e-6).all()
    assert (net(points).argmax(1) == 0).all()


def test_path_ends_where_pgd_ends(net):
    points = measurements.path(net, X, Y, 0.4, steps=50, step_size=0.05)
    assert (net(points).argmax(1) != Y).tolist() == [False] * (len(points) - 1) + [True]
    torch.testing.assert_close(points[-1:], pgd(net, X, Y, 0.4, steps=50, step_size=0.05, box=None))
    outside = X - 3
    assert torch.equal(measurements.path(net, outside, Y, 1.0, steps=3)[:1], outside), "points may lie anywhere"
    assert not net._forward_pre_hooks


def curve(*shares, n=1000, **about):
    """Rows of a table of curves, a seed a share."""
    row = dict(dataset="digits", method="lcnn", norm="l2", eps=0.1, n=n) | about
    rows = []
    for seed, share in enumerate(shares):
        correct = round(n * share)
        rows.append(row | dict(seed=seed, correct=correct, accuracy=share, held="1" * correct + "0" * (n - correct)))
    return pd.DataFrame(rows).assign(label=METHOD[row["method"]][0])


STUDENT = stats.t.ppf(0.975, [1, 999])  # of two seeds, of a thousand images
BY_IMAGE = [1] * 590 + [0.5] * 20 + [0] * 390


@pytest.mark.parametrize(
    ("shares", "half"),
    [
        ((0.59, 0.61), math.hypot(0.01 * STUDENT[0], STUDENT[1] * np.std(BY_IMAGE) / 999**0.5)),
        ((0.6, 0.6), STUDENT[1] * (0.24 / 999) ** 0.5),  # the same images each time
        ((0.0, 0.9), 1.0),  # shares end at 0 and 1
    ],
)
def test_over_seeds_by_hand(shares, half):
    (row,) = measurements.over_seeds(curve(*shares)).itertuples()
    mean = sum(shares) / 2
    expected = (mean, max(0, mean - half), min(1, mean + half), 2)
    assert (row.accuracy, row.low, row.high, row.seeds) == pytest.approx(expected)


def test_one_network_has_no_interval():
    (row,) = measurements.over_seeds(curve(0.3)).itertuples()
    assert (row.accuracy, row.low, row.high, row.seeds) == pytest.approx((0.3, np.nan, np.nan, 1), nan_ok=True)


def test_masking_is_checked_with_another_net(net):
    other = nn.Linear(2, 2)
    x = torch.rand(4, 2, generator=torch.Generator().manual_seed(0))
    frame = measurements.masking_frame({"standard": net, "lcnn": other, "cure": net}, x, net(x).argmax(1), 0.1, steps=2)
    assert frame.groupby("net", sort=False).other.first().to_dict() == {
        "Standard": "LCNN", "LCNN": "Standard", "CURE": "Standard"
    }  # fmt: skip


def test_masking_table_has_the_stored_numbers():
    frame = measured("digits_masking")
    table = measurements.masking_table(frame).set_index("accuracy left, or share, in %")
    assert [*table.columns] == [*frame.net.unique()]
    for row in frame.itertuples():
        number, *mark = table.loc[row.check.removeprefix("share of "), row.net].split()
        assert float(number) == pytest.approx(100 * row.value, abs=0.051)
        assert mark == ([] if pd.isna(row.passed) else ["✓" if row.passed else "✗"])
    np.testing.assert_allclose(
        table.iloc[0].astype(float), 100 * frame.groupby("net", sort=False).standard.first(), atol=0.051
    )
