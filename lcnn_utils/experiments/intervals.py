"""How sure is a number that comes from a few trained networks and many images?

Seeds are the unit: networks trained from other seeds differ by more than their images tell, so intervals are Welch's t
over seeds. All networks see the same images, so images are paired: what counts is how much an image's own difference
varies. The half-widths of both are added as squares. One seed tells nothing of other trainings: it has no interval.
That 95 % intervals hold the truth as often as they say is simulated in tests/unit/experiments/test_intervals.py.

Reference: B. L. Welch, *The generalization of "Student's" problem*, Biometrika 34 (1947).
"""

from __future__ import annotations

import numpy as np

CONFIDENCE = 0.95
Interval = tuple[float, float, float]  # a value, and the ends of its interval: NaN where there is none
MISSING: Interval = (np.nan, np.nan, np.nan)


def mean_interval(means: np.ndarray, by_image: np.ndarray) -> Interval:
    """Of a mean. ``means``: over the images, one for each seed (S,). ``by_image``: over the seeds, one for each image
    (N,)."""
    return _interval([means], float(np.mean(means)), by_image, len(by_image))


def difference_interval(of: np.ndarray, over: np.ndarray, by_image: np.ndarray, images: int | None = None) -> Interval:
    """Of a difference of two methods. ``of``, ``over``: their means over the images, one for each seed (S,), (T,).
    ``by_image``: the difference of their means over seeds, one for each image (N,). ``images``: how many the means are
    over, where ``by_image`` has only some of them."""
    return _interval([of, over], float(np.mean(of) - np.mean(over)), by_image, images or len(by_image))


def geometric_interval(values: np.ndarray) -> Interval:
    """Of a mean of positive numbers, values (S, N) of each seed and image: a mean over images, then the geometric one
    over seeds. NaN: a mean isn't positive or finite, or there are no two images."""
    log_means, shares = _logarithms(values)
    value, low, high = np.exp(mean_interval(log_means, shares))
    return float(value), float(low), float(high)


def ratio_interval(of: np.ndarray, over: np.ndarray) -> Interval:
    """Of a ratio of two such means, (S, N) and (T, N): the same images for both. NaN as above."""
    (log_of, shares_of), (log_over, shares_over) = _logarithms(of), _logarithms(over)
    value, low, high = np.exp(difference_interval(log_of, log_over, shares_of - shares_over))
    return float(value), float(low), float(high)


def _logarithms(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logarithms of the means over images (S,), and what each image adds to their mean, to first order (N,)."""
    means = values.mean(1, keepdims=True) if values.shape[1] > 1 else np.zeros((len(values), 1))
    if not (np.isfinite(means) & (means > 0)).all():
        return np.full(len(values), np.nan), np.full(values.shape[1], np.nan)
    return np.log(means).squeeze(1), (values / means).mean(0)


def _interval(sides: list[np.ndarray], value: float, by_image: np.ndarray, images: int) -> Interval:
    """The value with its interval, from one or two methods' means by seed."""
    from scipy.stats import t  # here: it takes half a second to import

    if np.isnan(value) or min(len(by_image), *map(len, sides)) < 2:
        return value, np.nan, np.nan
    variances = np.array([side.var(ddof=1) / len(side) for side in sides])
    freedom = [len(side) - 1 for side in sides]
    total = variances.sum()
    welch = total**2 / (variances**2 / freedom).sum() if total > 0 else 1  # degrees of freedom
    quantile = (1 + CONFIDENCE) / 2
    of_seeds = t.ppf(quantile, welch) * total**0.5
    of_images = t.ppf(quantile, len(by_image) - 1) * by_image.std(ddof=1) / images**0.5
    half = float(np.hypot(of_seeds, of_images))
    return value, value - half, value + half
