"""The paper's claims: numbers and verdicts by hand, on results made for it; intervals on known truths."""

import math
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcnn_utils.experiments import claims, published
from lcnn_utils.experiments.claims import BEYOND, CLAIMS, MISSING, Claim

ALL = (*CLAIMS, *BEYOND)
IMAGES = 300
NETS = {  # label: C, C of the margin, change of the gradient at 0.01, accuracy, what PGD leaves at 0.1, seconds
    "Standard": (270.0, 200.0, 0.06, 0.77, 0.37, 10.0),
    "LCNN": (50.0, 40.0, 0.02, 0.77, 0.395, 15.0),
    "GradReg": (90.0, 80.0, 0.03, 0.76, 0.50, 20.0),
    "LCNN + GradReg": (20.0, 10.0, 0.005, 0.77, 0.56, 25.0),
    "Adversarial training": (60.0, 50.0, 0.03, 0.76, 0.60, 40.0),
    "Softplus + weight decay": (50.0, 40.0, 0.02, 0.77, 0.38, 10.0),
}
FIELDS = ("curvature", "margin_curvature", "change", "accuracy", "left", "seconds")


@pytest.fixture
def results(monkeypatch, tmp_path):
    monkeypatch.setattr(published, "RESULTS", tmp_path / "results")
    monkeypatch.setenv("LCNN_STORE", str(tmp_path))
    yield tmp_path / "results"
    claims._images.cache_clear()


def measure(dataset: str = "cifar10", seeds: int = 2, images: int = IMAGES, kinds: str = "rgsc", **changes) -> None:
    """Result tables of nets like those of the paper; changes: ``{"LCNN": {"curvature": 1}}``, None takes a net out."""
    nets = {label: dict(zip(FIELDS, values, strict=True)) for label, values in NETS.items()}
    for label, change in changes.items():
        if change is None:
            del nets[label]
        else:
            nets[label] |= change
    hard = np.exp(np.random.default_rng(0).normal(size=images) * 0.5)  # how hard an image is, for every net
    tables: dict[str, list] = {"runs": [], "geometry": [], "stability": [], "curves": []}
    for number, (label, net) in enumerate(nets.items()):
        for seed in range(seeds):
            noise = np.random.default_rng((number, seed)).lognormal(0, 0.05, images)
            values = hard * noise / (hard * noise).mean()
            about = dict(label=label, method=label.lower(), seed=seed)
            column = dict.fromkeys(published.GEOMETRY, 1.0) | {"curvature_median": 1.0, "images": 10_000, "epochs": 2}
            tables["runs"].append(pd.DataFrame([about | column | {k: net[k] for k in ("accuracy", "seconds")}]))
            frame = pd.DataFrame({"image": range(images), "grad_norm": 1.0, "hessian_norm": 1.0, **about})
            frame = frame.assign(curvature=net["curvature"] * values, margin_curvature=net["margin_curvature"] * values)
            tables["geometry"] += [frame.assign(split="test"), frame.assign(split="train", curvature=1.0)]
            frame = frame[["label", "seed", "image"]].assign(method="gradient", weights="trained", noise="random")
            tables["stability"] += [
                frame.assign(eps=0.01, relative_change=net["change"] * values),
                *(frame.assign(eps=eps, relative_change=1.0) for eps in (0.001, 0.1)),
                frame.assign(eps=0.01, relative_change=1.0, noise="worst"),
                frame.assign(eps=0.01, relative_change=1.0, weights="random"),
                frame.assign(eps=0.01, relative_change=1.0, method="smoothgrad"),
            ]
            points = [(0.0, "l2", net["accuracy"]), (0.1, "l2", net["left"]), (0.1, "linf", 0.1), (0.2, "l2", 0.1)]
            tables["curves"].append(pd.DataFrame([
                about | dict(eps=eps, norm=norm, n=10_000, correct=round(10_000 * share), accuracy=share)
                for eps, norm, share in points
            ]))  # fmt: skip
    for kind, parts in tables.items():
        if kind[0] in kinds:
            published.save_measured(pd.concat(parts), f"{dataset}_{kind}", {"scale": "tiny"})


def verdicts(dataset: str = "cifar10") -> list[str]:
    return claims.table(dataset, ALL).verdict.tolist()


# --------------------------------------------------------------------------------------------------------- verdicts
any_number = st.floats(-100, 100)


@given(st.tuples(any_number, any_number, any_number), st.tuples(any_number, any_number), st.booleans(), st.booleans())
def test_verdict(interval, bounds, one_sided, strict):
    low, value, high = sorted(interval)
    claim = Claim("", "", "", CLAIMS[0].measure, min(bounds), math.inf if one_sided else max(bounds), strict)
    inside = lambda v: claim.low < v < claim.high if strict else claim.low <= v <= claim.high
    below = high <= claim.low if strict else high < claim.low
    above = low >= claim.high if strict else low > claim.high
    expected = "holds" if inside(low) and inside(high) else "fails" if below or above else "open"
    if strict and not one_sided and min(bounds) == max(bounds):
        return  # nothing can hold
    assert claim.verdict((value, low, high)) == expected


def test_verdict_of_nothing():
    for claim in ALL:
        assert claim.verdict(MISSING) == "not measured"


@pytest.mark.parametrize("claim", ALL, ids=lambda claim: f"{claim.text}: {claim.rule}")
def test_the_words_of_a_rule_are_its_numbers(claim):
    numbers = [float(text) for text in re.findall(r"[\d.]+", claim.rule)]
    words = re.sub(r"[\d.]+", "#", claim.rule)
    meant = {
        "at most #": lambda v: (-math.inf, v, False),
        "at least #": lambda v: (v, math.inf, False),
        "above #": lambda v: (v, math.inf, True),
        "below #": lambda v: (-math.inf, v, True),
        "within ± #": lambda v: (-v, v, False),
        "between # and #": lambda v, w: (v, w, False),
    }[words](*numbers)
    assert (claim.low, claim.high, claim.strict) == meant


def test_no_gain_is_no_gain():
    """Two nets that are equal: "above 0" and "above 1" fail, as "below 1" does."""
    for claim in CLAIMS:
        if claim.strict:
            edge = claim.low if claim.low > -math.inf else claim.high
            assert claim.verdict((edge,) * 3) == "fails"


# ---------------------------------------------------------------------------------------------- the printed numbers
PRINTED = {  # by what is measured, on CIFAR-100 and on CIFAR-10, where the paper prints the figure only
    "C of Standard over LCNN's, times": [270.89 / 69.50] * 2,
    "accuracy in points, LCNN minus Standard": [77.30 - 77.42] * 2,
    "C of Standard over LCNN + GradReg's, times": [270.89 / 25.30] * 2,
    "C of LCNN over LCNN + GradReg's, times": [69.50 / 25.30] * 2,
    "accuracy in points, LCNN + GradReg minus Standard": [77.29 - 77.42] * 2,
    "change of ∇ℓ at ‖η‖ = 0.01, Standard over LCNN's, times": [0.0766 / 0.0299, 0.059 / 0.0217],
    "change of ∇ℓ at ‖η‖ = 0.01, LCNN over LCNN + GradReg's, times": [0.0299 / 0.0093, 0.0217 / 0.0051],
    "points kept at ε = 0.1, LCNN minus Standard": [39.72 - 37.55] * 2,
    "the same": [39.72 - 37.55] * 2,
    "points kept at ε = 0.1, GradReg minus Standard": [61.06 - 37.55] * 2,
    "points kept at ε = 0.1, LCNN + GradReg minus GradReg": [63.36 - 61.06] * 2,
    "points kept at ε = 0.1, Adversarial training minus LCNN + GradReg": [64.70 - 63.36] * 2,
    "seconds of training, LCNN over Adversarial training's, times": [math.nan] * 2,
    "seconds of training, LCNN + GradReg over Adversarial training's, times": [math.nan] * 2,
    "C of Softplus + weight decay over LCNN's, times": [70.39 / 69.50] * 2,
    "C of the margin, of Softplus + weight decay over LCNN's, times": [math.nan] * 2,
}


def test_printed_numbers(results):
    for number, dataset in enumerate(("cifar100", "cifar10")):
        frame = claims.table(dataset, ALL)
        assert frame.value.where(~frame.value.duplicated(), "the same").tolist() == list(PRINTED)
        np.testing.assert_allclose(frame.theirs, [both[number] for both in PRINTED.values()], rtol=1e-12)
        holds = ["not measured" if np.isnan(v) else "holds" for v in frame.theirs]
        assert frame.theirs_holds.tolist() == holds, "what the paper claims holds of its own numbers"
    for dataset in ("digits", "svhn"):
        pd.testing.assert_frame_equal(claims.table(dataset, ALL), claims.table("cifar100", ALL))


# --------------------------------------------------------------------------------------------- results made by hand
@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_nets_like_the_papers(results, seeds):
    measure(seeds=seeds)
    frame = claims.table("cifar10", ALL)
    rule = ["claim", "value", "rule", "theirs", "low_bound", "high_bound", "theirs_holds"]
    assert list(frame.columns) == [*rule, "ours", "low", "high", "verdict"]
    expected = [270 / 50, 0, 270 / 20, 50 / 20, 0, 3, 4, 2.5, 2.5, 13, 6, 4, 15 / 40, 25 / 40, 1, 1]
    np.testing.assert_allclose(frame.ours, expected, rtol=1e-3, atol=1e-9)
    assert (frame.low.fillna(frame.ours) <= frame.ours).all()
    assert (frame.ours <= frame.high.fillna(frame.ours)).all()
    assert (frame.verdict == "one run").to_numpy().nonzero()[0].tolist() == ([12, 13] if seeds == 1 else [])
    open_ones = frame[~frame.verdict.isin(["holds", "one run"])]
    assert set(open_ones.verdict) <= {"open"}
    assert set(open_ones.rule) <= {"within ± 1"}, "10 000 images do not tell a point"
    assert frame.low_bound.tolist() == [claim.low for claim in ALL]
    assert frame.high_bound.tolist() == [claim.high for claim in ALL]
    pd.testing.assert_frame_equal(claims.table("cifar10", ALL), frame)


BREAKS = [  # a claim each: what makes it fail
    {"LCNN": {"curvature": 100.0}},
    {"LCNN": {"accuracy": 0.70}},
    {"LCNN + GradReg": {"curvature": 60.0}},
    {"LCNN + GradReg": {"curvature": 60.0}},
    {"LCNN + GradReg": {"accuracy": 0.90}},
    {"LCNN": {"change": 0.07}},
    {"LCNN + GradReg": {"change": 0.03}},
    {"LCNN": {"left": 0.30}},
    {"LCNN": {"left": 0.50}},
    {"GradReg": {"left": 0.40}},
    {"LCNN + GradReg": {"left": 0.45}},
    {"Adversarial training": {"left": 0.50}},
    {"LCNN": {"seconds": 41.0}},
    {"LCNN + GradReg": {"seconds": 41.0}},
    {"LCNN": {"curvature": 70.0}},
    {"LCNN": {"margin_curvature": 10.0}},
]
UNSURE = {  # a claim: what leaves it open
    7: {"LCNN": {"left": 0.372}},
    8: {"LCNN": {"left": 0.418}},
    9: {"GradReg": {"left": 0.472}},
    10: {"LCNN + GradReg": {"left": 0.503}},
    11: {"Adversarial training": {"left": 0.557}},
}


@pytest.mark.parametrize("number", range(len(ALL)), ids=[f"{c.text}: {c.value}" for c in ALL])
def test_each_claim_can_fail(results, number):
    measure(images=60, **BREAKS[number])
    assert verdicts()[number] == "fails"


@pytest.mark.parametrize("number", UNSURE)
def test_robustness_can_be_open(results, number):
    measure(images=20, seeds=1, **UNSURE[number])
    assert verdicts()[number] == "open"


def test_a_lower_bound_within_the_interval_is_open(results):
    measure(images=60, seeds=1, LCNN={"curvature": 270 / 3.5})
    assert verdicts()[0] == "open"


# -------------------------------------------------------------------------------------------------------- intervals
def correlated(seed: int, n: int = 100, ratio: float = 3.0) -> pd.DataFrame:
    """Two nets on the same images, hard ones for both; the means of the population have a known ratio."""
    draw = np.random.default_rng(seed)
    hard = draw.normal(size=n) * 0.6
    own = draw.normal(size=(2, n)) * 0.4
    frame = pd.DataFrame({("a", 0): ratio * np.exp(hard + own[0]), ("b", 0): np.exp(hard + own[1])})
    return frame.rename_axis(columns=["label", "seed"])


def test_intervals_hold_the_true_ratio():
    """60 samples: 95 % of them within the binomial's 0.1 % to 99.9 %, and nearly as wide as the delta method says."""
    found = [claims._ratio(correlated(seed), "a", "b") for seed in range(60)]
    hits = sum(low <= 3.0 <= high for _, low, high in found)
    assert hits >= 50
    wide = []
    for seed, (ratio, low, high) in enumerate(found):
        frame = correlated(seed)
        left = frame["a", 0] / frame["a", 0].mean() - frame["b", 0] / frame["b", 0].mean()
        wide.append((high - low) / (2 * 1.96 * ratio * left.std() / len(frame) ** 0.5))
    assert np.mean(wide) == pytest.approx(1, abs=0.05)


def test_ratios_are_paired():
    frame = correlated(0)
    frame["c", 0], frame["d", 0] = frame["a", 0], 2 * frame["a", 0]
    assert claims._ratio(frame, "a", "c") == (1, 1, 1)
    assert claims._ratio(frame, "d", "a") == pytest.approx((2, 2, 2), rel=1e-12)
    ratio, low, high = claims._ratio(frame, "a", "b")
    turned = claims._ratio(frame, "b", "a")
    assert turned == pytest.approx((1 / ratio, 1 / high, 1 / low), rel=1e-3), "the same images are drawn"
    frame["e", 0] = np.random.default_rng(0).permutation(frame["b", 0])
    _, far_low, far_high = claims._ratio(frame, "a", "e")
    assert high - low < 0.8 * (far_high - far_low), "what two nets share is no error of their ratio"


def test_seeds_that_differ_widen_a_ratio():
    """Three nets a method whose means differ by 20 %: images alone would tell far too much."""
    one, frame = correlated(1), pd.DataFrame()
    for seed, factor in enumerate((0.8, 1.0, 1.2)):
        frame["a", seed], frame["b", seed] = factor * one["a", 0], one["b", 0]
    frame.columns = pd.MultiIndex.from_tuples(frame.columns, names=["label", "seed"])
    _, low, high = claims._ratio(one, "a", "b")
    ratio, wide_low, wide_high = claims._ratio(frame, "a", "b")
    assert ratio == pytest.approx(claims._ratio(one, "a", "b")[0])
    assert wide_high - wide_low > 1.5 * (high - low)
    same = frame.copy()
    for seed in range(3):
        same["a", seed] = one["a", 0]
    assert claims._ratio(same, "a", "b")[1:] == pytest.approx((low, high), rel=0.03), "seeds that agree add nothing"


@pytest.mark.parametrize(("of", "over"), [("LCNN", "Standard"), ("LCNN + GradReg", "GradReg")])
def test_gains_change_sign(results, of, over):
    measure(images=20)
    for gain in (lambda a, b: claims._robust(a, b)[1]("cifar10"), lambda a, b: claims._clean(a, b)[1]("cifar10")):
        value, low, high = gain(of, over)
        assert gain(over, of) == pytest.approx((-value, -high, -low))
        assert low < value < high
    assert claims._robust(of, of)[1]("cifar10")[0] == 0
    printed = claims._robust(of, over)[0]("cifar10")
    assert claims._robust(over, of)[0]("cifar10") == pytest.approx(-printed)


def shares(**runs) -> pd.DataFrame:
    rows = [dict(label=label, share=share, n=100) for label, values in runs.items() for share in values]
    return pd.DataFrame(rows)


def test_intervals_of_differences():
    """Newcombe's, as in his paper's Table II (56/70 − 48/80), and at the ends, where others have no width."""
    frame = pd.DataFrame([dict(label="a", share=56 / 70, n=70), dict(label="b", share=48 / 80, n=80)])
    assert claims._gain(frame, "a", "b") == pytest.approx((20, 5.24, 33.39), abs=0.01)
    value, low, high = claims._gain(shares(a=[0.0], b=[0.0]), "a", "b")
    assert (value, low, high) == pytest.approx((0, -3.70, 3.70), abs=0.01)
    one = claims._gain(shares(a=[0.5], b=[0.4]), "a", "b")
    assert claims._gain(shares(a=[0.5, 0.5], b=[0.4, 0.4]), "a", "b") == pytest.approx(one), "the same images again"
    value, low, high = claims._gain(shares(a=[0.3, 0.7], b=[0.4, 0.45]), "a", "b")
    assert value == pytest.approx(7.5)
    assert high - low > 4 * 100 * np.hypot(0.2828, 0.0354) / 2**0.5, "two seeds that differ tell little (Welch's t)"
    assert claims._gain(shares(a=[0.5]), "a", "b") == pytest.approx(MISSING, nan_ok=True)


def test_what_pgd_leaves(results):
    measure(images=2)
    left = claims._left("cifar10", 0.1)
    assert left.groupby("label").share.mean().to_dict() == pytest.approx({k: v[4] for k, v in NETS.items()})
    assert (left.n == 10_000).all()
    assert not len(claims._left("cifar10", 0.3))


def test_cost_is_the_range_over_seeds(results):
    measure(images=2)
    frame = published.measured("cifar10_runs")
    frame.loc[(frame.label == "LCNN") & (frame.seed == 1), "seconds"] = 25.0
    published.save_measured(frame, "cifar10_runs", {})
    assert claims._costs("LCNN", "Adversarial training")[1]("cifar10") == pytest.approx((0.5, 15 / 40, 25 / 40))
    measure(images=2, seeds=1)
    claims._images.cache_clear()
    frame = claims.table("cifar10")
    assert frame.verdict[12] == frame.verdict[13] == "one run"
    assert claims.shown(frame).ours[12] == "0.375"


# -------------------------------------------------------------------------------------------- what was not measured
RATIOS, ACCURACIES, STEADY, ROBUST, COSTS = {0, 2, 3, 14, 15}, {1, 4}, {5, 6}, {7, 8, 9, 10, 11}, {12, 13}
NEEDS = {"r": ACCURACIES | COSTS, "g": RATIOS, "s": STEADY, "c": ROBUST}


def missing(dataset: str = "cifar10") -> set[int]:
    """Which claims are not measured; their rows are whole all the same."""
    frame = claims.table(dataset, ALL)
    assert len(frame) == len(ALL)
    gone = frame.verdict == "not measured"
    np.testing.assert_array_equal(frame.ours.isna(), gone)
    assert frame[gone][["low", "high"]].isna().all(axis=None)
    shown = claims.shown(frame)
    np.testing.assert_array_equal(shown.ours == "–", gone)
    np.testing.assert_array_equal(shown.published == "–", frame.theirs.isna())
    return {int(i) for i in frame.index[gone]}


@pytest.mark.parametrize("dataset", ["digits", "cifar10", "cifar100", "svhn"])
def test_nothing_measured(results, dataset):
    assert missing(dataset) == set(range(len(ALL)))


@pytest.mark.parametrize("kind", NEEDS)
def test_a_table_is_missing(results, kind):
    measure(images=20, kinds=kind)
    assert missing() == set(range(len(ALL))) - NEEDS[kind]
    assert missing("cifar100") == set(range(len(ALL))), "another dataset's results are not taken"


NEEDED = {  # net: claims about it
    "Standard": {0, 1, 2, 4, 5, 7, 8, 9},
    "LCNN": {0, 1, 3, 5, 6, 7, 8, 12, 14, 15},
    "GradReg": {9, 10},
    "LCNN + GradReg": {2, 3, 4, 6, 10, 11, 13},
    "Adversarial training": {11, 12, 13},
    "Softplus + weight decay": {14, 15},
}


@pytest.mark.parametrize("net", NEEDED)
def test_a_net_is_missing(results, net):
    measure(images=20, **{net: None})
    assert missing() == NEEDED[net]


def test_a_net_without_images_takes_none_from_the_others(results):
    """While results are written, a net may have been measured on no image that the others have."""
    measure(images=20)
    whole = claims.table("cifar10", ALL)
    extra = published.measured("cifar10_geometry")
    extra = extra[extra.label == "GradReg"].assign(label="CURE", image=lambda f: f.image + 1000)
    published.save_measured(pd.concat([published.measured("cifar10_geometry"), extra]), "cifar10_geometry", {})
    pd.testing.assert_frame_equal(claims.table("cifar10", ALL), whole)


@pytest.mark.parametrize("images", [0, 1, 2])
def test_hardly_any_image(results, images):
    """One image has no interval: its ratio is no measurement."""
    measure(images=20)
    for kind in ("geometry", "stability"):
        frame = published.measured(f"cifar10_{kind}")
        few = frame[(frame.label != "Standard") | (frame.image < images)]
        published.save_measured(few, f"cifar10_{kind}", {})
    assert missing() == (set() if images == 2 else {0, 2, 5})


def test_images_of_one_net_only_are_left_out(results):
    """An image that a net got wrong has no gradient map: both nets are read on the images of both."""
    measure(images=40)
    frame = published.measured("cifar10_stability")
    wrong = (frame.label == "LCNN") & (frame.image < 10)
    published.save_measured(frame[~wrong], "cifar10_stability", {})
    at = frame[(frame.noise == "random") & (frame.weights == "trained") & (frame.method == "gradient")]
    at = at[(at.eps == 0.01) & (at.image >= 10)]
    mean = at.groupby("label").relative_change.mean()
    assert claims.table("cifar10").ours[5] == pytest.approx(mean["Standard"] / mean["LCNN"], rel=1e-9)


@pytest.mark.parametrize("kind", ["runs", "geometry", "stability", "curves"])
def test_damaged_results_are_named(results, kind):
    measure(images=20)
    path = results / f"cifar10_{kind}" / "all.csv.gz"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(RuntimeError, match=rf"cifar10_{kind}/all\.csv\.gz is damaged"):
        claims.table("cifar10")


def test_results_are_read_anew(results):
    measure(images=20)
    before = claims.table("cifar10").ours[0]
    measure(images=20, LCNN={"curvature": 5.0})
    assert claims.table("cifar10").ours[0] == pytest.approx(10 * before)


def test_shown(results):
    measure(images=40, kinds="gc")
    frame = claims.table("cifar10")
    shown = claims.shown(frame)
    assert list(shown.columns) == ["claim", "what is measured", "asked", "published", "ours", "verdict"]
    assert shown["claim"].tolist() == [claim.text for claim in CLAIMS]
    assert shown.published[0] == "3.9"
    assert shown.ours[0] == f"5.4 ({frame.low[0]:.3g} – {frame.high[0]:.3g})"
    assert shown.ours[1] == "–"
    assert shown.published[12] == "–"
    assert claims.shown(claims.table("svhn")).verdict.eq("not measured").all()


# ------------------------------------------------------------------------------------------------------ what is stored
@pytest.mark.parametrize("dataset", ["digits", "cifar10", "cifar100"])
def test_stored_results_by_hand(dataset):
    if not published.has(f"{dataset}_geometry"):
        pytest.skip(f"there are no results of {dataset} in data/results")
    frame = claims.table(dataset, ALL).drop_duplicates("value").set_index("value")
    images = published.measured(f"{dataset}_geometry")
    means = images[images.split == "test"].groupby(["label", "seed"]).curvature.mean().groupby("label").mean()
    for net in ("LCNN", "LCNN + GradReg"):
        if {net, "Standard"} <= set(means.index):
            ratio = frame.ours[f"C of Standard over {net}'s, times"]
            assert ratio == pytest.approx(means["Standard"] / means[net], rel=1e-6)
    if published.has(f"{dataset}_runs"):
        runs = published.measured(f"{dataset}_runs").groupby("label").accuracy.mean() * 100
        for net in {"LCNN", "LCNN + GradReg"} & set(runs.index):
            gap = frame.ours[f"accuracy in points, {net} minus Standard"]
            assert gap == pytest.approx(runs[net] - runs["Standard"])
    measured = frame[frame.low.notna()]
    assert (measured.low <= measured.ours).all()
    assert (measured.ours <= measured.high).all()
