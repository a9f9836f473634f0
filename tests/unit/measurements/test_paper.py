"""Ours beside the paper's: tables by hand, and the stored measurements again from the checkpoints."""

import numpy as np
import pandas as pd
import pytest

from lcnn_utils.experiments import append, comparison, measured, plus_minus
from lcnn_utils.experiments.results import GEOMETRY
from lcnn_utils.measurements import paper
from lcnn_utils.measurements.evaluate import geometry
from lcnn_utils.training import recipe


def runs(**columns):
    """Rows of a table of runs."""
    numbers = dict.fromkeys((*GEOMETRY, "curvature_median"), 1.0)
    return pd.DataFrame(numbers | {"accuracy": 0.7, "images": 100, "seconds": 10.0, "epochs": 2} | columns)


def test_every_printed_cell_is_judged(results):
    """Two seeds: inside or outside; one seed; not measured."""
    nets = dict(label=["LCNN", "LCNN", "Standard"], method=["lcnn", "lcnn", "standard"], seed=[0, 1, 0])
    append(runs(**nets), "cifar100_small_runs", {"scale": "small"})
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


def test_zeros_can_be_written():
    assert plus_minus(0.0, 0.0) == "0 ± 0"


def test_the_table_of_both_splits_holds_the_stored_means():
    frame = measured("digits_geometry")
    means = frame.groupby(["method", "split", "seed"]).curvature.mean()
    for row in paper.train_test(frame).itertuples():
        assert (row.train, row.test) == pytest.approx([means[row.method, s, row.seed] for s in ("train", "test")])


@pytest.mark.parametrize(
    ("dataset", "method", "seed"), [("digits", "standard", 0), ("digits", "lcnn_gradreg", 2), ("cifar10", "lcnn", 0)]
)
def test_stored_geometry_comes_from_the_checkpoints(dataset, method, seed, monkeypatch, request):
    """Lanczos stops at an estimated 1 % (here and there, in other batches); five digits are stored."""
    if dataset == "cifar10":
        monkeypatch.setenv("LCNN_DATA", str(request.getfixturevalue("cifar_root")))
    monkeypatch.setenv("LCNN_DEVICE", "cpu")
    frame = geometry(recipe(dataset, method, seed), {"test": 2, "train": 2})
    counts = frame.groupby(["method", "split"]).image.apply(list).to_dict()
    with_reading = {("relu_reading", "test"): [0, 1]} if method == "standard" else {}
    assert counts == {(method, "test"): [0, 1], (method, "train"): [0, 1]} | with_reading
    keys = ["method", "split", "seed", "image"]
    both = frame.merge(measured(f"{dataset}_geometry"), on=keys, suffixes=("", "_stored"))
    assert len(both) >= 2
    np.testing.assert_allclose(both.grad_norm, both.grad_norm_stored, rtol=1e-3)
    for column in ("hessian_norm", "curvature", "margin_curvature"):
        np.testing.assert_allclose(both[column], both[f"{column}_stored"], rtol=0.02, atol=1e-6, err_msg=column)
    np.testing.assert_array_equal(both.correct, both.correct_stored)
