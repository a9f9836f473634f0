"""Robustness curves: where each sample falls, what that costs, and the intervals of what is left."""

import math

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attacks import NORMS, cnn, linear, margin_loss, net, predicted
from torch import nn

from lcnn_utils.attacks import PAPER_EPS, curve_of, first_success, pgd, robustness_curve, wilson
from lcnn_utils.curvature import evaluating
from lcnn_utils.data import Images, load

GRIDS = {"l2": (0.05, 0.1, 0.2, 0.3), "linf": (0.02, 0.05, 0.08, 0.12)}


def problem(seed: int = 0, n: int = 24) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """In float64, lest rounding in batches of other sizes decides; the first two samples are labelled wrongly."""
    model = net(seed, torch.float64)
    x, y = predicted(model, n, 12, dtype=torch.float64, seed=seed)
    y[:2] = (y[:2] + 1) % 4
    return model, x, y


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a.double(), b.double(), rtol=1e-6, atol=0)


def rows(model: nn.Module, call) -> list[int]:
    """How many samples pass through the model, evaluation by evaluation, while ``call`` runs."""
    seen = []
    handle = model.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    call()
    handle.remove()
    return seen


# -------------------------------------------------------------------------------------------- where samples fall
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "attack",
    [dict(loss="margin"), dict(loss="ce", restarts=2), dict(step_size=0.05, momentum=0.9), dict(random_start=False)],
    ids=lambda attack: "-".join(attack),
)
def test_a_sample_falls_where_pgd_on_all_samples_first_fools_it(norm, attack):
    """Against a loop that attacks everybody anew at each ε, from the same starts."""
    model, x, y = problem(1)
    attack = dict(norm=norm, steps=4) | attack
    expected, generator = torch.full((24,), math.inf, dtype=torch.float64), seeded()
    expected[margin_loss(model, x, y) > 0] = 0
    for eps in GRIDS[norm]:
        fooled = margin_loss(model, pgd(model, x, y, eps, generator=generator, **attack), y) > 0
        expected[fooled & expected.isinf()] = eps
    assert (expected[:2] == 0).all()
    assert set(expected.tolist()) >= {0.0, math.inf, GRIDS[norm][-1], GRIDS[norm][-2]}, "nothing to compare"
    assert close(first_success(model, x, y, GRIDS[norm], **attack), expected)
    assert close(first_success(model, x, y, GRIDS[norm], generator=seeded(), **attack), expected), "the default seed"


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ["margin", "ce"])
@pytest.mark.parametrize("box", [None, (0.0, 1.0)])
def test_a_linear_network_falls_at_the_first_eps_beyond_its_margin_over_the_dual_norm(norm, loss, box):
    model, x, y, radius = linear((1, 5, 5), torch.float64, norm)
    if box:  # around the boundary and far from the edges
        dual = (-margin_loss(model, x, y) / radius)[0]
        x = 0.4 + 0.2 * x
        model[1].bias.data -= model(x).detach().mean(0)
        y = model(x).argmax(1)
        radius = -margin_loss(model, x, y) / dual
    near = radius.sort().values
    grid = (near[1:8:2] + near[2:9:2]) / 2
    assert not box or grid.max() < 0.4
    beyond = torch.cat([grid, grid.new_tensor([math.inf])])[torch.bucketize(radius, grid)]
    assert close(first_success(model, x, y, grid, norm=norm, loss=loss, box=box), beyond)


def test_neither_the_order_of_the_grid_nor_repetitions_nor_larger_values_change_anything():
    model, x, y = problem()
    fell = lambda grid: first_success(model, x, y, grid, steps=1, step_size=0.01)  # the starts are what counts
    first = fell((0.2, 0.4, 0.8))
    for grid in ([0.8, 0.2, 0.4, 0.2, 0.8], iter((0.4, 0.8, 0.2)), torch.tensor([0.2, 0.4, 0.8], dtype=torch.float64)):
        assert torch.equal(fell(grid), first)
    longer = fell((0.2, 0.4, 0.8, 1.2, 1.6))
    assert ((longer > 0.8) & longer.isfinite()).any()
    assert torch.equal(first, longer.where(longer <= 0.8, math.inf))


@pytest.mark.parametrize("norm", NORMS)
def test_where_a_sample_falls_does_not_depend_on_its_neighbours(norm):
    model, x, y = problem(4)
    other, others = x.clone(), y.clone()
    other[8:] = predicted(model, 16, 12, dtype=torch.float64, seed=9)[0]
    others[8:] = model(other[8:]).argmax(1)
    others[8:16] = (others[8:16] + 1) % 4  # fallen from the beginning
    a, b = (first_success(model, *pair, GRIDS[norm], norm=norm, steps=2) for pair in ((x, y), (other, others)))
    assert torch.equal(a[:8], b[:8])
    assert (b[8:16] == 0).all()
    assert not torch.equal(a[16:], b[16:])


def test_what_the_size_of_the_batches_may_change():
    """Nothing while all fit into one, or where nothing is drawn; else the starts, which are drawn batch by batch."""
    model, x, y = problem(2)
    grid, few = GRIDS["l2"], dict(steps=1, step_size=0.01)
    fell = lambda size, generator=None, part=slice(None), **more: first_success(
        model, x[part], y[part], grid, batch_size=size, generator=generator or seeded(), **few, **more
    )
    assert torch.equal(fell(24), fell(512))
    assert all(torch.equal(fell(size, random_start=False), fell(24, random_start=False)) for size in (1, 7, 23))
    assert not torch.equal(fell(10), fell(24)), "one short step: the starts are what counts"
    generator = seeded()
    parts = [fell(512, generator, slice(i, i + 10)) for i in (0, 10, 20)]
    assert torch.equal(fell(10), torch.cat(parts))


def test_the_seed_alone_decides_where_samples_fall():
    model, x, y = problem(3)
    state = torch.get_rng_state()
    fell = lambda seed: first_success(model, x, y, GRIDS["l2"], steps=1, step_size=0.01, generator=seeded(seed))
    assert torch.equal(fell(5), fell(5))
    assert not torch.equal(fell(5), fell(6))
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------------------------------------------- its cost
@pytest.mark.parametrize("norm", NORMS)
def test_the_fallen_cost_nothing(norm):
    """Evaluation by evaluation: after the check and one of all samples, what PGD on the survivors alone makes."""
    model, x, y = problem(1)
    attack = dict(norm=norm, steps=6, random_start=False)
    fell = first_success(model, x, y, GRIDS[norm], **attack)
    expected = [2, 2, 1, 1, 24]
    for eps in GRIDS[norm]:
        left = fell >= 0.999 * eps
        expected += rows(model, lambda: pgd(model, x[left], y[left], eps, **attack))[4:]  # noqa: B023 (called at once)
    assert rows(model, lambda: first_success(model, x, y, GRIDS[norm], **attack)) == expected
    anew = rows(model, lambda: [pgd(model, x, y, eps, **attack) for eps in GRIDS[norm]])
    assert sum(expected) < sum(anew)


def test_once_all_have_fallen_no_attack_is_made():
    model, x, y, radius = linear((12,), torch.float32, "l2")
    attack = dict(steps=5, box=None)
    enough = 1.5 * radius.max().item()
    one = rows(model, lambda: first_success(model, x, y, [enough], **attack))
    assert rows(model, lambda: first_success(model, x, y, [enough, 2 * enough, 3 * enough], **attack)) == one
    wrong = rows(model, lambda: first_success(model, x, 1 - y, [0.1, 0.2, 0.3], **attack))
    assert wrong == [2, 2, 1, 1, 12]


# ---------------------------------------------------------------------------------------------------- the curve
def by_hand(k: int, n: int, z: float) -> tuple[float, float]:
    middle, half = k / n + z * z / (2 * n), z * math.sqrt(k / n * (1 - k / n) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_against_its_formula(counts):
    k, n = counts
    low, high = wilson(k, n)
    assert (low, high) == pytest.approx(by_hand(k, n, 1.959963984540054), abs=1e-9)
    assert 0 <= low <= k / n <= high <= 1
    wide = wilson(k, n, 0.99)
    assert wide == pytest.approx(by_hand(k, n, 2.5758293035489004), abs=1e-9)
    assert wide[0] <= low < high <= wide[1]


def test_wilson_of_none_and_of_all():
    assert wilson(0, 10) == pytest.approx((0, 3.8414588 / 13.8414588), abs=1e-7)  # z²/(n + z²)
    assert wilson(10, 10) == pytest.approx((10 / 13.8414588, 1), abs=1e-7)
    assert wilson(0, 10)[0] == 0
    assert wilson(10, 10)[1] == 1


def means_of_digits() -> tuple[nn.Module, Images]:
    """A linear network, the nearest class mean, and 60 test images, of which it gets some wrong."""
    train, test = load("digits", "train"), load("digits", "test", subset=60)
    means = torch.stack([train.float()[train.y == c].mean(0).flatten() for c in range(10)])
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    model[1].weight.data, model[1].bias.data = 2 * means, -means.square().sum(1)
    return model, test


def test_a_curve_has_its_accuracy_on_top_and_its_intervals_around():
    model, images = means_of_digits()
    grid = (0.5, 0.1, 0.3, 0.1)
    curve = robustness_curve(model, images, grid, norm="l2", steps=5)
    assert list(curve) == ["eps", "correct", "n", "accuracy", "low", "high", "norm", "loss"]
    assert curve.eps.tolist() == [0.0, 0.1, 0.3, 0.5]
    right = int((model(images.float()).argmax(1) == images.y).sum())
    assert curve.correct[0] == right < 60
    assert (curve.n == 60).all()
    assert (curve.accuracy == curve.correct / 60).all()
    assert curve.correct.is_monotonic_decreasing
    assert curve.correct.nunique() == 4
    for row in curve.itertuples():
        assert (row.low, row.high) == wilson(row.correct, 60)
        fooled = margin_loss(model, pgd(model, images.float(), images.y, row.eps, steps=5), images.y) > 0
        assert row.correct == pytest.approx(60 - int(fooled.sum()), abs=1), "other starts"
    pd.testing.assert_frame_equal(curve, robustness_curve(model, (images.float(), images.y), grid, steps=5))
    assert (curve.norm == "l2").all()
    assert (curve.loss == "margin").all()
    other = robustness_curve(model, images, (0.05,), norm="linf", loss="ce", steps=2)
    assert (other.norm == "linf").all()
    assert (other.loss == "ce").all()
    assert robustness_curve(model, images, steps=1).eps.tolist() == [0.0, *PAPER_EPS]


def test_a_sample_that_falls_at_an_eps_is_wrong_at_that_eps():
    """Though float32 rounds 0.1 up and 0.7 down."""
    curve = curve_of(torch.tensor([0.0, 0.1, 0.1, 0.7, math.inf]), (0.7, 0.1))
    assert curve.eps.tolist() == [0.0, 0.1, 0.7]
    assert curve.correct.tolist() == [4, 2, 1]


# ----------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize("grid", [[], [0.1, -0.1], [0.1, math.nan], [math.inf]])
@pytest.mark.parametrize("call", [first_success, lambda model, x, y, grid: robustness_curve(model, (x, y), grid)])
def test_a_bad_grid_is_named(grid, call):
    model = net()
    with pytest.raises(ValueError, match="eps_grid must hold lengths, finite and 0 or more, at least one"):
        call(model, *predicted(model, 2, 12), grid)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(batch_size=0), "batch_size must be at least 1, got 0"),
        (dict(batch_size=-3), "batch_size must be at least 1, got -3"),
        (dict(norm="l1"), "unknown norm 'l1'"),
        (dict(loss="hinge"), "unknown loss 'hinge'"),
        (dict(steps=0), "steps must be"),
        (dict(restarts=0), "restarts must be"),
        (dict(step_size=-1.0), "step_size is -1"),
        (dict(momentum=1.0), "momentum is 1"),
        (dict(box=(0.4, 0.6)), "outside the box"),
        (dict(y=torch.tensor([0])), "labels have shape"),
        (dict(x=torch.full((2, 12), math.nan)), "NaN"),
    ],
)
def test_bad_input_of_first_success_is_named(change, message):
    arguments = dict(model=net(), x=torch.rand(2, 12), y=torch.tensor([0, 1]), eps_grid=[0.1]) | change
    with pytest.raises(ValueError, match=message):
        first_success(**arguments)


def test_the_model_is_left_as_found():
    model = cnn().train()
    model[3].eval()
    x, y = predicted(model, 6, 1, 8, 8)
    modes = [module.training for module in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    fell = first_success(model, x, y, (0.1, 0.5), steps=3)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    with evaluating(model), torch.no_grad():
        assert torch.equal(first_success(model, x, y, (0.1, 0.5), steps=3), fell)
    with pytest.raises(ValueError, match="norm"):
        first_success(model, x, y, (0.1,), norm="l3")
    assert [module.training for module in model.modules()] == modes
