"""The numbers that the paper and others printed, ours beside them, and the paper's claims: which hold of ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..files import PROJECT
from .intervals import CONFIDENCE, MISSING, Interval, difference_interval, ratio_interval
from .results import GEOMETRY, has, measured

TABLES = PROJECT / "data" / "published" / "paper_tables.csv"
CELL = ["method", "quantity", "epsilon"]
READING = 0.05  # relative error of the values read off the printed figure


def published(source: str = "") -> pd.DataFrame:
    """Columns source, dataset, architecture, method (its label), quantity, epsilon, mean, sd, of rows whose source
    begins with ``source`` (ValueError: none does): ``paper table 1`` (CIFAR-100, ResNet-18: geometry, accuracy in %,
    ± over two runs), ``paper table 2`` (PGD), ``paper gradient-robustness figure``,
    ``paper, read off the dashed lines`` (of that figure: C on CIFAR-10), ``course project``."""
    if not TABLES.is_file():
        raise FileNotFoundError(f"{TABLES} is missing: what is published and shipped comes with a clone of the project")
    frame = pd.read_csv(TABLES).rename(columns={"spread": "sd"})
    chosen = frame[frame.source.str.startswith(source)]
    if not len(chosen):
        raise ValueError(f"nothing is published as {source!r}: known are {', '.join(frame.source.unique())}")
    return chosen.reset_index(drop=True)


def ours(dataset: str) -> pd.DataFrame:
    """What we measured on a dataset: columns method, quantity, epsilon, mean, sd (as in :func:`published`), seeds.

    Means over images, then over seeds; sd is the standard deviation over seeds (NaN: one seed). Geometry,
    ``accuracy`` (%, whole test split), ``pgd_l2_accuracy`` and ``pgd_linf_accuracy`` (%, at ``epsilon``), and
    ``relative_gradient_change`` (random noise of length ``epsilon``). What was not measured is not there.
    """
    if not has(f"{dataset}_runs"):
        none = pd.DataFrame(columns=[*CELL, "mean", "sd", "seeds"])
        return none.astype(dict.fromkeys(none.columns[2:], float))
    runs = measured(f"{dataset}_runs")
    runs["accuracy"] *= 100
    kinds = ["accuracy", *GEOMETRY[:3], "curvature_median", "margin_curvature"]
    parts = [runs.melt(["label", "seed"], kinds, "quantity").assign(eps=np.nan)]
    if has(f"{dataset}_curves"):
        curves = measured(f"{dataset}_curves")
        parts.append(curves.assign(quantity="pgd_" + curves.norm + "_accuracy", value=100 * curves.accuracy))
    if has(f"{dataset}_stability"):
        stable = _random_noise(measured(f"{dataset}_stability"))
        means = stable.groupby(["label", "seed", "eps"], sort=False).relative_change.mean().reset_index(name="value")
        parts.append(means.assign(quantity="relative_gradient_change"))
    rows = pd.concat(parts)[["label", "quantity", "eps", "value"]].set_axis([*CELL, "value"], axis=1)
    groups = rows.dropna(subset="value").groupby(CELL, sort=False, dropna=False).value
    return groups.agg(mean="mean", sd="std", seeds="size").reset_index()


def _random_noise(stability: pd.DataFrame) -> pd.DataFrame:
    """The rows that the paper's gradient-robustness figure is about."""
    return stability.query("method == 'gradient' and weights == 'trained' and noise == 'random'")


def comparison(dataset: str, source: str) -> pd.DataFrame:
    """Ours on a dataset beside what is published on it (``source`` as in :func:`published`), a row per printed cell;
    NaN is what we have not measured. No rows: nothing is published on this dataset there.

    Columns method, quantity, epsilon, theirs, theirs_sd, ours, ours_sd, seeds, difference,
    joint_sd (√ of the sum of both squares: standard deviations over runs; values read off the printed figure have
    its reading error, 5 %), within (|difference| ≤ joint_sd; NA where either has none).
    """
    theirs = published(source)
    theirs = theirs[theirs.dataset == dataset]
    sd = theirs.sd.where(~theirs.source.str.contains("digitised"), READING * theirs["mean"])
    cells = theirs[CELL].assign(theirs=theirs["mean"], theirs_sd=sd)
    mine = ours(dataset).rename(columns={"mean": "ours", "sd": "ours_sd"})
    frame = cells.merge(mine, on=CELL, how="left")
    frame["difference"] = frame.ours - frame.theirs
    frame["joint_sd"] = np.hypot(frame.ours_sd, frame.theirs_sd)
    within = (frame.difference.abs() <= frame.joint_sd).astype("boolean")
    return frame.assign(within=within.where(frame.joint_sd.notna()))


STANDARD, LCNN, GRADREG, BOTH = "Standard", "LCNN", "GradReg", "LCNN + GradReg"
ADVERSARIAL, SOFTPLUS = "Adversarial training", "Softplus + weight decay"


@dataclass(frozen=True)
class Claim:
    """The paper's ``text``: ``what`` (of :data:`MEASURES`) of one method over another lies in ``low`` to ``high``."""

    text: str
    what: str
    of: str
    over: str
    low: float = -np.inf
    high: float = np.inf

    @property
    def value(self) -> str:
        """What is measured, with its unit."""
        return MEASURES[self.what][0].format(self.of, self.over)

    @property
    def rule(self) -> str:
        """The limits in words."""
        if np.isinf(self.high):
            return f"above {self.low:g}"
        if np.isinf(self.low):
            return f"below {self.high:g}"
        return f"within ± {self.high:g}" if self.low == -self.high else f"between {self.low:g} and {self.high:g}"

    def verdict(self, interval: Interval) -> str:
        """It holds when the whole 95 % interval says so, fails when none of it does, and is open in between. One run of
        a method proves nothing, whatever its images say."""
        value, low, high = interval
        if not np.isfinite(value):
            return "not measured"
        if np.isnan(low):
            return "one run"
        if self.low < low and high < self.high:
            return "holds"
        return "fails" if high <= self.low or low >= self.high else "open"


def _theirs(claim: Claim, dataset: str) -> float:
    """What the paper prints, of CIFAR-100 where it prints nothing on the dataset; NaN: nothing is known to be."""
    if (printed := MEASURES[claim.what][1]) is None:
        return np.nan
    source, quantity, epsilon = printed
    rows = published(source)
    rows = rows[(rows.quantity == quantity) & (epsilon is None or np.isclose(rows.epsilon, epsilon))]
    rows = rows[rows.dataset == (dataset if (rows.dataset == dataset).any() else "cifar100")]
    mean = rows.set_index("method")["mean"]
    return mean[claim.of] - mean[claim.over] if "points" in claim.value else mean[claim.of] / mean[claim.over]


def _ours(claim: Claim, dataset: str) -> Interval:
    """What we measured, with its interval."""
    kind = KINDS.get(claim.what, "geometry")
    if not has(f"{dataset}_{kind}"):
        return MISSING
    table = measured(f"{dataset}_{kind}")
    of, over = (table[table.label == label] for label in (claim.of, claim.over))
    if not len(of) or not len(over):
        return MISSING
    match claim.what:
        case "cost":
            return _cost(of, over)
        case "accuracy":
            return _accuracy(of, over, dataset)
        case "robustness":
            return points_kept(*(side[(side.norm == "l2") & np.isclose(side.eps, 0.1)] for side in (of, over)))
        case "gradient change":
            of, over = (_random_noise(side[np.isclose(side.eps, 0.01)]) for side in (of, over))
            return ratio_of_means(of, over, "relative_change")
        case _:
            return ratio_of_means(of[of.split == "test"], over[over.split == "test"], claim.what)


def by_seed_and_image(frame: pd.DataFrame, column: str) -> np.ndarray:
    """A column of one method's table as an array (seeds, images), of the images that all its networks have."""
    return frame.pivot(index="seed", columns="image", values=column).dropna(axis=1).to_numpy(float)


def ratio_of_means(of: pd.DataFrame, over: pd.DataFrame, column: str) -> Interval:
    """A column's mean of one method over another's, of the images that all their networks have: ``ratio_interval``."""
    both = pd.concat({"of": of, "over": over}, names=["side"]).reset_index("side")
    wide = both.pivot(index="image", columns=["side", "seed"], values=column).dropna()
    return ratio_interval(wide["of"].to_numpy(float).T, wide["over"].to_numpy(float).T)


def points_kept(of: pd.DataFrame, over: pd.DataFrame) -> Interval:
    """What an attack leaves of one method minus what it leaves of another, in points, with its interval. Rows of a
    table of curves at one norm and ε, one for each seed."""
    return _points(of.correct / of.n, over.correct / over.n, [held_images(side) for side in (of, over)])


def held_images(curves: pd.DataFrame) -> np.ndarray:
    """Which images a table of curves says are held, 1 or 0: (rows, images); no images where none were noted."""
    return np.array([[character == "1" for character in held] for held in curves.held.fillna("")], dtype=float)


def _accuracy(of: pd.DataFrame, over: pd.DataFrame, dataset: str) -> Interval:
    """Difference of accuracies on the whole test split, in points; how much images vary is seen from those of which the
    geometry was measured."""
    if not has(f"{dataset}_geometry"):
        return MISSING
    geometry = measured(f"{dataset}_geometry").query("split == 'test'")
    correct = [by_seed_and_image(geometry[geometry.label == side.label.iloc[0]], "correct") for side in (of, over)]
    return _points(of.accuracy, over.accuracy, correct, of.images.iloc[0]) if all(map(len, correct)) else MISSING


def _points(of: pd.Series, over: pd.Series, correct: Sequence[np.ndarray], images: int | None = None) -> Interval:
    """Difference of shares by seed, in points. ``correct``: of both methods, (seeds, images)."""
    by_image = correct[0].mean(0) - correct[1].mean(0)
    value, low, high = difference_interval(of.to_numpy(), over.to_numpy(), by_image, images)
    return 100 * value, 100 * low, 100 * high


def _cost(of: pd.DataFrame, over: pd.DataFrame) -> Interval:
    """Time of a training step over another method's, steps timed in turn: the median over rounds of the ratio within a
    round, with its interval from order statistics."""
    from scipy.stats import quantile_test  # here: it takes half a second to import

    ratios = of.set_index("round").seconds / over.set_index("round").seconds
    low, high = quantile_test(ratios.to_numpy(), q=1, p=0.5).confidence_interval(CONFIDENCE)
    return float(ratios.median()), float(low), float(high)


GRADIENT_CHANGE = ("paper gradient-robustness", "relative_gradient_change", 0.01)
MEASURES: dict[str, tuple[str, tuple | None]] = {  # in words, and where it is printed: source, quantity, ε
    "curvature": ("C of {} over {}'s, times", ("paper table 1", "curvature", None)),
    "margin_curvature": ("C of the margin, of {} over {}'s, times", None),
    "gradient change": ("change of ∇ℓ at ‖η‖ = 0.01, {} over {}'s, times", GRADIENT_CHANGE),
    "robustness": ("points kept at ε = 0.1, {} minus {}", ("paper table 2", "pgd_l2_accuracy", 0.1)),
    "accuracy": ("accuracy in points, {} minus {}", ("paper table 1", "accuracy", None)),
    "cost": ("time of a training step, {} over {}'s, times", None),
}
KINDS = {"cost": "steps", "accuracy": "runs", "robustness": "curves", "gradient change": "stability"}  # else geometry
CLAIMS = (
    Claim("LCNN has a far lower curvature than Standard", "curvature", STANDARD, LCNN, low=3.5),
    Claim("LCNN is as accurate as Standard", "accuracy", LCNN, STANDARD, low=-1, high=1),
    Claim("LCNN + GradReg has a tenth of Standard's", "curvature", STANDARD, BOTH, low=10),
    Claim("LCNN + GradReg has less than LCNN", "curvature", LCNN, BOTH, low=1),
    Claim("LCNN + GradReg is as accurate as Standard", "accuracy", BOTH, STANDARD, low=-1, high=1),
    Claim("LCNN's gradients are more stable than Standard's", "gradient change", STANDARD, LCNN, low=1),
    Claim("LCNN + GradReg's are more stable than LCNN's", "gradient change", LCNN, BOTH, low=1),
    Claim("LCNN alone gains robustness", "robustness", LCNN, STANDARD, low=0),
    Claim("… but only a little", "robustness", LCNN, STANDARD, high=5),
    Claim("GradReg gains a lot", "robustness", GRADREG, STANDARD, low=10),
    Claim("LCNN adds to GradReg", "robustness", BOTH, GRADREG, low=0),
    Claim("Adversarial training is more robust than LCNN + GradReg", "robustness", ADVERSARIAL, BOTH, low=0),
    Claim("LCNN costs less than adversarial training", "cost", LCNN, ADVERSARIAL, high=1),
    Claim("LCNN + GradReg costs less than adversarial training", "cost", BOTH, ADVERSARIAL, high=1),
)
BEYOND = (  # what the published tables show too, though the paper does not say so, and what they leave out
    Claim("A fixed softplus is as little curved as an LCNN", "curvature", SOFTPLUS, LCNN, low=0.8, high=1.25),
    Claim("… in the margin too", "margin_curvature", SOFTPLUS, LCNN, low=0.8, high=1.25),
    Claim("… and keeps as much under attack", "robustness", SOFTPLUS, LCNN, low=-3, high=3),
)


def claims(dataset: str, those: Sequence[Claim] = CLAIMS) -> pd.DataFrame:
    """A row per claim on one dataset, measured or not: columns claim, value, rule, low_bound, high_bound (the rule in
    numbers), theirs (on CIFAR-100 where nothing is published on the dataset), ours, low, high, verdict."""
    rows = []
    for claim in those:
        interval = _ours(claim, dataset)
        said = (claim.text, claim.value, claim.rule, claim.low, claim.high, _theirs(claim, dataset))
        rows.append((*said, *interval, claim.verdict(interval)))
    columns = ["claim", "value", "rule", "low_bound", "high_bound", "theirs", "ours", "low", "high", "verdict"]
    return pd.DataFrame(rows, columns=columns)
