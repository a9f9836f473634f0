"""The numbers that the paper and others printed, ours beside them, and the paper's claims: which hold of ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..attacks import wilson
from ..lab import PROJECT
from .results import GEOMETRY, has, measured

TABLES = PROJECT / "data" / "published" / "paper_tables.csv"
CELL = ["method", "quantity", "epsilon"]
READING = 0.05  # relative error of the values read off the printed figure


def published(source: str = "") -> pd.DataFrame:
    """Columns source, dataset, architecture, method (its label), quantity, epsilon, mean, sd, of rows whose source
    begins with ``source`` (ValueError: none does): ``paper table 1`` (CIFAR-100, ResNet-18: geometry, accuracy in %,
    ± over two runs), ``paper table 2`` (PGD), ``paper gradient-robustness figure``, ``course project``."""
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
    """Ours on a dataset beside theirs (``source`` as in :func:`published`: their rows on ``dataset`` if any, else all),
    a row per cell that the paper prints; NaN is what we have not measured.

    Columns method, quantity, epsilon, theirs, theirs_sd, their_dataset, ours, ours_sd, seeds, difference,
    joint_sd (√ of the sum of both squares: standard deviations over runs; values read off the printed figure have
    its reading error, 5 %), within (|difference| ≤ joint_sd; NA where either has none).
    """
    theirs = published(source)
    theirs = theirs[theirs.dataset == dataset] if (theirs.dataset == dataset).any() else theirs
    sd = theirs.sd.where(~theirs.source.str.contains("digitised"), READING * theirs["mean"])
    cells = theirs[CELL].assign(theirs=theirs["mean"], theirs_sd=sd, their_dataset=theirs.dataset)
    mine = ours(dataset).rename(columns={"mean": "ours", "sd": "ours_sd"})
    frame = cells.merge(mine, on=CELL, how="left")
    frame["difference"] = frame.ours - frame.theirs
    frame["joint_sd"] = np.hypot(frame.ours_sd, frame.theirs_sd)
    within = (frame.difference.abs() <= frame.joint_sd).astype("boolean")
    return frame.assign(within=within.where(frame.joint_sd.notna()))


STANDARD, LCNN, GRADREG, BOTH = "Standard", "LCNN", "GradReg", "LCNN + GradReg"
ADVERSARIAL, SOFTPLUS = "Adversarial training", "Softplus + weight decay"
Interval = tuple[float, float, float]  # a value and its 95 % interval
MISSING: Interval = (np.nan, np.nan, np.nan)
RESAMPLES = 2000


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
        """It holds when the whole 95 % interval says so, fails when none of it does, and is open in between."""
        value, low, high = interval
        if np.isnan(value):
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
    what, of, over = claim.what, claim.of, claim.over
    kinds = {"cost": "runs", "accuracy": "runs", "robustness": "curves", "gradient change": "stability"}
    name = f"{dataset}_{kinds.get(what, 'geometry')}"
    if not has(name):
        return MISSING
    table = measured(name)
    if what == "robustness":
        table = table[(table.norm == "l2") & np.isclose(table.eps, 0.1)]
    elif what == "gradient change":
        table = _random_noise(table[np.isclose(table.eps, 0.01)])
    elif what not in kinds:
        table = table[table.split == "test"]
    if not {of, over} <= set(table.label):
        return MISSING
    if what == "cost":
        return _cost(table, of, over)
    if what == "accuracy":
        return _gain(table.rename(columns={"accuracy": "share", "images": "n"}), of, over)
    if what == "robustness":
        return _gain(table.assign(share=table.correct / table.n), of, over)
    return _ratio(table, "relative_change" if what == "gradient change" else what, of, over)


def _ratio(frame: pd.DataFrame, column: str, of: str, over: str) -> Interval:
    """Mean over images and seeds of one method over that of another, with a percentile bootstrap: images that all these
    runs have are drawn with replacement, the same ones for all, and seeds for each method on its own. With one seed the
    interval knows of images only; with a few it still says too little of seeds."""
    wide = frame.pivot_table(index="image", columns=["label", "seed"], values=column, sort=False)[[of, over]].dropna()
    n = len(wide)
    if n < 2:
        return MISSING
    draw = np.random.default_rng(0)
    images = np.stack([np.bincount(draw.integers(n, size=n), minlength=n) for _ in range(RESAMPLES)]) / n
    means = []
    for label in (of, over):
        by_seed = images @ wide[label].to_numpy(float)  # (RESAMPLES, seeds)
        seeds = draw.integers(by_seed.shape[1], size=by_seed.shape)
        means.append(np.take_along_axis(by_seed, seeds, 1).mean(1))
    low, high = np.quantile(means[0] / means[1], (0.025, 0.975))
    return float(wide[of].to_numpy().mean() / wide[over].to_numpy().mean()), float(low), float(high)


def _gain(frame: pd.DataFrame, of: str, over: str) -> Interval:
    """Difference of two methods' shares in points: the mean over seeds, with the wider of two intervals on each side.

    Over images (n of one seed, as seeds share them): Newcombe's from Wilson's (R. Newcombe, Stat. Med. 17, 1998, method
    10), for independent samples, so too wide. Over seeds, where both methods have several: Welch's t.
    """
    from scipy.stats import ttest_ind  # here: it takes half a second to import

    a, b = (frame[frame.label == label] for label in (of, over))
    (p, p_low, p_high), (q, q_low, q_high) = (
        (part.share.mean(), *wilson(round(part.share.mean() * part.n.iloc[0]), int(part.n.iloc[0]))) for part in (a, b)
    )
    down, up = np.hypot(p - p_low, q_high - q), np.hypot(p_high - p, q - q_low)
    if min(len(a), len(b)) > 1 and a.share.std() + b.share.std() > 0:
        welch = ttest_ind(a.share, b.share, equal_var=False).confidence_interval()
        down, up = max(down, p - q - welch.low), max(up, welch.high - (p - q))
    return 100 * (p - q), 100 * (p - q - down), 100 * (p - q + up)


def _cost(runs: pd.DataFrame, of: str, over: str) -> Interval:
    """Seconds of training over another method's, means over seeds; the interval is the range over seeds, if any."""
    seconds = runs.groupby("label").seconds.agg(["mean", "min", "max", "size"])
    (mean, least, most, runs_of), (by, by_least, by_most, runs_over) = seconds.loc[[of, over]].to_numpy().tolist()
    if runs_of + runs_over == 2:
        return mean / by, np.nan, np.nan
    return mean / by, least / by_most, most / by_least


GRADIENT_CHANGE = ("paper gradient-robustness", "relative_gradient_change", 0.01)
MEASURES: dict[str, tuple[str, tuple | None]] = {  # in words, and where it is printed: source, quantity, ε
    "curvature": ("C of {} over {}'s, times", ("paper table 1", "curvature", None)),
    "margin_curvature": ("C of the margin, of {} over {}'s, times", None),
    "gradient change": ("change of ∇ℓ at ‖η‖ = 0.01, {} over {}'s, times", GRADIENT_CHANGE),
    "robustness": ("points kept at ε = 0.1, {} minus {}", ("paper table 2", "pgd_l2_accuracy", 0.1)),
    "accuracy": ("accuracy in points, {} minus {}", ("paper table 1", "accuracy", None)),
    "cost": ("seconds of training, {} over {}'s, times", None),
}
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
