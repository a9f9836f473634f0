"""The printed numbers as they were read; ours beside them and the claims, on results made by hand and known truths."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import pytest

from lcnn_utils.experiments import BEYOND, CLAIMS, Claim, append, claims, comparison, ours, published
from lcnn_utils.experiments.results import GEOMETRY
from lcnn_utils.figures.style import METHOD
from lcnn_utils.training import DATASETS, MODELS

ALL = (*CLAIMS, *BEYOND)
CELL = ["method", "quantity", "epsilon"]


# ------------------------------------------------------------------------------------------ printed, and ours beside
def test_the_printed_numbers():
    frame = published()
    assert list(frame.columns) == ["source", "dataset", "architecture", *CELL, "mean", "sd"]
    assert set(frame.dataset) <= set(DATASETS)
    assert set(frame.architecture) <= set(MODELS)
    assert set(frame.method) <= {label for label, _, _ in METHOD.values()}
    assert not frame.duplicated(["source", "dataset", "architecture", *CELL]).any()
    wide = published("paper table 1").pivot(index="method", columns="quantity", values="mean")
    ratio = wide.curvature / (wide.hessian_norm / wide.grad_norm)
    assert ratio.between(0.5, 2).all(), "a mean of quotients is near the quotient of the means, row by row"
    printed = published("paper table").set_index(CELL)[["mean", "sd"]].sort_index()
    assert printed.loc[("Standard", "curvature")].to_numpy().tolist() == [[270.89, 75.04]]
    assert printed.loc[("LCNN", "pgd_l2_accuracy", 0.1)].to_numpy().ravel().tolist() == [39.72, 0.17]


def run_row(label: str, seed: int, accuracy: float, **changes) -> dict:
    row = dict.fromkeys((*GEOMETRY, "curvature_median", "epochs"), 1.0) | {"images": 100, "seconds": 10.0}
    return row | {"label": label, "method": label.lower(), "seed": seed, "accuracy": accuracy} | changes


def change_row(seed: int, image: int, change: float, **changes) -> dict:
    row = dict(label="LCNN", seed=seed, image=image, method="gradient", weights="trained", noise="random", eps=0.01)
    return row | {"relative_change": change} | changes


def cell(frame: pd.DataFrame, method: str, quantity: str):
    (row,) = frame[(frame.method == method) & (frame.quantity == quantity)].itertuples()
    return row


def test_ours_by_hand(results):
    rows = [run_row("LCNN", seed, a, curvature=c) for seed, a, c in ((0, 0.7, 1.0), (1, 0.72, 3.0), (2, 0.77, np.nan))]
    append(pd.DataFrame(rows), "digits_runs", {})
    curves = pd.DataFrame({"label": "LCNN", "seed": [0, 1, 0], "norm": ["l2", "l2", "linf"], "eps": 0.1, "n": 10})
    append(curves.assign(correct=0, held="0", accuracy=[0.5, 0.7, 0.2]), "digits_curves", {})
    kept = [change_row(0, image, change) for image, change in enumerate((0.1, 0.2, 0.6))]
    kept += [change_row(1, 0, 0.5)]  # one image only: means over images first, then over seeds
    kept += [change_row(0, 0, 9.0, **other) for other in (dict(noise="worst"), dict(weights="x"), dict(method="x"))]
    append(pd.DataFrame(kept), "digits_stability", {})
    expected = {  # means, standard deviations over n - 1, seeds
        "accuracy": (73, np.std([70, 72, 77], ddof=1), 3),  # %
        "curvature": (2, 2**0.5, 2),  # a seed without a value is not counted
        "pgd_l2_accuracy": (60, 200**0.5, 2),
        "pgd_linf_accuracy": (20, np.nan, 1),
        "relative_gradient_change": (0.4, 0.2 / 2**0.5, 2),
    }
    for quantity, values in expected.items():
        row = cell(ours("digits"), "LCNN", quantity)
        assert (row.mean, row.sd, row.seeds) == pytest.approx(values, nan_ok=True)


def test_comparison_by_hand(results):
    """Two seeds near theirs, two equal ones that are far, one seed, none."""
    rows = [("Standard", 0, 0.7), ("Standard", 1, 0.8), ("LCNN", 0, 0.5), ("LCNN", 1, 0.5), ("GradReg", 7, 0.772)]
    append(pd.DataFrame([run_row(*row) for row in rows]), "cifar100_small_runs", {})
    frame = comparison("cifar100", "paper table 1")
    near = cell(frame, "Standard", "accuracy")
    assert (near.ours, near.theirs, near.seeds, near.within) == (pytest.approx(75), 77.42, 2, True)
    assert (near.ours_sd, near.difference) == pytest.approx((10 / 2**0.5, 75 - 77.42))
    assert near.joint_sd == pytest.approx((50 + 0.11**2) ** 0.5)
    far, alone = cell(frame, "LCNN", "accuracy"), cell(frame, "GradReg", "accuracy")
    assert (far.joint_sd, far.within) == (pytest.approx(0.11), False)
    assert (alone.difference, pd.isna(alone.within)) == (pytest.approx(0), True), "one seed: no standard deviation"
    assert not len(comparison("digits", "paper table 1")), "nothing is published on digits"
    frame = comparison("cifar10", "paper gradient-robustness")
    assert frame[["ours", "seeds", "difference", "within"]].isna().all(axis=None), "nothing measured"
    np.testing.assert_allclose(frame.theirs_sd, 0.05 * frame.theirs)  # read off a figure


# ---------------------------------------------------------------------------------------------------------- claims
FIELDS = ("curvature", "margin_curvature", "change", "accuracy", "left", "seconds")
LIKE_THE_PAPERS = {  # label: C, C of the margin, change of the gradient at 0.01, accuracy, left at 0.1, seconds a step
    "Standard": (270.0, 200.0, 0.06, 0.77, 0.37, 10.0),
    "LCNN": (50.0, 40.0, 0.02, 0.77, 0.395, 15.0),
    "GradReg": (90.0, 80.0, 0.03, 0.76, 0.50, 20.0),
    "LCNN + GradReg": (20.0, 10.0, 0.005, 0.77, 0.56, 25.0),
    "Adversarial training": (60.0, 50.0, 0.03, 0.76, 0.60, 40.0),
    "Softplus + weight decay": (50.0, 40.0, 0.02, 0.77, 0.38, 10.0),
}
UNLIKE = LIKE_THE_PAPERS | {
    "Standard": (20.0, 20.0, 0.001, 0.77, 0.90, 10.0),
    "LCNN": (270.0, 400.0, 0.02, 0.60, 0.395, 50.0),
    "LCNN + GradReg": (300.0, 10.0, 0.03, 0.50, 0.45, 50.0),
    "Adversarial training": (60.0, 50.0, 0.03, 0.76, 0.40, 40.0),
    "Softplus + weight decay": (50.0, 40.0, 0.02, 0.77, 0.50, 10.0),
}


def measure(nets: dict, seeds: int = 2, images: int = 40, kept: Mapping[str, int] = {}) -> pd.DataFrame:
    """Tables of digits of networks with such values: the claims about them."""
    hard = np.exp(np.random.default_rng(0).normal(size=images) * 0.5)  # how hard an image is, for every network
    made: dict[str, list] = {"runs": [], "geometry": [], "stability": [], "curves": [], "steps": []}
    for number, (label, values) in enumerate(nets.items()):
        net = dict(zip(FIELDS, values, strict=True))
        for seed in range(seeds):
            each = hard * np.random.default_rng((number, seed)).lognormal(0, 0.05, images)
            each /= each.mean()
            row = run_row(label, seed, net["accuracy"], images=10_000)
            made["runs"].append(pd.DataFrame([row]))
            right = np.random.default_rng(number).random(images) < net["accuracy"]
            frame = pd.DataFrame({**row, "image": range(images), "split": "test", "correct": right})
            frame = frame.assign(curvature=net["curvature"] * each, margin_curvature=net["margin_curvature"] * each)
            made["geometry"] += [frame, frame.assign(split="train", curvature=1.0)]
            frame = pd.DataFrame(change_row(seed, 0, 1.0, label=label) | {"image": range(images)})
            made["stability"] += [frame.assign(relative_change=net["change"] * each), frame.assign(eps=0.1)]
            made["stability"] += [frame.assign(noise="worst"), frame.assign(method="smoothgrad")]
            frame = pd.DataFrame({"label": label, "seed": seed, "n": 10_000, "norm": ["l2", "l2", "linf"]})
            shares = np.array([net["accuracy"], net["left"], 0.1])
            held = ["1" * round(1000 * share) + "0" * round(1000 - 1000 * share) for share in shares]
            made["curves"].append(
                frame.assign(eps=[0.0, 0.1, 0.1], accuracy=shares, correct=10_000 * shares, held=held)
            )
        busy = 1 + np.random.default_rng(number).random(images) / 100  # what else the machine does
        made["steps"].append(pd.DataFrame({"label": label, "round": range(images), "seconds": net["seconds"] * busy}))
    for kind, parts in made.items():
        if parts := parts[: kept.get(kind)]:
            append(pd.concat(parts), f"digits_{kind}", {})
    return claims("digits", ALL)


COSTS = [12, 13]  # steps are timed often: seeds play no part
EXPECTED = [270 / 50, 0, 270 / 20, 50 / 20, 0, 3, 4, 2.5, 2.5, 13, 6, 4, 15 / 40, 25 / 40, 1, 1, -1.5]


def test_networks_like_the_papers(results):
    frame = measure(LIKE_THE_PAPERS)
    np.testing.assert_allclose(frame.ours, EXPECTED, rtol=0.01, atol=1e-9)
    others = frame[frame.verdict != "holds"]
    assert (set(others.verdict), set(others.rule)) == ({"open"}, {"within ± 1"}), "10,000 images tell no point"


def test_one_run_is_no_verdict(results):
    """Whatever its images say."""
    frame = measure(LIKE_THE_PAPERS, seeds=1)
    np.testing.assert_allclose(frame.ours, EXPECTED, rtol=0.01, atol=1e-9)
    assert frame.index[frame.verdict != "one run"].tolist() == COSTS
    assert frame.low.isna().sum() == len(frame) - len(COSTS)


def test_every_claim_can_fail(results):
    frame = measure(UNLIKE)
    assert frame.index[frame.verdict != "fails"].tolist() == [8], "LCNN gains only a little: it loses"
    frame = measure({**LIKE_THE_PAPERS, "LCNN": (50.0, 40.0, 0.02, 0.77, 0.50, 15.0)})
    assert frame.verdict[8] == "fails"


def test_published_numbers_of_the_claims(results):
    theirs = claims("digits", ALL).theirs  # of CIFAR-100
    np.testing.assert_allclose(theirs[:4], [270.89 / 69.50, 77.30 - 77.42, 270.89 / 25.30, 69.50 / 25.30])
    assert theirs[14] == pytest.approx(70.39 / 69.50)
    assert theirs.index[theirs.isna()].tolist() == [12, 13, 15]
    frame = claims("cifar10", ALL)
    assert frame.theirs[5] != theirs[5], "the figure has a panel of CIFAR-10"
    for claim, value in zip(ALL, frame.theirs, strict=True):
        assert np.isnan(value) or claim.verdict((value,) * 3) == "holds", (
            "what the paper claims holds of its own numbers"
        )
    assert set(frame.verdict) == {"not measured"}


@pytest.mark.parametrize(
    ("gone", "options"),
    [
        ({1, 4}, {"kept": {"runs": 0}}),
        ({7, 8, 9, 10, 11, 16}, {"kept": {"curves": 0}}),
        ({*COSTS}, {"kept": {"steps": 0}}),
        ({0, 1, 2, 3, 4, 14, 15}, {"kept": {"geometry": 0}}),
        ({0, 1, 2, 3, 4, 14, 15}, {"kept": {"geometry": 2}}),
        ({0, 2, 3, 5, 6, 14, 15}, {"images": 1}),
    ],
)
def test_what_is_not_measured_is_a_row_all_the_same(results, gone, options):
    """Nor where only the first parts of a table are there. Of one image a ratio has no interval: no measurement."""
    frame = measure(LIKE_THE_PAPERS, **options)
    assert set(frame.index[frame.verdict == "not measured"]) == set(frame.index[frame.ours.isna()]) == gone


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((3.0, 2.5, 3.5), "holds"),
        ((3.0, 1.5, 3.5), "open"),
        ((1.0, 0.5, 2.0), "fails"),
        ((9.0, 8.0, 9.5), "fails"),
        ((np.inf, np.nan, np.nan), "not measured"),
        ((3.0, np.nan, np.nan), "one run"),
    ],
)
def test_verdict(interval, verdict):
    """(value, low, high) against a claim of more than 2 and less than 8."""
    assert Claim("", "cost", "", "", 2.0, 8.0).verdict(interval) == verdict
