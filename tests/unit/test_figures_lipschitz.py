"""Figures of notebook 04 draw what their frame holds, name their axes, and touch no file."""

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from test_explorers_lipschitz import frame as gamma_frame

from lcnn_utils.figures import lipschitz as figures
from lcnn_utils.figures import style

pytestmark = pytest.mark.usefixtures("drawing")


def drawn(axis) -> dict[str, np.ndarray]:
    return {line.get_label(): np.asarray(line.get_xydata()) for line in axis.lines}


def named(figure: Figure, x: bool = True) -> Figure:
    for axis in figure.axes:
        if axis.lines and x:
            assert any(other.get_xlabel() for other in axis.get_shared_x_axes().get_siblings(axis))
    assert any(axis.get_ylabel() for axis in figure.axes)
    return figure


def test_matrices():
    kernel, matrix = torch.arange(9.0).view(3, 3) - 4, torch.eye(4)
    figure = figures.matrices(kernel, {1: matrix, 2: matrix[:1]})
    for axis, values in zip(figure.axes, (kernel, matrix, matrix[:1]), strict=False):
        np.testing.assert_array_equal(axis.images[0].get_array(), values)
        assert axis.images[0].get_clim() == (-4, 4), "white is 0"
    assert [text.get_text() for text in figure.axes[0].texts] == [f"{v:.2f}" for v in kernel.flatten().tolist()]
    assert [axis.get_title() for axis in figure.axes[:3]] == ["kernel", "stride 1: 4 × 4", "stride 2: 1 × 4"]


def test_norms():
    rng = np.random.default_rng(0)
    rows = [
        (stride, size, kernel, estimate, 2.0 + kernel + size / 8, rng.uniform(0.5, 2))
        for stride in (1, 2)
        for size in (4, 8)
        for kernel in range(3)
        for estimate in figures.ESTIMATE
    ]
    frame = pd.DataFrame(rows, columns=["stride", "size", "kernel", "estimate", "true", "ratio"])
    figure = named(figures.norms(frame))
    for axis, stride in zip(figure.axes[1:3], (1, 2), strict=True):
        for bar, name in zip(axis.containers, figures.ESTIMATE, strict=True):
            ratio = frame[(frame.stride == stride) & (frame.estimate == name)].groupby("size").ratio
            np.testing.assert_allclose(bar.lines[0].get_xydata(), np.stack([[4, 8], ratio.mean()], 1))
            ranges = [segment[:, 1] for segment in bar.lines[2][0].get_segments()]
            np.testing.assert_allclose(ranges, np.stack([ratio.min(), ratio.max()], 1))
            assert bar.get_label() == figures.ESTIMATE[name][0]
    np.testing.assert_allclose(figure.axes[0].containers[0].lines[0].get_xydata()[:, 1], [3.5, 4.0])


def test_power_and_training():
    frame = pd.DataFrame(
        [(k, n, 1 - 0.1 * (k + 1) / n) for k in range(3) for n in (1, 10, 100)],
        columns=["kernel", "iterations", "ratio"],
    )
    lines = drawn(named(figures.power(frame)).axes[0])
    np.testing.assert_allclose(lines["median of 3 random kernels"], [[1, 0.2], [10, 0.02], [100, 0.002]])
    np.testing.assert_allclose(lines["worst of them"][:, 1], [0.3, 0.03, 0.003])
    frame = frame.rename(columns={"kernel": "layer", "iterations": "step"}).assign(error=1 - frame.ratio)
    lines = drawn(named(figures.training_norms(frame, 0.25)).axes[0])
    np.testing.assert_allclose(lines["median of 3 layers"][:, 1], [0.2, 0.02, 0.002])
    np.testing.assert_allclose(lines["worst layer"][:, 1], [0.3, 0.03, 0.003])
    assert lines["the classifier, from a random start"][0, 1] == 0.25


def test_spectra():
    rows = [
        (method, layer, operator, share, len(layer) * share)
        for method in ("standard", "lcnn")
        for layer in ("stem", "block 1 conv 2", "block 1 shortcut")
        for operator in ("a", "b")
        for share in (0.5, 1.0)
    ]
    frame = pd.DataFrame(rows, columns=["method", "layer", "operator", "share", "value"])
    figure = named(figures.spectra(frame))
    assert [axis.get_title() for axis in figure.axes] == ["Standard: a", "LCNN: a", "Standard: b", "LCNN: b"]
    for axis in figure.axes:
        lines = drawn(axis)
        for layer in frame.layer.unique():
            np.testing.assert_allclose(lines[layer], [[0.5, len(layer) / 2], [1, len(layer)]])
        looks = {line.get_label(): (line.get_color(), line.get_linestyle()) for line in axis.lines}
        stem, conv, shortcut = (looks[layer] for layer in frame.layer.unique())
        assert stem[0] != conv[0] == shortcut[0], "one colour a block"
        assert len({stem[1], conv[1], shortcut[1]}) == 3


def test_clips_and_slopes():
    frame = pd.DataFrame(
        [(r, c, 1.0 + c) for r in figures.RULE for c in range(3)], columns=["rule", "channel", "slope"]
    )
    lines = drawn(named(figures.clips(frame, 2.0)).axes[0])
    for rule in figures.RULE:
        np.testing.assert_allclose(lines[rule][:, 1], [1, 2, 3])
    assert lines["γ = 2"][0, 1] == 2
    rows = [(m, layer, s, g) for m, g in (("standard", np.nan), ("lcnn", 9.0)) for layer in "ab" for s in (1.0, 2.0)]
    figure = named(figures.slopes(pd.DataFrame(rows, columns=["method", "layer", "slope", "gamma"])), x=False)
    lines = drawn(figure.axes[0])
    np.testing.assert_allclose(lines["LCNN"].round(), [[0, 1], [0, 2], [1, 1], [1, 2]])
    np.testing.assert_allclose(lines["γ of the LCNN"][:, 1], [9, 9])
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["a", "b"]


def test_gamma():
    frame = gamma_frame()
    figure = named(figures.gamma(frame))
    for axis, (column, factor) in zip(
        figure.axes, {"accuracy": 100, "curvature": 1, "grad_norm": 1}.items(), strict=True
    ):
        lines = drawn(axis)
        assert len(lines) == (5 if column == "accuracy" else 4)
        for (method, statistics), part in frame.groupby(["method", "statistics"]):
            points = part.groupby("gamma")[column].first()
            label = f"{style.METHOD[method][0]}, statistics {statistics}"
            np.testing.assert_allclose(lines[label], np.stack([points.index, factor * points], 1))
    assert list(figure.axes[0].lines[-1].get_ydata()) == [10, 10]
    assert [text.get_text() for text in figure.axes[0].texts] == ["chance: 10 %"]


def test_residual():
    rows = [
        (block, seed, n, 0.1 * seed + n, 1.0 / n, 2.0**n if block == "sum" else np.nan)
        for block in figures.BLOCK
        for seed in range(3)
        for n in (1, 2)
    ]
    frame = pd.DataFrame(rows, columns=["block", "seed", "blocks", "slope", "signal", "bound"])
    left, right = named(figures.residual(frame)).axes
    for block in figures.BLOCK:
        np.testing.assert_allclose(drawn(left)[block], [[1, 1.1], [2, 2.1]])
        np.testing.assert_allclose(drawn(right)[block], [[1, 1], [2, 0.5]])
    assert any(np.array_equal(line.get_ydata(), [2, 4]) for line in left.lines), "the bound"
