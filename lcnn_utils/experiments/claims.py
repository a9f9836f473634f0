"""The paper's claims, each with the number it printed, ours, and whether ours bears it out: all computed.

A claim holds when the whole 95 % interval of ours says so, fails when none of it does, and is open in between. Where no
interval can be had, the verdict is "one run".
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import pandas as pd
from scipy.stats import ttest_ind

from ..attacks import wilson
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
        if np.isnan(low):
            return "one run"
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
    """A row an image, a column a method (its label) and seed; NaN where a run lacks the image."""
    if not published.has(f"{dataset}_{kind}"):
        return pd.DataFrame()
    frame = _images(f"{dataset}_{kind}")
    for name, value in where.items():
        same = np.isclose(frame[name], value) if isinstance(value, float) else frame[name] == value
        frame = frame[same]
    return frame.pivot_table(index="image", columns=["label", "seed"], values=column, sort=False)


def _ratio(frame: pd.DataFrame, above: str, below: str, resamples: int = 2000) -> Interval:
    """Mean over images and seeds of one method over that of another, with a percentile bootstrap.

    Images that all these runs have are drawn with replacement, the same ones for all, and seeds for each method on its
    own. With one seed the interval knows of images only; with a few it still says too little of seeds.
    """
    if "label" not in frame.columns.names or not {above, below} <= set(frame.columns.get_level_values("label")):
        return MISSING
    frame = frame[[above, below]].dropna()
    n = len(frame)
    if n < 2:
        return MISSING
    draw = np.random.default_rng(0)
    images = np.stack([np.bincount(draw.integers(n, size=n), minlength=n) for _ in range(resamples)]) / n
    means = []
    for label in (above, below):
        by_seed = images @ frame[label].to_numpy(float)  # (resamples, seeds)
        seeds = draw.integers(by_seed.shape[1], size=by_seed.shape)
        means.append(np.take_along_axis(by_seed, seeds, 1).mean(1))
    low, high = np.quantile(means[0] / means[1], (0.025, 0.975))
    return float(frame[above].to_numpy().mean() / frame[below].to_numpy().mean()), float(low), float(high)


def _gain(frame: pd.DataFrame, of: str, over: str) -> Interval:
    """Difference of two methods' shares in points: the mean over seeds, with the wider of two intervals on each side.

    Over images (n of one seed, as seeds share them): Newcombe's from Wilson's (R. Newcombe, Stat. Med. 17, 1998, method
    10), for independent samples, so too wide. Over seeds, where both methods have several: Welch's t.

    Args:
        frame: a row a run: label, share in [0, 1], n.
    """
    a, b = (frame[frame.label == label] for label in (of, over))
    if not len(a) or not len(b):
        return MISSING
    (p, p_low, p_high), (q, q_low, q_high) = (
        (part.share.mean(), *wilson(round(part.share.mean() * part.n.iloc[0]), int(part.n.iloc[0]))) for part in (a, b)
    )
    down, up = np.hypot(p - p_low, q_high - q), np.hypot(p_high - p, q - q_low)
    if min(len(a), len(b)) > 1 and a.share.std() + b.share.std() > 0:
        welch = ttest_ind(a.share, b.share, equal_var=False).confidence_interval()
        down, up = max(down, p - q - welch.low), max(up, welch.high - (p - q))
    return 100 * (p - q), 100 * (p - q - down), 100 * (p - q + up)


def _left(dataset: str, eps: float) -> pd.DataFrame:
    """What PGD in L2 leaves of each run at ε, as :func:`_gain` takes it."""
    if not published.has(f"{dataset}_curves"):
        return pd.DataFrame(columns=["label", "share", "n"])
    frame = _images(f"{dataset}_curves")
    frame = frame[(frame.norm == "l2") & np.isclose(frame.eps, eps)]
    return frame.assign(share=frame.correct / frame.n)[["label", "share", "n"]]


def _accuracy(dataset: str, of: str, over: str) -> Interval:
    """Difference in accuracy on the whole test split, in points."""
    if not published.has(f"{dataset}_runs"):
        return MISSING
    return _gain(_images(f"{dataset}_runs").rename(columns={"accuracy": "share", "images": "n"}), of, over)


def _costs(of: str, over: str) -> Measure:
    return (lambda d: np.nan), (lambda d: _cost(d, of, over))  # nothing is known to be printed


def _cost(dataset: str, of: str, over: str) -> Interval:
    """Seconds of training over those of another method, means over seeds; the interval is the range over seeds.

    With one seed each there is none.
    """
    if not published.has(f"{dataset}_runs"):
        return MISSING
    seconds = _images(f"{dataset}_runs").groupby("label").seconds
    mean, least, most = seconds.mean(), seconds.min(), seconds.max()
    if not {of, over} <= set(mean.index):
        return MISSING
    if seconds.size()[[of, over]].max() == 1:
        return mean[of] / mean[over], np.nan, np.nan
    return mean[of] / mean[over], least[of] / most[over], most[of] / least[over]


def _curvature(above: str, below: str, scalar: str = "curvature") -> Measure:
    def theirs(dataset: str) -> float:
        printed = _printed("paper table 1", dataset, "curvature")
        return printed[above] / printed[below] if scalar == "curvature" else np.nan

    return theirs, (lambda d: _ratio(_by_image(d, "geometry", scalar, split="test"), above, below))


def _steady(above: str, below: str) -> Measure:
    def theirs(dataset: str) -> float:
        printed = _printed("paper gradient-robustness", dataset, "relative_gradient_change", NOISE)
        return printed[above] / printed[below]

    gradients = dict(method="gradient", weights="trained", noise="random", eps=NOISE)
    ours = lambda d: _ratio(_by_image(d, "stability", "relative_change", **gradients), above, below)
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


OVER, STEADIER = "C of {} over {}'s, times", "change of ∇ℓ at ‖η‖ = 0.01, {} over {}'s, times"
KEPT, ACCURACY = "points kept at ε = 0.1, {} minus {}", "accuracy in points, {} minus {}"
SECONDS = "seconds of training, {} over {}'s, times"


def _claim(
    text: str, form: str, of: str, over: str, rule: str, measure: Callable[..., Measure], *more, **limits
) -> Claim:
    return Claim(text, form.format(of, over), rule, measure(of, over, *more), **limits)


CLAIMS = (
    _claim("LCNN has a far lower curvature than Standard", OVER, STANDARD, LCNN, "at least 3.5", _curvature, low=3.5),
    _claim("LCNN is as accurate as Standard", ACCURACY, LCNN, STANDARD, "within ± 1", _clean, low=-1, high=1),
    _claim("LCNN + GradReg has a tenth of Standard's", OVER, STANDARD, BOTH, "at least 10", _curvature, low=10),
    _claim("LCNN + GradReg has less than LCNN", OVER, LCNN, BOTH, "above 1", _curvature, low=1, strict=True),
    _claim("LCNN + GradReg is as accurate as Standard", ACCURACY, BOTH, STANDARD, "within ± 1", _clean, low=-1, high=1),
    _claim("LCNN's gradients are steadier than Standard's", STEADIER, STANDARD, LCNN, "above 1", _steady, low=1,
           strict=True),
    _claim("LCNN + GradReg's are steadier than LCNN's", STEADIER, LCNN, BOTH, "above 1", _steady, low=1, strict=True),
    _claim("LCNN alone gains robustness", KEPT, LCNN, STANDARD, "above 0", _robust, low=0, strict=True),
    _claim("… but only a little", KEPT, LCNN, STANDARD, "at most 5", _robust, high=5),
    _claim("GradReg gains a lot", KEPT, GRADREG, STANDARD, "at least 10", _robust, low=10),
    _claim("LCNN adds to GradReg", KEPT, BOTH, GRADREG, "above 0", _robust, low=0, strict=True),
    _claim("Adversarial training is more robust than LCNN + GradReg", KEPT, ADVERSARIAL, BOTH, "above 0", _robust,
           low=0, strict=True),
    _claim("LCNN costs less than adversarial training", SECONDS, LCNN, ADVERSARIAL, "below 1", _costs, high=1,
           strict=True),
    _claim("LCNN + GradReg costs less than adversarial training", SECONDS, BOTH, ADVERSARIAL, "below 1", _costs, high=1,
           strict=True),
)  # fmt: skip
BEYOND = (  # what the published tables show too, though the paper does not say so, and what they leave out
    _claim("A fixed softplus is as little curved as an LCNN", OVER, SOFTPLUS, LCNN, "between 0.8 and 1.25", _curvature,
           low=0.8, high=1.25),
    _claim("… in the margin too", OVER.replace("C", "C of the margin,"), SOFTPLUS, LCNN, "between 0.8 and 1.25",
           _curvature, "margin_curvature", low=0.8, high=1.25),
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


def shown(frame: pd.DataFrame, heading: str = "claim") -> pd.DataFrame:
    """A table of :func:`table` for reading: a row a claim, ours with its interval, verdicts in words."""
    number = lambda v: "–" if np.isnan(v) else f"{v:.3g}"
    rows = zip(frame.ours, frame.low, frame.high, strict=True)
    ours = [number(v) + (f" ({number(low)} – {number(high)})" if low == low else "") for v, low, high in rows]
    columns = {heading: frame.claim, "what is measured": frame.value, "asked": frame.rule}
    return pd.DataFrame(columns | {"published": frame.theirs.map(number), "ours": ours, "verdict": frame.verdict})
