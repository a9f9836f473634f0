"""Comparisons of maps against SciPy and formulas written out, Captum's scores against their definitions, intervals."""

import math
import re
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import spearmanr
from torch import nn

from lcnn_utils.nn import CenteredSoftplus
from lcnn_utils.saliency import MEASURES, captum_scores, compare, explain, steadiness, summary

maps_of = lambda values, rows=3, width=12: arrays(np.float64, (rows, width), elements=values)
few_values = st.integers(-2, 2).map(float)  # many ties
any_values = st.floats(-1e6, 1e6, width=32)


def images(n: int = 4, channels: int = 1, side: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, channels, side, side, generator=torch.Generator().manual_seed(seed))


def curved(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 16), CenteredSoftplus(5.0), nn.Linear(16, 3))


def linear(seed: int = 0, d: int = 36) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(d, 3))


# ----------------------------------------------------------------------------------------------------- comparisons
@pytest.mark.parametrize("shape", [(5, 1, 8, 8), (5, 3, 11, 7), (5, 20)])
def test_a_map_is_just_like_itself_and_opposite_to_its_negative(shape):
    a = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    same, opposite = compare(a, a), compare(a, -a)
    assert tuple(same) == MEASURES
    if len(shape) == 4:
        np.testing.assert_allclose(same["ssim"], np.ones(5), atol=1e-5)
    for name, alike, against in (
        ("relative_change", 0, 2), ("cosine", 1, -1), ("spearman", 1, -1), ("top_overlap", 1, 1)
    ):  # fmt: skip
        np.testing.assert_allclose(same[name], np.full(5, alike), atol=1e-6, err_msg=name)
        np.testing.assert_allclose(opposite[name], np.full(5, against), atol=1e-6, err_msg=name)


@settings(deadline=None, max_examples=50)
@given(maps_of(any_values), st.floats(1e-3, 1e3))
def test_a_scaled_map_has_changed_by_its_factor_less_one_and_points_the_same_way(values, factor):
    a = torch.from_numpy(values)
    a = a[a.abs().amax(1) > 1e-3]
    found = compare(a, factor * a)
    np.testing.assert_allclose(found["relative_change"], abs(factor - 1), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found["cosine"], 1, rtol=1e-9)
    np.testing.assert_allclose(found["top_overlap"][~np.isnan(found["top_overlap"])], 1)  # nan: the largest tie
    varied = (a.amax(1) > a.amin(1)).numpy()
    np.testing.assert_allclose(found["spearman"][varied], 1, rtol=1e-9)


@settings(deadline=None, max_examples=100)
@given(maps_of(few_values) | maps_of(any_values), maps_of(few_values) | maps_of(any_values))
def test_spearman_is_scipy_s_with_ties_too(a, b):
    found = compare(torch.from_numpy(a), torch.from_numpy(b))["spearman"]
    for i in range(len(a)):
        if np.ptp(a[i]) > 0 and np.ptp(b[i]) > 0:
            assert found[i] == pytest.approx(spearmanr(a[i], b[i]).statistic, abs=1e-9)


@settings(deadline=None, max_examples=50)
@given(maps_of(any_values), maps_of(any_values))
def test_change_and_cosine_are_those_of_numpy(a, b):
    found = compare(torch.from_numpy(a), torch.from_numpy(b))
    for i in range(len(a)):
        if (size := np.linalg.norm(a[i])) > 1e-6 and (other := np.linalg.norm(b[i])) > 1e-6:
            assert found["relative_change"][i] == pytest.approx(np.linalg.norm(b[i] - a[i]) / size, rel=1e-9)
            assert found["cosine"][i] == pytest.approx(a[i] @ b[i] / size / other, abs=1e-9)
        largest, others = np.sort(np.abs([a[i], b[i]]))[:, :-3:-1].T  # the tenth of 12 pixels is one
        if (largest > others).all():
            assert found["top_overlap"][i] == (np.abs(a[i]).argmax() == np.abs(b[i]).argmax())
        else:
            assert np.isnan(found["top_overlap"][i]), "no pixel is the largest"


def test_the_top_tenth_is_found_by_size_summed_over_channels():
    """Of 20 pixels 2 count: 7 and 3, then 5 and 3. By the largest channel, or with signs, they would share none."""
    a, b = torch.zeros(1, 2, 4, 5), torch.zeros(1, 2, 4, 5)
    first = {3: (-2.0, 2.0), 7: (1.0, -4.0), 11: (3.5, 0.0)}
    second = {3: (2.0, 2.0), 5: (-9.0, 0.0), 13: (3.5, 0.0)}
    for map_, entries in ((a, first), (b, second)):
        for pixel, values in entries.items():
            map_[0, :, pixel // 5, pixel % 5] = torch.tensor(values)
    np.testing.assert_allclose(compare(a, b)["top_overlap"], [0.5])
    np.testing.assert_allclose(compare(a, a.roll(1, 3))["top_overlap"], [0])
    for other, want in (([1.0, -4.0], 1), ([-4.0, 1.0], 0)):  # one number at least
        found = compare(torch.tensor([[1.0, 3.0]]), torch.tensor([other]))["top_overlap"]
        np.testing.assert_allclose(found, [want])


def test_pixels_that_tie_at_the_edge_of_the_tenth_are_left_out():
    """Of 30 pixels 3 count, and of sparse maps only those that are not 0."""
    sparse = lambda *entries: torch.zeros(1, 30).index_fill_(1, torch.tensor(entries), 1.0)
    for first, second, want in (
        (sparse(4), sparse(20), 0),
        (sparse(4, 5), sparse(4, 5), 1),
        (sparse(4, 5), sparse(5), 1 / 2),
        (sparse(4, 5, 6), -sparse(6, 7), 1 / 3),
        (2 * sparse(4, 5) + sparse(1, 2), sparse(1, 4), 1 / 2),  # 1 and 2 tie for the third place
        (sparse(4, 5, 6, 7), sparse(4), np.nan),
        (torch.ones(1, 30), sparse(4), np.nan),
    ):
        for a, b in ((first, second), (second, first)):
            np.testing.assert_allclose(compare(a, b)["top_overlap"], [want])


def test_without_ties_the_tenth_is_counted_as_it_stands():
    a, b = images(20, 3, 9), images(20, 3, 9) + images(20, 3, 9, seed=1)
    tops = [set(np.argsort(m.abs().sum(0).flatten().numpy())[-8:]) for m in (*a, *b)]
    want = [len(tops[i] & tops[20 + i]) / 8 for i in range(20)]
    np.testing.assert_allclose(compare(a, b)["top_overlap"], want)


def test_unrelated_maps_share_a_tenth_of_their_top_pixels():
    a, b = images(200, side=20), images(200, side=20, seed=1)
    found = compare(a, b)
    assert found["top_overlap"].mean() == pytest.approx(0.1, abs=0.01)
    assert abs(found["spearman"].mean()) < 0.01
    assert abs(found["ssim"].mean()) < 0.05


def test_ssim_notices_a_change_of_sign():
    a = images(5, 1, 12)
    assert (compare(a, -a)["ssim"] < -0.5).all()


@pytest.mark.parametrize("size", [(1, 7, 7), (3, 7, 9), (1, 8, 8), (3, 12, 12), (3, 32, 32)])
def test_ssim_is_that_of_the_formula_over_the_windows_inside_the_image(size):
    a, noise = (torch.randn(4, *size, generator=torch.Generator().manual_seed(seed)).double() for seed in (0, 1))
    b = a + 0.5 * noise
    a[1], b[1] = 1000 * a[1], 1000 * b[1]  # a scale is the image's own
    windows = lambda m: nn.functional.unfold((1 + m / scale)[:, None], 7)  # of each channel: (C, 49, places)
    found = compare(a, b)["ssim"]
    for i in range(4):
        scale = a[i].abs().max()
        p, q = windows(a[i]), windows(b[i])  # SSIM takes positive images
        p_mean, q_mean, c1, c2 = p.mean(1), q.mean(1), (0.01 * 2) ** 2, (0.03 * 2) ** 2
        shared = ((p - p_mean[:, None]) * (q - q_mean[:, None])).sum(1) / 48
        formula = (2 * p_mean * q_mean + c1) * (2 * shared + c2)
        formula /= (p_mean**2 + q_mean**2 + c1) * (p.var(1) + q.var(1) + c2)
        assert found[i] == pytest.approx(formula.mean().item(), abs=1e-12)


@pytest.mark.parametrize("shape", [(2, 1, 6, 9), (2, 1, 9, 6), (2, 64), (2, 8, 8)])
def test_ssim_is_nan_for_what_is_no_image_or_a_small_one(shape):
    found = compare(torch.randn(shape), torch.randn(shape))
    assert np.isnan(found["ssim"]).all()
    assert all(np.isfinite(found[name]).all() for name in MEASURES if name != "ssim")


def test_a_zero_map_gives_nan_or_infinity_and_spoils_no_other():
    a, b = images(3), images(3, seed=1)
    want = compare(a[1:], b[1:])
    zero = torch.zeros(1, 1, 9, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before_zero = compare(torch.cat([zero, a[1:]]), b)
        both_zero = compare(torch.cat([zero, a[1:]]), torch.cat([zero, b[1:]]))
        after_zero = compare(a, torch.cat([zero, b[1:]]))
    assert np.isinf(before_zero["relative_change"][0])
    assert np.isnan(both_zero["relative_change"][0])
    assert after_zero["relative_change"][0] == pytest.approx(1)
    for found in (before_zero, both_zero, after_zero):
        assert np.isnan(found["cosine"][0])
        for name in MEASURES:
            np.testing.assert_allclose(found[name][1:], want[name], rtol=1e-6, err_msg=name)
    assert np.isnan(before_zero["ssim"][0])
    assert np.isnan(both_zero["ssim"][0])


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 999), st.integers(1, 3), st.sampled_from([7, 10]))
def test_a_map_is_compared_as_if_it_were_alone(seed, channels, side):
    a, b = images(4, channels, side, seed), images(4, channels, side, seed + 1000)
    whole = compare(a, b)
    for i in range(4):
        for name, value in compare(a[i : i + 1], b[i : i + 1]).items():
            np.testing.assert_allclose(value, whole[name][i : i + 1], rtol=1e-5, atol=1e-7, err_msg=name)


def test_maps_of_different_shapes_are_refused():
    for other in (images(3), images(4, channels=2), images(4).flatten(1), images(4)[:, :, :8]):
        with pytest.raises(ValueError, match=r"maps of shapes \(4, 1, 9, 9\) and .* can't be compared"):
            compare(images(4), other)


@pytest.mark.parametrize("shape", [(), (3,), (3, 0), (3, 1, 0, 8)])
def test_maps_without_entries_are_refused_and_no_maps_are_none(shape):
    with pytest.raises(ValueError, match=re.escape(str(shape))):
        compare(torch.zeros(shape), torch.zeros(shape))
    assert all(len(values) == 0 for values in compare(images(0), images(0)).values())


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_a_map_with_nan_or_infinity_gives_nan_and_spoils_no_other(broken):
    a, b, bad = images(3), images(3, seed=1), images(3)
    want = compare(a, b)
    bad[1, 0, 4, 4] = broken
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for found in (compare(bad, b), compare(b, bad), compare(bad, bad)):
            assert all(np.isnan(values[1]) for values in found.values())
            assert not any(np.isnan(values[[0, 2]]).any() for values in found.values())
        for name, values in compare(bad, b).items():
            np.testing.assert_array_equal(values[[0, 2]], want[name][[0, 2]])


def test_a_constant_map_has_no_ranks_and_no_largest_pixels():
    ones = torch.ones(2, 1, 9, 9)
    for found in (compare(ones, 2 * ones), compare(ones, images(2)), compare(images(2), ones)):
        assert np.isnan(found["spearman"]).all()
        assert np.isnan(found["top_overlap"]).all()
        assert np.isfinite([found[name] for name in ("relative_change", "cosine", "ssim")]).all()
    np.testing.assert_allclose(compare(ones, 2 * ones)["cosine"], 1)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.float16, torch.float64])
def test_maps_of_any_kind_of_number_are_compared_in_float64(dtype):
    a, b = ((100 * images(3, seed=seed).abs()).to(dtype) for seed in (0, 1))
    for name, values in compare(a, b.requires_grad_(dtype.is_floating_point)).items():
        np.testing.assert_array_equal(values, compare(a.double(), b.detach().double())[name])
        assert values.dtype == np.float64


@pytest.mark.parametrize("factor", [1e-200, 1e200])
def test_the_scale_of_both_maps_does_not_matter(factor):
    a, b = images(3).double(), images(3, seed=1).double()
    want = compare(a, b)
    for name, values in compare(factor * a, factor * b).items():
        np.testing.assert_allclose(values, want[name], rtol=1e-9, err_msg=name)


# -------------------------------------------------------------------------------------------------- Captum's scores
@pytest.fixture
def seen(monkeypatch):
    """Every x that is explained."""
    inputs = []

    def spy(model, x, *arguments, **options):
        inputs.append(x.clone())
        return explain(model, x, *arguments, **options)

    monkeypatch.setattr(steadiness, "explain", spy)
    return inputs


@pytest.mark.parametrize("method", ["gradient", "input_x_gradient", "deeplift"])
def test_sensitivity_is_the_largest_change_over_random_steps_of_the_length(seen, method):
    model, x, y = curved(), torch.rand(5, 1, 6, 6), torch.arange(5) % 3
    x[0] = x[0].round()  # a corner of the box
    start = explain(model, x, y, method)
    found = captum_scores(model, x, y, method, 0.05, 7, start)["sensitivity_max"]
    moved = [at for at in seen if not torch.equal(at, x)]
    assert len(moved) == 7
    worst = torch.zeros(5)
    for at in moved:
        np.testing.assert_allclose((at - x).flatten(1).norm(dim=1), 0.05, rtol=1e-4)
        assert ((at >= 0) & (at <= 1)).all()
        change = (explain(model, at, y, method) - start).flatten(1).norm(dim=1) / start.flatten(1).norm(dim=1)
        worst = torch.maximum(worst, change)
    directions = torch.stack([(at - x).flatten() for at in moved])
    assert (torch.corrcoef(directions).fill_diagonal_(0).abs() < 0.5).all(), "steps repeat"
    np.testing.assert_allclose(found, worst, rtol=1e-4)


def test_samples_are_not_compared_with_the_first_one():
    """A linear network's gradient never changes, but samples of other labels have other gradients."""
    model, x, y = linear(), torch.rand(6, 1, 6, 6), torch.arange(6) % 3
    found = captum_scores(model, x, y, "gradient", 0.1, 5, explain(model, x, y))
    np.testing.assert_allclose(found["sensitivity_max"], 0, atol=1e-6)


@pytest.mark.parametrize("method", ["gradient", "input_x_gradient", "integrated_gradients", "deeplift"])
def test_infidelity_of_a_linear_network_is_zero_and_scale_does_not_matter(method):
    model, x, y = linear(), 0.1 + 0.8 * torch.rand(6, 1, 6, 6), torch.arange(6) % 3
    start = explain(model, x, y, method)
    for factor in (1.0, -30.0):
        found = captum_scores(model, x, y, method, 0.05, 10, factor * start)["infidelity"]
        np.testing.assert_allclose(found, 0, atol=1e-4)


def test_infidelity_of_a_map_that_says_nothing_is_near_one():
    model, x, y = linear(), torch.rand(6, 1, 6, 6), torch.arange(6) % 3
    w = model[1].weight.detach()[y].view_as(x)
    unrelated = torch.randn_like(x)
    unrelated -= w * ((unrelated * w).flatten(1).sum(1) / (w * w).flatten(1).sum(1)).view(-1, 1, 1, 1)
    found = captum_scores(model, x, y, "gradient", 0.05, 300, unrelated)["infidelity"]
    assert ((found > 0.9) & (found <= 1)).all()
    np.testing.assert_allclose(captum_scores(model, x, y, "gradient", 0.05, 5, 0 * x)["infidelity"], 1)


@pytest.mark.parametrize("scalar", ["logit", "loss"])
def test_infidelity_is_the_share_of_the_change_that_the_map_leaves_unexplained(scalar):
    """Least squares of f(x) − f(x + η) on −⟨map, η⟩, through 0."""
    model, x, y, steps = curved(), torch.rand(4, 1, 6, 6), torch.arange(4) % 3, []
    start = torch.randn_like(x) * 0.3 + explain(model, x, y, scalar=scalar)
    note = lambda _, given: steps.append(given[0].detach() - x) if len(given[0]) == len(x) else None
    handle = model.register_forward_pre_hook(note)
    found = captum_scores(model, x, y, "gradient", 0.5, 9, start, scalar=scalar)["infidelity"]
    handle.remove()
    tail = [step for step in steps if step.any()][-9:]  # those of the last call to Captum's infidelity
    f = lambda at: (
        nn.functional.cross_entropy(model(at), y, reduction="none")
        if scalar == "loss"
        else model(at).gather(1, y[:, None])[:, 0]
    )
    with torch.no_grad():
        change = torch.stack([f(x + step) - f(x) for step in tail]).double()
        foretold = torch.stack([(start * step).flatten(1).sum(1) for step in tail]).double()
    beta = (change * foretold).sum(0) / (foretold**2).sum(0)
    want = ((change - beta * foretold) ** 2).sum(0) / (change**2).sum(0)
    np.testing.assert_allclose(found, want, rtol=1e-2, atol=1e-4)
    assert ((found > 0.01) & (found < 1)).all(), "nothing to see"


def test_captum_scores_repeat_and_leave_the_model_the_images_and_the_generator_alone():
    model, x, y = curved().train(), torch.rand(4, 1, 6, 6), torch.arange(4) % 3
    pixels = x.clone()
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    for method in ("gradient", "smoothgrad"):
        score = lambda seed, method=method: captum_scores(
            model, x, y, method, 0.1, 3, explain(model, x, y, method), batch_size=2, seed=seed
        )
        first, second, other = score(0), score(0), score(1)
        for name in ("sensitivity_max", "infidelity"):
            assert first[name].shape == (4,)
            np.testing.assert_array_equal(first[name], second[name])
            assert (first[name] != other[name]).all(), "the seed does nothing"
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.training
    assert torch.equal(x, pixels)
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())


# ------------------------------------------------------------------------------------------------------- intervals
def frame(values, **columns) -> pd.DataFrame:
    about = dict(method="gradient", weights="trained", noise="random", eps=0.1) | columns
    return pd.DataFrame(about | {"relative_change": values})


@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_summary_is_the_statistic_of_each_group_over_its_finite_rows(statistic):
    rng = np.random.default_rng(0)
    values = rng.exponential(size=(3, 30))
    values[0, :4], values[1, 5] = np.nan, np.inf
    table = pd.concat([frame(values[0]), frame(values[1], eps=0.2), frame(values[2], weights="random", noise="worst")])
    got = summary(table, statistic=statistic)
    assert list(got.columns) == ["method", "weights", "noise", "eps", "n", "value", "low", "high"]
    assert list(got.n) == [26, 29, 30]
    assert list(zip(got.weights, got.noise, got.eps, strict=True)) == [
        ("trained", "random", 0.1), ("trained", "random", 0.2), ("random", "worst", 0.1)
    ]  # fmt: skip
    for row, part in zip(got.itertuples(), values, strict=True):
        assert row.value == pytest.approx(getattr(np, statistic)(part[np.isfinite(part)]))
        assert row.low < row.value < row.high


def test_summary_by_other_columns_and_of_another_measure():
    table = frame([1.0, 2.0, 3.0, 4.0]).assign(net=["a", "a", "b", "b"], ssim=[0.1, 0.3, 0.5, 0.9])
    got = summary(table, "ssim", by=("net",))
    assert list(got.net) == ["a", "b"]
    np.testing.assert_allclose(got.value, [0.2, 0.7])


def test_nan_is_a_value_to_go_by_and_a_column_may_stand_alone():
    table = frame([1.0, 2.0, 3.0, 4.0]).assign(eps=[0.1, np.nan, 0.1, np.nan], net=["a", None, "a", "b"])
    for got in (summary(table, by="eps"), summary(table, by=["eps"])):
        np.testing.assert_array_equal(got.eps, [0.1, np.nan])
        np.testing.assert_array_equal(got.value, [2, 3])
    assert list(summary(table, by=("net", "eps")).n) == [2, 1, 1]
    nets = table.assign(net=pd.Categorical(["a", "a", "b", "b"], ["a", "b", "c"]))
    assert list(summary(nets, by="net").net) == ["a", "b"], "of categories only those there are"
    empty = summary(table[:0], by="net")
    assert list(empty.columns) == ["net", "n", "value", "low", "high"]
    assert len(empty) == 0


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=30), st.sampled_from(["mean", "median"]))
def test_the_interval_lies_among_the_values(values, statistic):
    (row,) = summary(frame(values), statistic=statistic, resamples=200).itertuples()
    slack = 1e-9 * max(map(abs, values)) + 1e-12
    assert min(values) - slack <= row.low <= row.high <= max(values) + slack


def test_intervals_shrink_with_the_root_of_n_and_cover_the_truth():
    rng = np.random.default_rng(1)
    width = lambda n: np.mean([np.subtract(*interval(rng.normal(size=n))[::-1]) for _ in range(5)])
    assert width(1600) / width(100) == pytest.approx(1 / 4, rel=0.15)
    draws = [interval(rng.normal(3, 2, size=40)) for _ in range(100)]
    covered = sum(low <= 3 <= high for low, high in draws)
    assert 85 <= covered <= 100
    assert np.mean([high - low for low, high in draws]) == pytest.approx(2 * 1.96 * 2 / math.sqrt(40), rel=0.1)


def interval(values: np.ndarray, **options) -> tuple[float, float]:
    (row,) = summary(frame(values), **options).itertuples()
    return row.low, row.high


def test_the_same_seed_gives_the_same_interval():
    values = np.random.default_rng(2).normal(size=50)
    assert interval(values, seed=4) == interval(values, seed=4)
    assert interval(values, seed=4) != interval(values, seed=5)


def test_constant_single_and_missing_values():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (row,) = summary(frame([0.5] * 7)).itertuples()
        assert (row.n, row.value, row.low, row.high) == (7, 0.5, 0.5, 0.5)
        (row,) = summary(frame([0.5])).itertuples()
        assert (row.n, row.value, row.low, row.high) == (1, 0.5, 0.5, 0.5)
        (row,) = summary(frame([np.nan, np.inf])).itertuples()
        assert row.n == 0
        assert np.isnan([row.value, row.low, row.high]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(statistic="mode"), "unknown statistic 'mode': known are mean, median"),
        (dict(measure="spearmann"), "unknown column 'spearmann'"),
        (dict(measure="relative_chang"), "did you mean 'relative_change'"),
        (dict(by=("method", "net")), "unknown column 'net'"),
        (dict(by="net"), "unknown column 'net'"),
        (dict(by=()), r"by=\(\)"),
        (dict(measure="method"), "gradient"),
    ],
)
def test_unknown_names_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        summary(frame([1.0, 2.0]), **change)
