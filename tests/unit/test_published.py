"""The printed numbers against what was read off the paper; ours beside them, on result tables made by hand."""

import gzip
import json
import random
from collections import Counter

import numpy as np
import pandas as pd
import pytest

from lcnn_utils.experiments import published, tables
from lcnn_utils.figures.style import METHOD
from lcnn_utils.training import DATASETS, MODELS

LABELS = [METHOD[m][0] for m in ("standard", "lcnn", "gradreg", "lcnn_gradreg", "cure", "softplus_wd", "adversarial")]


def value(frame: pd.DataFrame, **where) -> tuple[float, float]:
    for column, wanted in where.items():
        frame = frame[frame[column] == wanted]
    (row,) = frame.itertuples()
    return row.mean, row.spread


@pytest.mark.parametrize(
    ("method", "quantity", "mean", "spread"),
    [
        ("Standard", "grad_norm", 19.66, 0.33),
        ("Standard", "hessian_norm", 6061.96, 968.05),
        ("Standard", "curvature", 270.89, 75.04),
        ("Standard", "accuracy", 77.42, 0.11),
        ("LCNN", "grad_norm", 22.04, 1.41),
        ("LCNN", "curvature", 69.50, 2.41),
        ("LCNN", "accuracy", 77.30, 0.11),
        ("GradReg", "hessian_norm", 776.56, 63.62),
        ("LCNN + GradReg", "hessian_norm", 154.36, 0.22),
        ("LCNN + GradReg", "curvature", 25.30, 0.09),
        ("CURE", "accuracy", 76.48, 0.07),
        ("Softplus + weight decay", "curvature", 70.39, 0.88),
        ("Adversarial training", "grad_norm", 7.99, 0.03),
        ("Adversarial training", "curvature", 63.79, 1.65),
    ],
)
def test_table_1(method, quantity, mean, spread):
    assert value(published.numbers("paper table 1"), method=method, quantity=quantity) == (mean, spread)


def test_table_1_is_whole():
    frame = published.numbers("paper table 1")
    assert frame.index.tolist() == list(range(28))
    assert list(dict.fromkeys(frame.method)) == LABELS, "our labels, in the paper's order"
    assert set(frame.dataset) == {"cifar100"}
    assert set(frame.architecture) == {"resnet18"}
    wide = frame.pivot(index="method", columns="quantity", values="mean")
    assert set(wide.columns) == {"grad_norm", "hessian_norm", "curvature", "accuracy"}
    assert wide.notna().all(axis=None)
    ratio = wide.curvature / (wide.hessian_norm / wide.grad_norm)
    assert ratio.between(0.5, 2).all(), "a mean of quotients is near the quotient of the means, row by row"


def test_table_2():
    frame = published.numbers("paper table 2")
    assert set(frame.method) == set(LABELS)
    assert value(frame, method="Standard", epsilon=0.2) == (16.11, 0.21)
    assert value(frame, method="LCNN", epsilon=0.1) == (39.72, 0.17)
    assert value(frame, method="Adversarial training", epsilon=0.05) == (72.76, 0.15)
    for _, part in frame.dropna(subset="epsilon").groupby("method"):
        assert part.sort_values("epsilon")["mean"].is_monotonic_decreasing, "a larger ε, fewer right"


def test_the_course_project():
    frame = published.numbers("course project")
    for method, quantity, mean in (
        ("Standard", "curvature", 119.8), ("Standard", "accuracy", 93), ("LCNN", "hessian_norm", 11.16),
        ("LCNN", "accuracy", 64), ("GradReg", "grad_norm", 1.44), ("LCNN + GradReg", "curvature", 2.16),
    ):  # fmt: skip
        assert value(frame, method=method, quantity=quantity)[0] == pytest.approx(mean, rel=5e-3)


def test_the_gradient_robustness_figure():
    frame = published.numbers("paper gradient-robustness figure")
    assert set(frame.dataset) == {"cifar10", "cifar100"}
    assert set(frame.method) == {"Standard", "GradReg", "LCNN", "LCNN + GradReg"}
    lines = frame[frame.epsilon.notna()]
    assert set(lines.epsilon) >= {1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 1e-1}
    assert value(lines[lines.epsilon == 1e-3], dataset="cifar100", method="Standard")[0] == 0.0099
    assert value(lines[lines.epsilon == 1e-1], dataset="cifar10", method="LCNN + GradReg")[0] == 0.049


def test_all_of_it():
    frame = published.numbers()
    expected = ["source", "dataset", "architecture", "method", "quantity", "epsilon", "mean", "spread"]
    assert list(frame.columns) == expected
    assert len(frame) == sum(len(published.numbers(source)) for source in frame.source.unique())
    assert set(frame.dataset) <= set(DATASETS)
    assert set(frame.architecture) <= set(MODELS)
    assert set(frame.method) <= set(LABELS)
    assert not frame.duplicated(expected[:6]).any()
    assert (frame["mean"] > 0).all()
    assert (frame.spread.dropna() >= 0).all()
    frame.loc[0, "mean"] = -1.0
    assert published.numbers()["mean"][0] > 0, "a copy each time"


def test_what_is_not_there(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"nothing is published as 'table 1': known are paper table 1, "):
        published.numbers("table 1")
    monkeypatch.setattr(published, "TABLES", tmp_path / "paper_tables.csv")
    with pytest.raises(FileNotFoundError, match=r"paper_tables\.csv is missing: restore it with git"):
        published.numbers()


# ------------------------------------------------------------------------------------------------ ours beside theirs
SOURCES = {"paper table 1": 28, "paper table 2": 35, "paper gradient-robustness figure": 28}
GEOMETRY = {"grad_norm": 20.0, "hessian_norm": 6000.0, "curvature": 270.0, "margin_curvature": 200.0}
CELL = ["method", "quantity", "epsilon"]


@pytest.fixture
def results(monkeypatch, tmp_path):
    monkeypatch.setattr(published, "RESULTS", tmp_path / "results")
    monkeypatch.setenv("LCNN_STORE", str(tmp_path))
    return tmp_path / "results"


def save(name: str, rows: list[dict], **provenance) -> None:
    published.save_measured(pd.DataFrame(rows), name, {"scale": "tiny"} | provenance)


def run_row(label: str, seed: int, accuracy: float = 0.7, **changes) -> dict:
    about = dict(label=label, method=label.lower(), seed=seed, accuracy=accuracy, images=100, seconds=10.0, epochs=2)
    return about | GEOMETRY | {"curvature_median": 250.0} | changes


def curve_row(label: str, seed: int, eps: float, accuracy: float, norm: str = "l2") -> dict:
    return dict(label=label, seed=seed, norm=norm, eps=eps, n=100, correct=round(100 * accuracy), accuracy=accuracy)


def change_row(label: str, seed: int, image: int, eps: float, change: float, **changes) -> dict:
    about = dict(label=label, seed=seed, image=image, method="gradient", weights="trained", noise="random")
    return about | {"eps": eps, "relative_change": change} | changes


def cell(frame: pd.DataFrame, **where):
    for column, wanted in where.items():
        frame = frame[frame[column].isna() if wanted is None else frame[column] == wanted]
    (row,) = frame.itertuples()
    return row


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("dataset", ["digits", "cifar10", "cifar100", "svhn"])
@pytest.mark.parametrize("measured", [False, True])
def test_every_printed_cell_stands_there_once(results, dataset, source, measured):
    if measured:
        save(f"{dataset}_runs", [run_row("LCNN", s) for s in (0, 1)] + [run_row("Another net", 0)])
        save(f"{dataset}_curves", [curve_row("LCNN", s, e, 0.5) for s in (0, 1) for e in (0.0, 0.05, 0.07)])
        save(f"{dataset}_stability", [change_row("LCNN", 0, i, e, 0.1) for i in range(3) for e in (0.001, 0.3)])
    frame = published.comparison(dataset, source)
    printed = published.numbers(source)
    if (printed.dataset == dataset).any():
        printed = printed[printed.dataset == dataset]
    text = lambda f, names: Counter(map(str, f[names].itertuples(index=False, name=None)))
    assert text(frame, [*CELL, "theirs", "their_dataset"]) == text(printed, [*CELL, "mean", "dataset"])
    on_both = source.endswith("figure") and dataset in ("digits", "svhn")  # the figure has two panels
    assert len(frame) == SOURCES[source] * (1 + on_both)
    assert set(frame.their_dataset) == ({"cifar10", "cifar100"} if on_both else set(printed.dataset))
    at = {"paper table 1": [np.nan], "paper table 2": [0.0, 0.05]}.get(source, [0.001])
    there = (frame.method == "LCNN") & (frame.epsilon.isin(at) | (frame.epsilon.isna() & source.endswith("1")))
    np.testing.assert_array_equal(frame.ours.notna(), there & measured)
    for column in ("ours", "ours_spread", "seeds", "difference", "joint_spread"):
        assert frame[column].dtype == float, "also where nothing was measured"
    assert frame[~there].within.isna().all()
    assert frame[~there][["difference", "seeds", "joint_spread"]].isna().all(axis=None)


def test_difference_spread_and_verdict(results):
    """Two seeds near theirs, two far, two equal ones, one."""
    rows = [run_row("Standard", 0, 0.70, curvature=200.0), run_row("Standard", 1, 0.80, curvature=300.0)]
    rows += [run_row("LCNN", 0, 0.50), run_row("LCNN", 1, 0.50), run_row("GradReg", 7, 0.772)]
    save("cifar10_tiny_runs", rows)
    frame = published.comparison("cifar10", "paper table 1")
    assert set(frame.their_dataset) == {"cifar100"}, "Table 1 is about CIFAR-100"
    near = cell(frame, method="Standard", quantity="accuracy")
    assert (near.ours, near.theirs, near.seeds, near.within) == (pytest.approx(75), 77.42, 2, True)
    assert near.ours_spread == pytest.approx(10 / 2**0.5), "over n - 1"
    assert near.difference == pytest.approx(75 - 77.42)
    assert near.joint_spread == pytest.approx((50 + 0.11**2) ** 0.5)
    curved = cell(frame, method="Standard", quantity="curvature")
    assert curved.ours == pytest.approx(250)
    assert curved.joint_spread == pytest.approx((100**2 / 2 + 75.04**2) ** 0.5)
    far = cell(frame, method="LCNN", quantity="accuracy")
    assert (far.ours_spread, far.within) == (pytest.approx(0), False)
    assert far.joint_spread == pytest.approx(0.11)
    alone = cell(frame, method="GradReg", quantity="accuracy")
    assert (alone.ours, alone.seeds) == (pytest.approx(77.2), 1)
    assert alone.difference == pytest.approx(0)
    assert np.isnan(alone.ours_spread)
    assert np.isnan(alone.joint_spread)
    assert pd.isna(alone.within), "one seed has no spread: no verdict"
    assert frame.within.dtype == "boolean"


def test_what_was_read_off_the_figure_has_its_reading_error(results):
    save("cifar10_tiny_runs", [run_row("Standard", 0)])
    save("cifar10_tiny_stability", [change_row("Standard", s, 0, 0.01, c) for s, c in ((0, 0.058), (1, 0.0595))])
    frame = published.comparison("cifar10", "paper gradient-robustness")
    assert set(frame.their_dataset) == {"cifar10"}
    np.testing.assert_allclose(frame.theirs_spread, 0.05 * frame.theirs)
    row = cell(frame, method="Standard", epsilon=0.01)
    assert row.theirs == 0.059
    assert row.joint_spread == pytest.approx((0.0015**2 / 2 + (0.05 * 0.059) ** 2) ** 0.5)
    assert row.within
    assert set(published.comparison("cifar100", "paper gradient-robustness").their_dataset) == {"cifar100"}
    assert published.comparison("cifar10", "paper table 2").theirs_spread.notna().all(), "those are printed"
    course = published.comparison("cifar10", "course project")
    assert course.theirs_spread.isna().all(), "± across samples is no spread over runs, and was left out"
    assert course.within.isna().all()


def test_ours_by_hand(results):
    rows = [run_row("LCNN", 0, 0.70, curvature=1.0), run_row("LCNN", 1, 0.72, curvature=3.0)]
    save("digits_runs", [*rows, run_row("LCNN", 2, 0.77, curvature=8.0)])
    curves = [curve_row("LCNN", s, 0.1, a, n) for s, a, n in ((0, 0.5, "l2"), (1, 0.7, "l2"), (0, 0.2, "linf"))]
    save("digits_curves", curves)
    kept = [change_row("LCNN", 0, i, 0.01, c) for i, c in enumerate((0.1, 0.2, 0.6))]
    kept += [change_row("LCNN", 1, 0, 0.01, 0.5)]  # one image only: means over images first, then over seeds
    other = [dict(noise="worst"), dict(weights="random"), dict(method="smoothgrad")]
    save("digits_stability", kept + [change_row("LCNN", 0, 0, 0.01, 9.0, **change) for change in other])
    frame = published.ours("digits")
    assert list(frame.columns) == ["source", "dataset", *CELL, "mean", "spread", "seeds"]
    assert (set(frame.source), set(frame.dataset), set(frame.method)) == ({"ours"}, {"digits"}, {"LCNN"})
    assert len(frame) == 6 + 2 + 1
    row = cell(frame, quantity="accuracy", epsilon=None)
    assert (row.mean, row.seeds) == (pytest.approx(73), 3), "in %"
    assert row.spread == pytest.approx(np.std([70, 72, 77], ddof=1))
    row = cell(frame, quantity="curvature")
    assert (row.mean, row.spread) == (pytest.approx(4), pytest.approx(13**0.5))
    row = cell(frame, quantity="pgd_l2_accuracy", epsilon=0.1)
    assert (row.mean, row.spread, row.seeds) == (pytest.approx(60), pytest.approx(200**0.5), 2)
    row = cell(frame, quantity="pgd_linf_accuracy", epsilon=0.1)
    assert (row.mean, row.seeds) == (pytest.approx(20), 1)
    assert np.isnan(row.spread)
    row = cell(frame, quantity="relative_gradient_change", epsilon=0.01)
    assert (row.mean, row.seeds) == (pytest.approx((0.3 + 0.5) / 2), 2)
    assert row.spread == pytest.approx(0.2 / 2**0.5)


def test_a_seed_without_a_value_is_not_counted(results):
    save(
        "digits_runs", [run_row("LCNN", 0), run_row("LCNN", 1, curvature=np.nan), run_row("CURE", 0, curvature=np.nan)]
    )
    frame = published.ours("digits")
    row = cell(frame, method="LCNN", quantity="curvature")
    assert (row.seeds, row.mean) == (1, 270)
    assert cell(frame, method="LCNN", quantity="accuracy").seeds == 2
    assert frame[frame.method == "CURE"].quantity.eq("curvature").sum() == 0, "not measured: not there"


def test_nothing_measured(results):
    frame = published.ours("digits")
    assert len(frame) == 0
    assert list(frame.columns) == ["source", "dataset", *CELL, "mean", "spread", "seeds"]
    assert not published.has("digits_runs")
    for ask in (published.measured, published.about):
        with pytest.raises(
            FileNotFoundError, match=r"no results called 'digits_runs' in data/results \(there are: none\)"
        ):
            ask("digits_runs")
    with pytest.raises(ValueError, match="nothing is published as 'paper table 3'"):
        published.comparison("digits", "paper table 3")


def test_the_best_scale_comes_first(results):
    for count, scale in enumerate(("tiny_", "small_", "paper_"), 1):
        save(f"cifar10_{scale}runs", [run_row("Standard", s) for s in range(count)], scale=scale)
        assert published.best("cifar10_runs") == f"cifar10_{scale}runs"
        assert published.best("cifar10_curves") == f"cifar10_{scale}curves"
        assert published.has("cifar10_runs")
        assert len(published.measured("cifar10_runs")) == count
        assert published.about("cifar10_runs")["scale"] == scale
        assert published.ours("cifar10").seeds.eq(count).all()
    assert published.best("cifar10_tiny_runs") == "cifar10_tiny_runs", "just that"
    assert len(published.measured("cifar10_tiny_runs")) == 1
    assert published.best("cifar100_runs") == "cifar100_runs", "another dataset"
    assert published.best("cifar10") == "cifar10"
    assert not published.has("cifar10_curves")


def test_scales_are_not_mixed(results):
    """Curves of tiny nets beside runs of large ones: they belong to other nets, and are left out."""
    save("cifar10_tiny_runs", [run_row("Standard", 0)])
    save("cifar10_tiny_curves", [dict(label="Standard", method="standard", seed=0, norm="l2", eps=0.1, n=9, correct=3,
                                      accuracy=1 / 3)])  # fmt: skip
    assert published.has("cifar10_curves")
    save("cifar10_small_runs", [run_row("LCNN", 0)])
    assert published.best("cifar10_runs") == "cifar10_tiny_runs", "no Standard net to compare with yet"
    save("cifar10_small_runs", [run_row("Standard", 0)])
    assert not published.has("cifar10_curves")
    assert set(published.ours("cifar10").quantity.str[:3]) == {"acc", "gra", "hes", "cur", "mar"}


# ---------------------------------------------------------------------------------------------------- damaged files
def test_a_damaged_table_is_named(results):
    """Cut, with a bit turned, or replaced: never another error, and never other numbers."""
    save("digits_runs", [run_row("LCNN", s) for s in range(20)])
    path = results / "digits_runs" / "all.csv.gz"
    whole, draw = path.read_bytes(), random.Random(0)
    frame = published.measured("digits_runs")
    for trial in range(150):
        blob = bytearray(whole)
        if trial % 3 == 0:
            del blob[draw.randrange(len(blob)) :]
        elif trial % 3 == 1:
            blob[draw.randrange(len(blob))] ^= 1 << draw.randrange(8)
        else:
            text = bytearray(gzip.decompress(whole))
            text[draw.randrange(text.index(b"\n"))] = 0xFF  # of the header
            blob = gzip.compress(bytes(text))
        path.write_bytes(blob)
        try:
            found = published.measured("digits_runs")
        except RuntimeError as error:
            assert "digits_runs/all.csv.gz is damaged (" in str(error)  # noqa: PT017
            assert "restore it with git" in str(error)  # noqa: PT017
        else:  # gzip's header holds a time and a system, which nobody needs
            pd.testing.assert_frame_equal(found, frame)


@pytest.mark.parametrize("kind", ["runs", "curves", "stability", "geometry"])
def test_a_table_of_another_version_is_named(results, kind):
    with pytest.raises(ValueError, match="it lacks "):
        save(f"digits_{kind}", [{"label": "LCNN", "seed": 0}])
    assert not published.has(f"digits_{kind}")
    tables.write(results / f"digits_{kind}" / "all.csv.gz", gzip.compress(b"label,seed\nLCNN,0\n"), {})
    with pytest.raises(
        RuntimeError, match=rf"digits_{kind}/all\.csv\.gz is damaged \(it lacks .*\): restore it with git"
    ):
        published.measured(f"digits_{kind}")


@pytest.mark.parametrize("blob", [b"", b'{"scale": "t', b"\xff\xfe", b"[1, 2]", b"null"])
def test_a_damaged_record_is_named(results, blob):
    save("digits_runs", [run_row("LCNN", 0)])
    assert published.about("digits_runs") == {"scale": "tiny"}
    (results / "digits_runs" / "all.json").write_bytes(blob)
    with pytest.raises(RuntimeError, match=r"digits_runs/all\.json is damaged \(.*\): restore it with git"):
        published.about("digits_runs")


# ------------------------------------------------------------------------------------------------------ what is stored
STORED = tables.names((published.RESULTS,))


@pytest.mark.parametrize("name", STORED)
def test_stored_results(name):
    frame, about = published.measured(name), published.about(name)
    assert len(frame)
    assert about["command"].startswith("python benchmarks/")
    assert json.loads(json.dumps(about)) == about
    if "label" in frame:
        assert set(frame.label) <= {label for label, _, _ in METHOD.values()}
    if name.endswith("_runs"):
        assert frame.run.tolist() == list(about["runs"]), "a row a run"
        assert not frame.duplicated(["label", "seed"]).any(), "a seed is counted once"
        assert frame.accuracy.between(0, 1).all(), "a share in the file, % where it is shown"
    if name.endswith("_curves"):
        np.testing.assert_allclose(frame.accuracy, frame.correct / frame.n, rtol=1e-4)
        assert not frame.duplicated(["label", "seed", "norm", "eps"]).any()
    if name.endswith("_geometry"):
        assert not frame.duplicated(["label", "seed", "split", "image"]).any()
        np.testing.assert_allclose(frame.curvature, frame.hessian_norm / (frame.grad_norm + 1e-6), rtol=3e-4)
    if name.endswith("_stability"):
        keys = ["label", "seed", "image", "method", "weights", "noise", "eps"]
        assert not frame.duplicated(keys).any()


@pytest.mark.parametrize("name", [name for name in STORED if name.endswith("_geometry")])
def test_stored_images_have_the_mean_of_the_stored_runs(name):
    """Where as many images were measured, the runs' means are those of the images."""
    images = published.measured(name)
    images = images[(images.split == "test") & (images.method != "relu_reading")]
    runs = published.measured(name.replace("_geometry", "_runs")).set_index(["label", "seed"])
    for (label, seed), part in images.groupby(["label", "seed"]):
        run = runs.loc[(label, seed)]
        tolerance = 0.02 if run.measured == len(part) else 0.25  # Lanczos' 1 % and other batches; else other images
        for column in ("grad_norm", "hessian_norm", "curvature", "margin_curvature"):
            assert part[column].mean() == pytest.approx(run[column], rel=tolerance), (label, seed, column)
