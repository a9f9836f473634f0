"""The printed numbers: some of each table against what was read off the paper, and the table's own consistency."""

import pandas as pd
import pytest

from lcnn_utils import published
from lcnn_utils.recipe import DATASETS, MODELS
from lcnn_utils.style import METHOD

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
