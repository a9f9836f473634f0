"""The paper's claims, each with the number it printed, ours, and whether ours bears it out: all computed.

A claim holds when the whole 95 % interval of ours says so, fails when none of it does, and is open in between.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import bootstrap

from . import published

STANDARD, LCNN, GRADREG, BOTH = "Standard", "LCNN", "GradReg", "LCNN + GradReg"
ADVERSARIAL, SOFTPLUS = "Adversarial training", "Softplus + weight decay"
NOISE, EPS = 0.01, 0.1  # lengths at which the figure and Table 2 are read
Interval = tuple[float, float, float]  # a value and its 95 % interval
Measure = tuple[Callable[[str], float], Callable[[str], Interval]]  # by the name of a dataset: theirs, ours
MISSING: Interval = (float("nan"),) * 3


@dataclass(frozen=True)
class Claim:
    """Something the paper says that can be measured.

    Attributes:
        text: what it says.
        value: what is measured, with its unit.
        rule: what of it must hold, in words; ``low`` and ``high`` are the same in numbers, and ``strict`` says that
            neither is enough ("above", "below").
        measure: the value by a dataset's name, of the published numbers and of our results.
    """

    text: str
    value: str
    rule: str
    measure: Measure
    low: float = -np.inf
    high: float = np.inf
    strict: bool = False

    def verdict(self, interval: Interval) -> str:
        value, low, high = interval
        if np.isnan(value):
            return "not measured"
        beyond, outside = (operator.gt, operator.ge) if self.strict else (operator.ge, operator.gt)
        if beyond(low, self.low) and beyond(self.high, high):
            return "holds"
        return "fails" if outside(self.low, high) or outside(low, self.high) else "open"


def _printed(source: str, dataset: str, quantity: str, epsilon: float | None = None) -> dict[str, float]:
    """Method → what the paper prints; of CIFAR-100 where it prints nothing on the dataset."""
    rows = published.numbers(source)
    rows = rows[rows.quantity == quantity]
    rows = rows[rows.dataset == dataset] if (rows.dataset == dataset).any() else rows[rows.dataset == "cifar100"]
    if epsilon is not None:
        rows = rows[np.isclose(rows.epsilon.astype(float), epsilon)]
    return dict(zip(rows.method, rows["mean"], strict=True))


@cache
def _images(name: str) -> pd.DataFrame:
    return published.measured(name)


def _by_image(dataset: str, kind: str, column: str, **where: object) -> pd.DataFrame:
    """A row an image, a column a method (its label): means over seeds; NaN where a method lacks the image."""
    if not published.has(f"{dataset}_{kind}"):
        return pd.DataFrame()
    frame = _images(f"{dataset}_{kind}")
    for name, value in where.items():
        same = np.isclose(frame[name], value) if isinstance(value, float) else frame[name] == value
        frame = frame[same]
    return frame.pivot_table(index="image", columns="label", values=column, sort=False)


def _ratio(frame: pd.DataFrame, above: str, below: str) -> Interval:
    """Mean over images of one method over that of another; images that both have, the same ones resampled for both."""
    if not {above, below} <= set(frame.columns):
        return MISSING
    frame = frame[[above, below]].dropna()
    if len(frame) < 2:
        return MISSING
    a, b = frame[above].to_numpy(float), frame[below].to_numpy(float)
    ratio = lambda a, b, axis: a.mean(axis) / b.mean(axis)
    found = bootstrap((a, b), ratio, paired=True, n_resamples=2000, method="percentile", rng=0).confidence_interval
    return ratio(a, b, 0), found.low, found.high


def _left(dataset: str, eps: float) -> dict[str, tuple[float, float]]:
    """Method → the share (%) that PGD in L2 leaves at ε, and its standard error.

    The error is that of the images of all seeds together, or that over seeds where it is larger.
    """
    if not published.has(f"{dataset}_curves"):
        return {}
    frame = _images(f"{dataset}_curves")
    frame = frame[(frame.norm == "l2") & np.isclose(frame.eps, eps)]
    left = {}
    for label, part in frame.groupby("label", sort=False):
        share, seeds = part.correct.sum() / part.n.sum(), len(part)
        over_seeds = part.accuracy.std() / seeds**0.5 if seeds > 1 else 0.0
        left[str(label)] = 100 * share, 100 * max(over_seeds, (share * (1 - share) / part.n.sum()) ** 0.5)
    return left


def _gain(left: dict[str, tuple[float, float]], of: str, over: str) -> Interval:
    """Difference in points of two methods, with the interval of independent errors (too wide: images are shared)."""
    if not {of, over} <= set(left):
        return MISSING
    (a, ea), (b, eb) = left[of], left[over]
    margin = 1.96 * float(np.hypot(ea, eb))
    return a - b, a - b - margin, a - b + margin


def _accuracy(dataset: str, of: str, over: str) -> Interval:
    """Difference in test accuracy, in points: over seeds, with the error of as many test images where larger."""
    if not published.has(f"{dataset}_runs"):
        return MISSING
    runs = _images(f"{dataset}_runs")
    left = {}
    for label, part in runs.groupby("label", sort=False):
        share, seeds = part.accuracy.mean(), len(part)
        over_seeds = part.accuracy.std() / seeds**0.5 if seeds > 1 else 0.0
        left[str(label)] = 100 * share, 100 * max(over_seeds, (share * (1 - share) / part.images.sum()) ** 0.5)
    return _gain(left, of, over)


def _costs(of: str, over: str) -> Measure:
    return (lambda d: np.nan), (lambda d: _cost(d, of, over))  # nothing is known to be printed


def _cost(dataset: str, of: str, over: str) -> Interval:
    """Seconds of training over those of another method, mean over seeds; the interval is the range over seeds."""
    if not published.has(f"{dataset}_runs"):
        return MISSING
    seconds = _images(f"{dataset}_runs").groupby("label").seconds
    mean, least, most = seconds.mean(), seconds.min(), seconds.max()
    if not {of, over} <= set(mean.index):
        return MISSING
    return mean[of] / mean[over], least[of] / most[over], most[of] / least[over]


def _curvature(above: str, below: str, scalar: str = "curvature") -> Measure:
    def theirs(dataset: str) -> float:
        printed = _printed("paper table 1", dataset, "curvature")
        return printed[above] / printed[below] if scalar == "curvature" else np.nan

    return theirs, (lambda d: _ratio(_by_image(d, "geometry", scalar, split="test"), above, below))


def _steady(below: str) -> Measure:
    def theirs(dataset: str) -> float:
        printed = _printed("paper gradient-robustness", dataset, "relative_gradient_change", NOISE)
        return printed[STANDARD] / printed[below]

    gradients = dict(method="gradient", weights="trained", noise="random", eps=NOISE)
    ours = lambda d: _ratio(_by_image(d, "stability", "relative_change", **gradients), STANDARD, below)
    return theirs, ours


def _robust(of: str, over: str, eps: float = EPS) -> Measure:
    def theirs(dataset: str) -> float:
        printed = _printed("paper table 2", dataset, "pgd_l2_accuracy", eps)
        return printed[of] - printed[over]

    return theirs, (lambda d: _gain(_left(d, eps), of, over))


def _clean(of: str, over: str) -> Measure:
    def theirs(dataset: str) -> float:
        printed = _printed("paper table 1", dataset, "accuracy")
        return printed[of] - printed[over]

    return theirs, (lambda d: _accuracy(d, of, over))


LOWER, GAIN = "C of Standard over C of {}, times", "points kept at ε = 0.1 beyond {}"
STEADIER = "change of ∇ℓ at ‖η‖ = 0.01, Standard's over {}'s, times"
CLAIMS = (
    Claim("LCNN has a far lower curvature", LOWER.format(LCNN), "at least 3.5", _curvature(STANDARD, LCNN), low=3.5),
    Claim("… at equal accuracy", "LCNN's accuracy minus Standard's, points", "within ± 1",
          _clean(LCNN, STANDARD), low=-1, high=1),
    Claim("With GradReg it is lower still", LOWER.format(BOTH), "at least 10", _curvature(STANDARD, BOTH), low=10),
    Claim("… at equal accuracy", "LCNN + GradReg's accuracy minus Standard's, points", "within ± 1",
          _clean(BOTH, STANDARD), low=-1, high=1),
    Claim("LCNN's gradients are steadier", STEADIER.format(LCNN), "above 1", _steady(LCNN), low=1, strict=True),
    Claim("LCNN + GradReg's are steadiest", STEADIER.format(BOTH), "above 1", _steady(BOTH), low=1, strict=True),
    Claim("LCNN alone gains a little robustness", GAIN.format(STANDARD) + ", LCNN", "between 0 and 5",
          _robust(LCNN, STANDARD), low=0, high=5),
    Claim("GradReg gains a lot", GAIN.format(STANDARD) + ", LCNN + GradReg", "at least 10",
          _robust(BOTH, STANDARD), low=10),
    Claim("LCNN adds to GradReg", GAIN.format(GRADREG) + ", LCNN + GradReg", "above 0",
          _robust(BOTH, GRADREG), low=0, strict=True),
    Claim("Adversarial training is the most robust", GAIN.format(BOTH) + ", adversarial training", "above 0",
          _robust(ADVERSARIAL, BOTH), low=0, strict=True),
    Claim("LCNN costs less than adversarial training", "seconds of LCNN's training over adversarial training's",
          "below 1", _costs(LCNN, ADVERSARIAL), high=1, strict=True),
    Claim("LCNN + GradReg too", "seconds of LCNN + GradReg's training over adversarial training's",
          "below 1", _costs(BOTH, ADVERSARIAL), high=1, strict=True),
)  # fmt: skip
BEYOND = (  # what the published tables show too, though the paper does not say so, and what they leave out
    Claim("A fixed softplus is as little curved as an LCNN", "C of Softplus + weight decay over C of LCNN, times",
          "between 0.8 and 1.25", _curvature(SOFTPLUS, LCNN), low=0.8, high=1.25),
    Claim("… also in the margin", "the same, curvature of the margin", "between 0.8 and 1.25",
          _curvature(SOFTPLUS, LCNN, "margin_curvature"), low=0.8, high=1.25),
)  # fmt: skip


def table(dataset: str, claims: tuple[Claim, ...] = CLAIMS) -> pd.DataFrame:
    """A row a claim on one dataset: columns claim, value, rule, low_bound, high_bound (the rule in numbers), theirs,
    theirs_holds, ours, low, high, verdict.

    ``theirs`` is the published number on the dataset, or on CIFAR-100 where there is none; NaN: none was published.

    Raises:
        FileNotFoundError, RuntimeError: as :func:`published.measured`; what was not measured is a row all the same.
    """
    _images.cache_clear()

    def rows() -> Iterator[dict]:
        for claim in claims:
            theirs, interval = claim.measure[0](dataset), claim.measure[1](dataset)
            row = dict(claim=claim.text, value=claim.value, rule=claim.rule, theirs=theirs)
            row |= dict(low_bound=claim.low, high_bound=claim.high)
            row |= {"theirs_holds": claim.verdict((theirs,) * 3)}
            yield row | dict(zip(("ours", "low", "high"), interval, strict=True)) | {"verdict": claim.verdict(interval)}

    return pd.DataFrame(rows())


def shown(frame: pd.DataFrame) -> pd.DataFrame:
    """A table of :func:`table` for reading: a row a claim, ours with its interval, verdicts in words."""
    number = lambda v: "–" if np.isnan(v) else f"{v:.3g}"
    ours = [
        f"{number(r.ours)} ({number(r.low)} – {number(r.high)})" if not np.isnan(r.ours) else "–"
        for r in list[Any](frame.itertuples())
    ]
    columns = {"the paper says": frame.claim, "what is measured": frame.value, "asked": frame.rule}
    return pd.DataFrame(columns | {"published": frame.theirs.map(number), "ours": ours, "verdict": frame.verdict})
