"""Smallest steps and robustness curves: closed forms of linear networks, a loop over all samples, foolbox, Wilson."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import length, linear, margin_loss, means_of_digits, net, predicted, seeded
from torch import nn

from lcnn_utils.attacks import autoattack, curve_of, first_success, minimal_radius, pgd, robustness_curve
from lcnn_utils.attacks.pgd import NORMS
from lcnn_utils.attacks.robustness import wilson
from lcnn_utils.data import load
from lcnn_utils.training import Recipe, fit_recipe

GRIDS = {"l2": (0.05, 0.1, 0.2, 0.3), "linf": (0.02, 0.05, 0.08, 0.12)}


@pytest.mark.parametrize("norm", NORMS)
def test_a_linear_network_falls_at_its_margin_over_the_dual_norm(norm):
    model, x, y, radius = linear((1, 5, 5), torch.float32, norm)
    found, point = minimal_radius(model, x, y, norm=norm, steps=20, box=None)
    torch.testing.assert_close(found, radius, rtol=2e-3, atol=0)
    assert (found >= radius * (1 - 1e-5)).all()
    assert (margin_loss(model, point, y) > 0).all()
    near = radius.sort().values
    grid = (near[1:8:2] + near[2:9:2]) / 2
    beyond = torch.cat([grid, grid.new_tensor([math.inf])])[torch.bucketize(radius, grid)]
    for loss in ("margin", "ce"):
        torch.testing.assert_close(first_success(model, x, y, grid, norm=norm, loss=loss, box=None).to(beyond), beyond)


def test_minimal_radius_obeys_the_box_and_says_where_nothing_is_found():
    """Logits (x₁ − ½, 0): class 0 above ½, at distance x₁ − ½; and a threshold outside the box cannot be reached."""
    model = nn.Linear(2, 2)
    model.weight.data = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    x, y = torch.tensor([[0.9, 0.5], [0.6, 0.5], [0.2, 0.5]]), torch.zeros(3, dtype=torch.long)
    model.bias.data = torch.tensor([-0.5, 0.0])
    radius, point = minimal_radius(model, x, y)
    torch.testing.assert_close(radius, torch.tensor([0.4, 0.1, 0.0]), rtol=2e-3, atol=0)
    assert torch.equal(point[2], x[2])
    model.bias.data = torch.tensor([0.1, 0.0])
    radius, point = minimal_radius(model, x, y, steps=5)
    assert radius.isinf().all()
    assert torch.equal(point, x)
    radius, _ = minimal_radius(model, x, y, steps=20, box=None)
    torch.testing.assert_close(radius, x[:, 0] + 0.1, rtol=2e-3, atol=0)


class OneSided(nn.Module):
    """Wrong beyond 0.03 on the right, where no gradient leads, and beyond 0.02 on the left, where one does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        margin = torch.where(x > 0.03, -1 + 0 * x, torch.where(x > -1e-3, 0.02 + 0 * x, 0.02 + x))
        return torch.cat([margin, torch.zeros_like(x)], 1)


def test_minimal_radius_searches_on_below_lengths_at_which_it_failed():
    """Starts decide which side is seen first: who finds 0.03 after failing at 0.05 still has to look for 0.02."""
    x, y = torch.zeros(300, 1), torch.zeros(300, dtype=torch.long)
    radius, _ = minimal_radius(OneSided(), x, y, box=None, steps=3)
    assert ((radius - 0.02).abs() < 1e-4).float().mean() > 0.95


@pytest.mark.parametrize("norm", NORMS)
def test_minimal_radius_is_a_real_step_that_pgd_confirms(norm):
    model = net()
    x, y = predicted(model, 8, 12)
    y[0] = (y[0] + 1) % 4
    radius, point = minimal_radius(model, x, y, norm=norm, steps=20)
    assert radius[0] == 0
    assert torch.equal(point[0], x[0])
    assert (radius[1:].isfinite() & (radius[1:] > 0)).all()
    torch.testing.assert_close(radius, length(point - x, norm))
    assert ((point >= 0) & (point <= 1)).all()
    for i in range(8):  # alone, where products round differently
        assert model(point[i : i + 1]).argmax(1) != y[i]
    shorter = pgd(model, x, y, 0.9 * radius, norm=norm, restarts=5, steps=50)
    assert (margin_loss(model, shorter, y)[1:] > 0).sum() <= 1
    assert (margin_loss(model, x + (point - x) * 0.99, y)[1:] < 0).all(), "not cut to its shortest wrong part"


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("attack", [dict(loss="margin"), dict(loss="ce", restarts=2), dict(random_start=False)])
def test_a_sample_falls_where_pgd_on_all_samples_first_fools_it(norm, attack):
    """Against a loop that attacks everybody at each ε, from the same starts; the first two are labelled wrongly."""
    model = net(1, torch.float64)  # in float64, lest rounding in batches of other sizes decides
    x, y = predicted(model, 24, 12, dtype=torch.float64, seed=1)
    y[:2] = (y[:2] + 1) % 4
    attack = dict(norm=norm, steps=4) | attack
    expected, generator = torch.full((24,), math.inf, dtype=torch.float64), seeded()
    expected[margin_loss(model, x, y) > 0] = 0
    for eps in GRIDS[norm]:
        fooled = margin_loss(model, pgd(model, x, y, eps, generator=generator, **attack), y) > 0
        expected[fooled & expected.isinf()] = eps
    assert (expected[:2] == 0).all()
    assert set(expected.tolist()) >= {0.0, math.inf, GRIDS[norm][-1], GRIDS[norm][-2]}, "nothing to compare"
    found = first_success(model, x, y, GRIDS[norm][::-1] * 2, **attack)  # in any order, repeated
    torch.testing.assert_close(found, expected)
    parts = first_success(model, x, y, GRIDS[norm], batch_size=9, **attack | dict(random_start=False, restarts=1))
    whole = first_success(model, x, y, GRIDS[norm], **attack | dict(random_start=False, restarts=1))
    torch.testing.assert_close(parts, whole)


@settings(deadline=None, max_examples=20)
@given(
    st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.sampled_from([0.95, 0.99])
)
def test_wilson_against_its_formula(counts, confidence):
    (k, n), z = counts, {0.95: 1.959963984540054, 0.99: 2.5758293035489004}[confidence]
    middle, half = k / n + z * z / (2 * n), z * math.sqrt(k / n * (1 - k / n) / n + z * z / (4 * n * n))
    by_hand = (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)
    assert wilson(k, n, confidence) == pytest.approx(by_hand, abs=1e-9)


def test_a_curve_has_its_accuracy_on_top_and_its_intervals_around():
    model, images = means_of_digits()
    grid = (0.5, 0.1, 0.3, 0.1)
    curve = robustness_curve(model, images, grid, steps=5)
    assert list(curve) == ["eps", "correct", "n", "accuracy", "low", "high", "norm", "loss"]
    assert curve.eps.tolist() == [0.0, 0.1, 0.3, 0.5]
    assert curve.correct[0] == int((model(images.float()).argmax(1) == images.y).sum()) < 60
    assert curve.correct.nunique() == 4
    for row in curve.itertuples():
        assert (row.n, row.accuracy, row.norm, row.loss) == (60, row.correct / 60, "l2", "margin")
        assert (row.low, row.high) == wilson(row.correct, 60)
        fooled = margin_loss(model, pgd(model, images.float(), images.y, row.eps, steps=5), images.y) > 0
        assert row.correct == pytest.approx(60 - int(fooled.sum()), abs=1), "other starts"
    rounded = curve_of(torch.tensor([0.0, 0.1, 0.1, 0.7, math.inf]), (0.7, 0.1))  # float32: 0.1 up and 0.7 down
    assert rounded.correct.tolist() == [4, 2, 1]


@pytest.fixture(scope="module")
def judged(tmp_path_factory) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """An LCNN that has learnt the digits, test images and their labels; its classes' boundaries lie close together."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LCNN_STORE", str(tmp_path_factory.mktemp("store")))
        model, _ = fit_recipe(
            Recipe(dataset="digits", method="lcnn", model="mlp", width=32, epochs=5, batch_size=64), progress=False
        )
    images = load("digits", "test", subset=30)
    return model, images.float(), images.y


@pytest.mark.slow
def test_foolbox_finds_no_more(judged):
    """foolbox's PGD with its own step size and ours; the median of DDN's steps. One image may be luck."""
    foolbox = pytest.importorskip("foolbox")
    model, x, y = judged
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    for norm, eps, name in (("l2", 0.5, "L2PGD"), ("linf", 0.1, "LinfPGD")):
        ours = first_success(model, x, y, [eps], norm=norm, restarts=3).isinf().sum().item()
        fooled = getattr(foolbox.attacks, name)(steps=20, rel_stepsize=2.5 / 20)(wrapped, x, y, epsilons=eps)[2]
        assert 0 < ours <= (~fooled).sum() + 1
    points = foolbox.attacks.DDNAttack(steps=50)(wrapped, x, y, epsilons=None)[1]
    assert minimal_radius(model, x, y)[0].median() <= 1.001 * length(points - x, "l2").median()


@pytest.mark.slow
def test_autoattack_finds_no_more(judged):
    pytest.importorskip("pyautoattack")
    model, x, y = judged
    ours = first_success(model, x, y, [0.65], restarts=5).isinf().sum()
    theirs = (margin_loss(model, autoattack(model, x, y, 0.65), y) < 0).sum()
    assert 0 < theirs < 15
    assert -1 <= ours - theirs <= 1


@pytest.mark.parametrize("grid", [[], [0.1, math.nan], [0.1, -0.1]])
def test_a_bad_grid_is_named(grid):
    model = net()
    with pytest.raises(ValueError, match="eps_grid"):
        robustness_curve(model, predicted(model, 2, 12), grid)
