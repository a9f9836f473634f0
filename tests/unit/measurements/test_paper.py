"""Ours beside the paper's: tables by hand, and the stored measurements again from the checkpoints."""

import importlib
import math

import numpy as np
import pandas as pd
import pytest

from lcnn_utils.experiments import append, comparison, measured, plus_minus
from lcnn_utils.figures.style import METHOD
from lcnn_utils.measurements import paper
from lcnn_utils.measurements.evaluate import geometry
from lcnn_utils.training import recipe

stored_results = importlib.import_module("lcnn_utils.experiments.results")
NAN = math.nan


@pytest.mark.parametrize(
    ("mean", "std", "text"),
    [
        (270.89, 75.04, "271 ± 75"),
        (6061.96, 968.05, "6062 ± 968"),
        (0.0766, 0.00383, "0.0766 ± 0.0038"),
        (0.5, 20.0, "0.5 ± 20.0"),
        (5.18, NAN, "5.18"),
        (0.0, 0.0, "0 ± 0"),
        (NAN, NAN, "–"),
    ],
)
def test_plus_minus(mean, std, text):
    assert plus_minus(mean, std) == text


@pytest.fixture
def results(monkeypatch, tmp_path):
    """No results but those that the test stores."""
    monkeypatch.setattr(stored_results, "RESULTS", tmp_path / "results")
    monkeypatch.setenv("LCNN_STORE", str(tmp_path))


def runs(**columns):
    """Rows of a table of runs."""
    numbers = dict.fromkeys((*stored_results.GEOMETRY, "curvature_median"), 1.0)
    return pd.DataFrame(numbers | {"accuracy": 0.7, "images": 100, "seconds": 10.0, "epochs": 2} | columns)


def test_every_printed_cell_is_judged(results):
    """Two seeds: inside or outside; one seed; not measured."""
    nets = dict(label=["LCNN", "LCNN", "Standard"], method=["lcnn", "lcnn", "standard"], seed=[0, 1, 0])
    append(runs(**nets), "cifar100_tiny_runs", {"scale": "tiny"})
    assert paper.datasets() == ["cifar100"]
    cells = paper.cells("cifar100")
    table = paper.cells_table(cells)
    assert len(table) == len(cells) == sum(len(comparison("cifar100", source)) for source in paper.TABLES)
    assert table["joint standard deviation"].value_counts().to_dict() == {
        "not measured": len(cells) - 8, "outside": 4, "one run": 4
    }  # fmt: skip
    assert not table.isna().any(axis=None)
    printed = table[table.table == "Table 1"].set_index(["net", ""])[["ours", "published", "difference"]]
    assert printed.loc["LCNN", "accuracy %"].tolist() == ["70.0 ± 0.0", "77.30 ± 0.11", "-7.3"]
    assert printed.loc["CURE", "C"].tolist() == ["–", "116.31 ± 4.58", "–"]


def test_tables_of_geometry_hold_the_stored_means():
    frame = measured("digits_geometry")
    means = frame.groupby(["method", "split", "seed"]).curvature.mean()
    for row in paper.train_test(frame).itertuples():
        assert (row.train, row.test) == pytest.approx([means[row.method, s, row.seed] for s in ("train", "test")])
    readings = paper.readings(frame).set_index("net")
    for method in ("standard", "relu_reading"):
        over_seeds = means[method, "test"]
        shown = readings["C of the loss, mean"][METHOD[method][0]]
        assert shown == plus_minus(over_seeds.mean(), over_seeds.std())


@pytest.mark.parametrize(
    ("dataset", "scale", "method", "seed"),
    [("digits", "lab", "standard", 0), ("digits", "lab", "lcnn_gradreg", 2), ("cifar10", "tiny", "lcnn", 0)],
)
def test_stored_geometry_comes_from_the_checkpoints(dataset, scale, method, seed, monkeypatch, request):
    """Lanczos stops at an estimated 1 % (here and there, in other batches); five digits are stored."""
    if dataset == "cifar10":
        monkeypatch.setenv("LCNN_DATA", str(request.getfixturevalue("cifar_root")))
    monkeypatch.setenv("LCNN_DEVICE", "cpu")
    name = "digits_geometry" if dataset == "digits" else f"{dataset}_{scale}_geometry"
    frame = geometry(recipe(dataset, method, seed, scale), {"test": 2, "train": 2})
    counts = frame.groupby(["method", "split"]).image.apply(list).to_dict()
    with_reading = {("relu_reading", "test"): [0, 1]} if method == "standard" else {}
    assert counts == {(method, "test"): [0, 1], (method, "train"): [0, 1]} | with_reading
    keys = ["method", "split", "seed", "image"]
    both = frame.merge(measured(name), on=keys, suffixes=("", "_stored"))
    assert len(both) >= 2
    np.testing.assert_allclose(both.grad_norm, both.grad_norm_stored, rtol=1e-3)
    for column in ("hessian_norm", "curvature", "margin_curvature"):
        np.testing.assert_allclose(both[column], both[f"{column}_stored"], rtol=0.02, atol=1e-6, err_msg=column)
    np.testing.assert_array_equal(both.correct, both.correct_stored)
