"""Intervals over seeds and images: against scipy's Welch, and how often they hold the truth."""

import numpy as np
import pytest
from scipy import stats

from lcnn_utils.experiments.intervals import difference_interval, geometric_interval, mean_interval, ratio_interval

DRAWS = 500


@pytest.fixture
def draw():
    return np.random.default_rng(0)


def test_without_images_it_is_welch(draw):
    """Images that all agree add nothing: scipy's Welch of the seeds, also of logarithms for ratios."""
    of, over, same = draw.normal(5, 1, 4), draw.normal(4, 0.3, 3), np.ones(20)
    welch = stats.ttest_ind(of, over, equal_var=False).confidence_interval()
    assert difference_interval(of, over, same) == pytest.approx((of.mean() - over.mean(), welch.low, welch.high))
    student = stats.ttest_1samp(of, 0).confidence_interval()
    assert mean_interval(of, same) == pytest.approx((of.mean(), student.low, student.high))
    welch = stats.ttest_ind(np.log(of), np.log(over), equal_var=False).confidence_interval()
    values = [side[:, None] * np.ones((1, 20)) for side in (of, over)]
    mean = stats.gmean(of) / stats.gmean(over)
    assert ratio_interval(*values) == pytest.approx((mean, np.exp(welch.low), np.exp(welch.high)))
    assert geometric_interval(values[0])[0] == pytest.approx(stats.gmean(of))


def test_without_differences_of_seeds_it_is_the_paired_t(draw):
    """Networks of a method that agree: the paired t of images, narrower where fewer of them stand for more."""
    of = draw.random(100) < 0.8
    over = np.where(draw.random(100) < 0.1, ~of, of)
    sides = np.full(2, of.mean()), np.full(2, over.mean())
    by_image = of.astype(float) - over
    paired = stats.ttest_1samp(by_image, 0).confidence_interval()
    value, low, high = difference_interval(*sides, by_image)
    assert (value, low, high) == pytest.approx((by_image.mean(), paired.low, paired.high))
    _, low_of_more, high_of_more = difference_interval(*sides, by_image, images=10_000)
    assert high_of_more - low_of_more == pytest.approx((high - low) / 10)


@pytest.mark.parametrize("side", [0, 1])
def test_one_seed_has_no_interval_and_no_positive_mean_no_ratio(side, draw):
    sides = [draw.random((2, 10)), draw.random((2, 10))]
    one_seed = [*sides]
    one_seed[side] = one_seed[side][:1]
    value, *ends = ratio_interval(*one_seed)
    assert np.isfinite(value)
    assert np.isnan(ends).all()
    for bad in (0.0, -1.0, np.inf, np.nan):
        spoiled = [values.copy() for values in sides]
        spoiled[side][0] = bad
        assert np.isnan(ratio_interval(*spoiled)).all()
    assert np.isnan(ratio_interval(*(values[:, :1] for values in sides))).all(), "of one image nothing is known"


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("images", [100, 1000])
@pytest.mark.parametrize(("sd_of", "sd_over"), [(0.05, 0.05), (0.3, 0.3), (0.05, 0.3)])
def test_coverage_of_ratios(seeds, images, sd_of, sd_over, draw):
    """Skewed values of images that are hard for all networks, for one method, and for one network."""
    held, truth = 0, 3.0
    for _ in range(DRAWS):
        hard, sides = draw.normal(0, 0.6, images), []
        for scale, sd in ((truth, sd_of), (1.0, sd_over)):
            of_method = hard + draw.normal(0, 0.4, images)
            of_network = draw.normal(0, sd, (seeds, 1)) + draw.normal(0, 0.4, (seeds, images))
            sides.append(scale * np.exp(of_method + of_network))
        _, low, high = ratio_interval(*sides)
        held += low <= truth <= high
    assert held >= 0.92 * DRAWS


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("images", [100, 1000])
@pytest.mark.parametrize("sd", [0.0, 0.3])
def test_coverage_of_differences(seeds, images, sd, draw):
    """Accuracies of two methods that are equal in the population of images and seeds."""
    held = 0
    for _ in range(DRAWS):
        hard, sides = draw.normal(1.5, 1.5, images), []
        for _ in range(2):
            of_method = hard + draw.normal(0, 0.5, images)
            logits = of_method + draw.normal(0, sd, (seeds, 1)) + draw.normal(0, 0.7, (seeds, images))
            sides.append((logits > 0).astype(float))
        by_image = sides[0].mean(0) - sides[1].mean(0)
        _, low, high = difference_interval(sides[0].mean(1), sides[1].mean(1), by_image)
        held += low <= 0 <= high
    assert held >= 0.92 * DRAWS
