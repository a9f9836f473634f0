"""The printed numbers as they were read; ours beside them and the claims, on results made by hand and known truths."""

import importlib
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lcnn_utils.experiments import (
    BEYOND,
    CLAIMS,
    Claim,
    append,
    claims,
    comparison,
    has,
    measured,
    ours,
    published,
    readable_claims,
)  # fmt: skip
from lcnn_utils.experiments.paper import MISSING, TABLES, _gain, _ratio
from lcnn_utils.experiments.results import GEOMETRY
from lcnn_utils.figures.style import METHOD
from lcnn_utils.lab import PROJECT
from lcnn_utils.training import DATASETS, MODELS

ALL = (*CLAIMS, *BEYOND)
LABELS = [METHOD[m][0] for m in ("standard", "lcnn", "gradreg", "lcnn_gradreg", "cure", "softplus_wd", "adversarial")]
CELL = ["method", "quantity", "epsilon"]
FIELDS = ("curvature", "margin_curvature", "change", "accuracy", "left", "seconds")
NETS = {  # label: C, C of the margin, change of the gradient at 0.01, accuracy, what PGD leaves at 0.1, seconds
    "Standard": (270.0, 200.0, 0.06, 0.77, 0.37, 10.0),
    "LCNN": (50.0, 40.0, 0.02, 0.77, 0.395, 15.0),
    "GradReg": (90.0, 80.0, 0.03, 0.76, 0.50, 20.0),
    "LCNN + GradReg": (20.0, 10.0, 0.005, 0.77, 0.56, 25.0),
    "Adversarial training": (60.0, 50.0, 0.03, 0.76, 0.60, 40.0),
    "Softplus + weight decay": (50.0, 40.0, 0.02, 0.77, 0.38, 10.0),
}


@pytest.fixture
def store(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.import_module("lcnn_utils.experiments.results"), "RESULTS", tmp_path / "shipped")
    monkeypatch.setenv("LCNN_STORE", str(tmp_path))


# ------------------------------------------------------------------------------------------------ what is printed
def test_the_printed_numbers():
    frame = published()
    assert list(frame.columns) == ["source", "dataset", "architecture", *CELL, "mean", "spread"]
    assert set(frame.dataset) <= set(DATASETS)
    assert set(frame.architecture) <= set(MODELS)
    assert set(frame.method) <= set(LABELS)
    assert not frame.duplicated(["source", "dataset", "architecture", *CELL]).any()
    assert (frame["mean"] > 0).all()
    with pytest.raises(ValueError, match=r"nothing is published as 'table 1': known are paper table 1, "):
        published("table 1")
    original = PROJECT.parent / "shared" / "paper_tables.csv"
    if original.exists():
        assert TABLES.read_bytes() == original.read_bytes()


@pytest.mark.parametrize(
    ("source", "method", "quantity", "epsilon", "mean", "spread"),
    [
        ("paper table 1", "Standard", "curvature", None, 270.89, 75.04),
        ("paper table 1", "LCNN", "grad_norm", None, 22.04, 1.41),
        ("paper table 1", "LCNN + GradReg", "hessian_norm", None, 154.36, 0.22),
        ("paper table 1", "Adversarial training", "curvature", None, 63.79, 1.65),
        ("paper table 2", "Standard", "pgd_l2_accuracy", 0.2, 16.11, 0.21),
        ("paper table 2", "LCNN", "pgd_l2_accuracy", 0.1, 39.72, 0.17),
    ],
)
def test_cells_of_the_papers_tables(source, method, quantity, epsilon, mean, spread):
    frame = published(source)
    at = frame.epsilon.isna() if epsilon is None else frame.epsilon == epsilon
    (row,) = frame[(frame.method == method) & (frame.quantity == quantity) & at].itertuples()
    assert (row.mean, row.spread) == (mean, spread)


def test_the_papers_tables_are_whole():
    wide = published("paper table 1").pivot(index="method", columns="quantity", values="mean").loc[LABELS]
    assert wide.notna().all(axis=None)
    ratio = wide.curvature / (wide.hessian_norm / wide.grad_norm)
    assert ratio.between(0.5, 2).all(), "a mean of quotients is near the quotient of the means, row by row"
    for _, part in published("paper table 2").dropna(subset="epsilon").groupby("method"):
        assert part.sort_values("epsilon")["mean"].is_monotonic_decreasing, "a larger ε, fewer right"


# ---------------------------------------------------------------------------------------------- ours beside theirs
def run_row(label: str, seed: int, accuracy: float, **changes) -> dict:
    row = dict.fromkeys((*GEOMETRY, "curvature_median", "epochs"), 1.0) | {"images": 100, "seconds": 10.0}
    return row | {"label": label, "method": label.lower(), "seed": seed, "accuracy": accuracy} | changes


def change_row(seed: int, image: int, change: float, **changes) -> dict:
    row = dict(label="LCNN", seed=seed, image=image, method="gradient", weights="trained", noise="random", eps=0.01)
    return row | {"relative_change": change} | changes


def cell(frame: pd.DataFrame, **where):
    for column, wanted in where.items():
        frame = frame[frame[column] == wanted]
    (row,) = frame.itertuples()
    return row


def test_ours_by_hand(store):
    rows = [run_row("LCNN", seed, a, curvature=c) for seed, a, c in ((0, 0.7, 1.0), (1, 0.72, 3.0), (2, 0.77, np.nan))]
    append(pd.DataFrame([*rows, run_row("CURE", 0, 0.5, curvature=np.nan)]), "digits_runs", {})
    point = lambda seed, share, norm: dict(
        label="LCNN", seed=seed, norm=norm, eps=0.1, n=100, correct=0, accuracy=share
    )
    curves = [point(0, 0.5, "l2"), point(1, 0.7, "l2"), point(0, 0.2, "linf")]
    append(pd.DataFrame(curves), "digits_curves", {})
    kept = [change_row(0, image, change) for image, change in enumerate((0.1, 0.2, 0.6))]
    kept += [change_row(1, 0, 0.5)]  # one image only: means over images first, then over seeds
    kept += [change_row(0, 0, 9.0, **other) for other in (dict(noise="worst"), dict(weights="x"), dict(method="x"))]
    append(pd.DataFrame(kept), "digits_stability", {})
    frame = ours("digits")
    expected = {  # means, standard deviations over n - 1, seeds
        "accuracy": (73, np.std([70, 72, 77], ddof=1), 3),  # %
        "curvature": (2, 2**0.5, 2),  # a seed without a value is not counted
        "pgd_l2_accuracy": (60, 200**0.5, 2),
        "pgd_linf_accuracy": (20, np.nan, 1),
        "relative_gradient_change": (0.4, 0.2 / 2**0.5, 2),
    }
    for quantity, values in expected.items():
        row = cell(frame, method="LCNN", quantity=quantity)
        assert (row.mean, row.spread, row.seeds) == pytest.approx(values, nan_ok=True)
    assert "curvature" not in set(frame[frame.method == "CURE"].quantity), "not measured: not there"


def test_comparison_by_hand(store):
    rows = [
        run_row("Standard", 0, 0.70),
        run_row("Standard", 1, 0.80),
        run_row("LCNN", 0, 0.5),
        run_row("LCNN", 1, 0.5),
    ]
    append(pd.DataFrame([*rows, run_row("GradReg", 7, 0.772)]), "cifar10_tiny_runs", {})
    frame = comparison("cifar10", "paper table 1")
    assert set(frame.their_dataset) == {"cifar100"}, "Table 1 is about CIFAR-100"
    near = cell(frame, method="Standard", quantity="accuracy")
    assert (near.ours, near.theirs, near.seeds, near.within) == (pytest.approx(75), 77.42, 2, True)
    assert (near.ours_spread, near.difference) == pytest.approx((10 / 2**0.5, 75 - 77.42))
    assert near.joint_spread == pytest.approx((50 + 0.11**2) ** 0.5)
    far = cell(frame, method="LCNN", quantity="accuracy")
    assert (far.joint_spread, far.within) == (pytest.approx(0.11), False)
    alone = cell(frame, method="GradReg", quantity="accuracy")
    assert (alone.difference, pd.isna(alone.within)) == (pytest.approx(0), True), "one seed has no spread: no verdict"
    read_off = comparison("cifar10", "paper gradient-robustness")
    np.testing.assert_allclose(read_off.theirs_spread, 0.05 * read_off.theirs)


@pytest.mark.parametrize("dataset", ["digits", "cifar10"])
@pytest.mark.parametrize("source", ["paper table 1", "paper table 2", "paper gradient-robustness figure"])
def test_every_printed_cell_stands_there_once(store, dataset, source):
    frame, printed = comparison(dataset, source), published(source)
    printed = printed[printed.dataset == dataset] if (printed.dataset == dataset).any() else printed
    columns = [*CELL, "theirs", "their_dataset"]
    expected = printed.rename(columns={"mean": "theirs", "dataset": "their_dataset"})[columns].reset_index(drop=True)
    pd.testing.assert_frame_equal(frame[columns], expected)
    assert frame[["ours", "seeds", "difference", "within"]].isna().all(axis=None), "nothing measured"
    assert (frame.ours.dtype, frame.seeds.dtype, frame.difference.dtype) == (float, float, float)


# ---------------------------------------------------------------------------------------------------------- claims
@settings(max_examples=60)
@given(st.tuples(*[st.floats(-100, 100)] * 3), st.tuples(*[st.floats(-100, 100)] * 2), st.booleans(), st.booleans())
def test_verdict(interval, bounds, one_sided, strict):
    low, value, high = sorted(interval)
    claim = Claim("", "cost", "", "", min(bounds), np.inf if one_sided else max(bounds), strict)
    inside = lambda v: claim.low < v < claim.high if strict else claim.low <= v <= claim.high
    below = high <= claim.low if strict else high < claim.low
    above = low >= claim.high if strict else low > claim.high
    if claim.low < claim.high:
        expected = "holds" if inside(low) and inside(high) else "fails" if below or above else "open"
        assert claim.verdict((value, low, high)) == expected
    assert claim.verdict(MISSING) == "not measured"
    assert claim.verdict((value, np.nan, np.nan)) == "one run"


def measure(seeds: int = 2, images: int = 40, kinds: str = "rgsc", **changes) -> None:
    """Tables of CIFAR-10 of networks like the paper's; changes: ``{"LCNN": {"curvature": 1}}``, None takes one out."""
    nets = {
        label: dict(zip(FIELDS, values, strict=True)) | (changes.get(label) or {}) for label, values in NETS.items()
    }
    hard = np.exp(np.random.default_rng(0).normal(size=images) * 0.5)  # how hard an image is, for every network
    made: dict[str, list] = {"runs": [], "geometry": [], "stability": [], "curves": []}
    for number, (label, net) in enumerate(nets.items()):
        for seed in range(seeds) if changes.get(label, {}) is not None else ():
            values = hard * np.random.default_rng((number, seed)).lognormal(0, 0.05, images)
            values /= values.mean()
            row = run_row(label, seed, net["accuracy"], images=10_000, seconds=net["seconds"])
            made["runs"].append(pd.DataFrame([row]))
            frame = pd.DataFrame({**row, "image": range(images), "split": "test"})
            frame = frame.assign(curvature=net["curvature"] * values, margin_curvature=net["margin_curvature"] * values)
            made["geometry"] += [frame, frame.assign(split="train", curvature=1.0)]
            frame = pd.DataFrame(change_row(seed, 0, 1.0, label=label) | {"image": range(images)})
            made["stability"] += [frame.assign(relative_change=net["change"] * values), frame.assign(eps=0.1)]
            made["stability"] += [frame.assign(noise="worst"), frame.assign(method="smoothgrad")]
            points = [(0.0, "l2", net["accuracy"]), (0.1, "l2", net["left"]), (0.1, "linf", 0.1)]
            row = dict(label=label, seed=seed, n=10_000)
            made["curves"].append(pd.DataFrame(
                [row | dict(eps=e, norm=norm, correct=round(10_000 * a), accuracy=a) for e, norm, a in points]
            ))  # fmt: skip
    for kind, parts in made.items():
        if kind[0] in kinds:
            append(pd.concat(parts), f"cifar10_{kind}", {})


@pytest.mark.parametrize("seeds", [1, 2])
def test_networks_like_the_papers(store, seeds):
    measure(seeds=seeds)
    frame = claims("cifar10", ALL)
    expected = [270 / 50, 0, 270 / 20, 50 / 20, 0, 3, 4, 2.5, 2.5, 13, 6, 4, 15 / 40, 25 / 40, 1, 1]
    np.testing.assert_allclose(frame.ours, expected, rtol=1e-3, atol=1e-9)
    assert (frame.verdict == "one run").to_numpy().nonzero()[0].tolist() == ([12, 13] if seeds == 1 else [])
    open_ones = frame[~frame.verdict.isin(["holds", "one run"])]
    assert (set(open_ones.verdict), set(open_ones.rule)) == ({"open"}, {"within ± 1"}), "10,000 images tell no point"
    readable = readable_claims(frame)
    assert readable.ours[0] == f"5.4 ({frame.low[0]:.3g} – {frame.high[0]:.3g})"
    assert (readable.published[0], readable.published[12]) == ("3.9", "–")


def test_published_numbers_of_the_claims(store):
    by_claim = claims("digits", ALL).set_index("claim").theirs  # of CIFAR-100
    expected = [270.89 / 69.50, 77.30 - 77.42, 270.89 / 25.30, 69.50 / 25.30]
    np.testing.assert_allclose(by_claim.iloc[:4], expected)
    assert by_claim["LCNN alone gains robustness"] == pytest.approx(39.72 - 37.64, abs=5)
    assert by_claim["A fixed softplus is as little curved as an LCNN"] == pytest.approx(70.39 / 69.50)
    assert by_claim.isna().sum() == 3
    frame = claims("cifar10", ALL)
    assert set(frame.theirs_holds[frame.theirs.notna()]) == {"holds"}, "what the paper claims holds of its own numbers"
    assert set(frame.verdict) == {"not measured"}
    assert frame.theirs[5] != by_claim.iloc[5], "the figure has a panel of CIFAR-10"


BREAKS = [  # what makes each claim fail
    {"LCNN": {"curvature": 100.0}}, {"LCNN": {"accuracy": 0.70}}, {"LCNN + GradReg": {"curvature": 60.0}},
    {"LCNN + GradReg": {"curvature": 60.0}}, {"LCNN + GradReg": {"accuracy": 0.90}}, {"LCNN": {"change": 0.07}},
    {"LCNN + GradReg": {"change": 0.03}}, {"LCNN": {"left": 0.30}}, {"LCNN": {"left": 0.50}},
    {"GradReg": {"left": 0.40}}, {"LCNN + GradReg": {"left": 0.45}}, {"Adversarial training": {"left": 0.50}},
    {"LCNN": {"seconds": 41.0}}, {"LCNN + GradReg": {"seconds": 41.0}}, {"LCNN": {"curvature": 70.0}},
    {"LCNN": {"margin_curvature": 10.0}},
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(ALL)), ids=[f"{c.text}: {c.value}" for c in ALL])
def test_each_claim_can_fail(store, number):
    measure(**BREAKS[number])
    assert claims("cifar10", [ALL[number]]).verdict[0] == "fails"
    text = re.sub(r"[\d.]+", "#", ALL[number].rule)
    assert text in {"at least #", "at most #", "above #", "below #", "within ± #", "between # and #"}


@pytest.mark.parametrize(
    ("kinds", "gone", "images", "left_out"),
    [("gsc", {1, 4, 12, 13}, 20, ()), ("rsc", {0, 2, 3, 14, 15}, 20, ()), ("rgc", {5, 6}, 20, ()),
     ("rgs", {7, 8, 9, 10, 11}, 20, ()), ("rgsc", {9, 10}, 20, ("GradReg",)), ("rgsc", {11, 12, 13}, 20,
     ("Adversarial training",)), ("rgsc", {0, 2, 3, 5, 6, 14, 15}, 1, ())],
)  # fmt: skip
def test_what_is_not_measured_is_a_row_all_the_same(store, kinds, gone, images, left_out):
    """Of one image a ratio has no interval: it is no measurement."""
    measure(kinds=kinds, images=images, **dict.fromkeys(left_out))
    frame = claims("cifar10", ALL)
    assert set(frame.index[frame.verdict == "not measured"]) == gone
    assert frame.ours.isna().sum() == len(gone)


# -------------------------------------------------------------------------------------------------------- intervals
def two_networks(seed: int, n: int = 100, ratio: float = 3.0) -> pd.DataFrame:
    """Two networks on the same images, hard ones for both; the means of the population have a known ratio."""
    draw = np.random.default_rng(seed)
    hard, own = draw.normal(size=n) * 0.6, draw.normal(size=(2, n)) * 0.4
    values = {"a": ratio * np.exp(hard + own[0]), "b": np.exp(hard + own[1])}
    return pd.concat([pd.DataFrame({"label": k, "seed": 0, "image": range(n), "c": v}) for k, v in values.items()])


def test_intervals_of_ratios_hold_the_true_one():
    """60 samples: 95 % of them within the binomial's 0.1 % to 99.9 %, and as wide as the delta method says."""
    found = [_ratio(two_networks(seed), "c", "a", "b") for seed in range(60)]
    assert sum(low <= 3.0 <= high for _, low, high in found) >= stats.binom.ppf(0.001, 60, 0.95)
    wide = []
    for seed, (ratio, low, high) in enumerate(found):
        a, b = (part.c.to_numpy() for _, part in two_networks(seed).groupby("label"))
        assert ratio == pytest.approx(a.mean() / b.mean())
        wide.append((high - low) / (2 * 1.96 * ratio * (a / a.mean() - b / b.mean()).std() / len(a) ** 0.5))
    assert np.mean(wide) == pytest.approx(1, abs=0.05)


def test_images_that_a_network_lacks_are_left_out_and_seeds_widen():
    frame = two_networks(1)
    few = frame[(frame.label == "b") | (frame.image >= 10)]
    a, b = (part.c.to_numpy()[10:] for _, part in frame.groupby("label"))
    assert _ratio(few, "c", "a", "b")[0] == pytest.approx(a.mean() / b.mean())
    ratio, low, high = _ratio(frame, "c", "a", "b")
    seeds = [
        frame.assign(seed=s, c=frame.c.where(frame.label == "b", f * frame.c)) for s, f in enumerate((0.8, 1, 1.2))
    ]
    value, wide_low, wide_high = _ratio(pd.concat(seeds), "c", "a", "b")
    assert value == pytest.approx(ratio)
    assert wide_high - wide_low > 1.5 * (high - low), "three seeds whose means differ by 20 %"


def test_intervals_of_differences():
    """Newcombe's as in his paper's Table II (56/70 − 48/80), and at the ends; Welch's t where seeds differ."""
    shares = lambda n=100, **runs: pd.DataFrame(
        [dict(label=label, share=share, n=n) for label, values in runs.items() for share in values]
    )
    frame = pd.DataFrame([dict(label="a", share=56 / 70, n=70), dict(label="b", share=48 / 80, n=80)])
    assert _gain(frame, "a", "b") == pytest.approx((20, 5.24, 33.39), abs=0.01)
    assert _gain(frame, "b", "a") == pytest.approx((-20, -33.39, -5.24), abs=0.01)
    assert _gain(shares(a=[0.0], b=[0.0]), "a", "b") == pytest.approx((0, -3.70, 3.70), abs=0.01)
    one = _gain(shares(a=[0.5], b=[0.4]), "a", "b")
    assert _gain(shares(a=[0.5, 0.5], b=[0.4, 0.4]), "a", "b") == pytest.approx(one), "the same images again"
    a, b = np.array([0.3, 0.7]), np.array([0.4, 0.45])
    va, vb = a.var(ddof=1) / 2, b.var(ddof=1) / 2
    half = stats.t.ppf(0.975, (va + vb) ** 2 / (va**2 + vb**2)) * (va + vb) ** 0.5  # Welch–Satterthwaite
    assert _gain(shares(n=10**6, a=a, b=b), "a", "b") == pytest.approx((7.5, 7.5 - 100 * half, 7.5 + 100 * half))
    assert _gain(shares(a=[0.5]), "a", "b") == pytest.approx(MISSING, nan_ok=True)


@pytest.mark.parametrize("dataset", ["digits", "cifar10", "cifar100"])
def test_shipped_results_by_hand(dataset):
    assert has(f"{dataset}_geometry")
    frame = claims(dataset, ALL).set_index("value").ours
    images = measured(f"{dataset}_geometry")
    c = images[images.split == "test"].groupby(["label", "seed"]).curvature.mean().groupby("label").mean()
    assert frame["C of Standard over LCNN's, times"] == pytest.approx(c["Standard"] / c["LCNN"], rel=1e-6)
    accuracy = measured(f"{dataset}_runs").groupby("label").accuracy.mean() * 100
    gap = frame["accuracy in points, LCNN minus Standard"]
    assert gap == pytest.approx(accuracy["LCNN"] - accuracy["Standard"])
