"""Figures of notebook 05 draw what their frame holds, name their axes, warn of nothing, and touch no file."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from lcnn_utils.figures import training as figures
from lcnn_utils.figures.style import METHOD
from lcnn_utils.measurements.training import LAMBDAS

pytestmark = pytest.mark.usefixtures("drawing")


def named(figure: Figure) -> Figure:
    """Every panel says what it shows, on both axes or in its title; and all of it can be drawn."""
    for axis in figure.axes:
        assert axis.get_xlabel()
        shared = axis.get_shared_y_axes().get_siblings(axis)
        assert any(other.get_ylabel() for other in shared) or axis.get_title() or len(axis.get_yticklabels()) > 1
    figure.canvas.draw()
    return figure


def look(line) -> tuple[str, str]:
    return to_hex(line.get_color()), line.get_marker()


def history(epochs: int, scale: float = 1.0) -> pd.DataFrame:
    epoch = np.arange(1, epochs + 1)
    columns = {"loss": scale * 2.0 / epoch, "accuracy": 1 - 0.5 / epoch, "curvature": 3.0 * scale * epoch}
    return pd.DataFrame({"epoch": epoch} | columns)


@pytest.mark.parametrize("methods", [("standard", "lcnn")])
def test_training_curves(methods):
    histories = {method: history(4, 1.0 + i) for i, method in enumerate(methods)}
    axes = named(figures.training_curves(histories)).axes
    assert len(axes) == 3
    for axis, (column, factor) in zip(axes, {"loss": 1, "accuracy": 100, "curvature": 1}.items(), strict=True):
        assert len(axis.lines) == len(methods)
        for line, (method, table) in zip(axis.lines, histories.items(), strict=True):
            np.testing.assert_allclose(line.get_xydata(), np.stack([table.epoch, factor * table[column]], 1))
            assert (line.get_label(), *look(line)) == (METHOD[method][0], to_hex(METHOD[method][1]), METHOD[method][2])
        assert axis.get_yscale() == ("linear" if column == "accuracy" else "log")


def layer_frame(epochs: int = 3, layers: int = 5, kinds=("beta", "gamma"), low: float = 1.0) -> pd.DataFrame:
    rows = [
        (epoch, kind, layer, f"{layer}.x", low * (1 + 0.1 * layer + epoch) * (2 if kind == "gamma" else 1))
        for kind in kinds
        for layer in range(1, layers + 1)
        for epoch in range(1, epochs + 1)
    ]
    return pd.DataFrame(rows, columns=["epoch", "kind", "layer", "name", "value"])


@pytest.mark.parametrize("size", [dict(), dict(epochs=1, layers=1, low=1e-3)])
def test_layers(size):
    frame = layer_frame(**size)
    axes = named(figures.layers(frame)).axes
    assert len(axes) == 2
    for axis, kind in zip(axes, ("beta", "gamma"), strict=True):
        part = frame[frame.kind == kind]
        count = part.layer.max()
        assert len(axis.lines) == count
        for line, (_, values) in zip(axis.lines, part.groupby("layer"), strict=True):
            np.testing.assert_allclose(line.get_xydata(), values[["epoch", "value"]])
        assert [text.get_text() for text in axis.texts] == [str(layer) for layer in range(1, count + 1)]
        for text, (_, values) in zip(axis.texts, part.groupby("layer"), strict=True):
            assert text.xy == tuple(values[["epoch", "value"]].iloc[-1]), "each number at the end of its line"
        low, high = axis.get_ylim()
        inside = [tick for tick in axis.get_yticks() if low <= tick <= high]
        assert 1 <= len(inside) <= 8, "readable numbers at the axis, whatever the values"


def runs(method: str, accuracy, curvature, margin, lam: float = 0.01) -> pd.DataFrame:
    columns = dict(accuracy=accuracy, curvature=curvature, margin_curvature=margin)
    return pd.DataFrame(dict(method=method, lambda_beta=lam) | columns)


def test_accuracy_against_curvature():
    frame = pd.concat(
        [
            runs("standard", [0.98, 0.96], [30.0, 50.0], [20.0, 24.0]),
            runs("lcnn", [0.95, 0.99], [4.0, 6.0], [1.0, 3.0]),
            runs("relu", [0.90, 0.92], [10.0, 12.0], [0.0, 0.0]),
        ]
    )
    figure = named(figures.accuracy_against_curvature(frame))
    left, right = figure.axes
    expected = {METHOD[m][0]: (part, METHOD[m][1], METHOD[m][2]) for m, part in frame.groupby("method")}
    for axis, column in ((left, "curvature"), (right, "margin_curvature")):
        names = {bar.get_label() for bar in axis.containers}
        assert names == set(expected) - ({METHOD["relu"][0]} if axis is right else set()), "no 0 on a logarithm"
        for bar in axis.containers:
            part, colour, marker = expected[bar.get_label()]
            (x, y) = bar.lines[0].get_xydata()[0]
            assert (x, y) == pytest.approx((part[column].mean(), 100 * part.accuracy.mean()))
            assert look(bar.lines[0]) == (to_hex(colour), marker)
            assert axis.get_xlim()[0] < x < axis.get_xlim()[1]
            (x0, _), (x1, _) = bar.lines[2][0].get_segments()[0]
            (_, y0), (_, y1) = bar.lines[2][1].get_segments()[0]
            assert (x1 - x0) / 2 == pytest.approx(part[column].std())
            assert (y1 - y0) / 2 == pytest.approx(100 * part.accuracy.std())
    (legend,) = figure.legends
    assert {text.get_text() for text in legend.get_texts()} == set(expected)


@pytest.mark.parametrize("scale", [50.0])
def test_every_method_has_its_point(scale):
    frame = pd.concat(
        runs(m, [0.9 - 0.01 * i, 0.9], [scale * (i + 1), scale * (i + 2)], [scale, scale * (i + 2)])
        for i, m in enumerate(list(METHOD)[:9])
    )
    figure = named(figures.accuracy_against_curvature(frame))
    for axis in figure.axes:
        assert len(axis.containers) == 9
        assert len({look(bar.lines[0]) for bar in axis.containers}) == 9
        low, high = axis.get_xlim()
        assert [tick for tick in axis.get_xticks() if low < tick < high], "a number at the axis"


def test_lambdas():
    frame = pd.concat(
        runs("lcnn", [0.9 - lam, 0.8 - lam], [5 - 10 * lam, 6 - 10 * lam], 1.0, lam) for lam in LAMBDAS[::-1]
    )
    layers = pd.concat(
        layer_frame(epochs=1).assign(lambda_=lam, value=lambda t, lam=lam: t.value - lam) for lam in LAMBDAS
    )
    figure = named(figures.lambdas(frame, layers))
    accuracy, curvature, beta, gamma = figure.axes
    for axis, column, factor in ((accuracy, "accuracy", 100), (curvature, "curvature", 1)):
        (bar,) = axis.containers
        values = [frame[frame.lambda_beta == lam][column] for lam in LAMBDAS]
        np.testing.assert_allclose(bar.lines[0].get_xydata(), [[i, factor * v.mean()] for i, v in enumerate(values)])
        assert to_hex(bar.lines[0].get_color()) == METHOD["lcnn"][1]
        heights = [(y1 - y0) / 2 for (_, y0), (_, y1) in bar.lines[2][0].get_segments()]
        np.testing.assert_allclose(heights, [factor * v.std() for v in values])
    for axis, kind in ((beta, "beta"), (gamma, "gamma")):
        assert len(axis.lines) == 5
        for layer, line in enumerate(axis.lines, 1):
            part = layers[(layers.kind == kind) & (layers.layer == layer)].set_index("lambda_").value
            np.testing.assert_allclose(line.get_xydata(), [[i, part[lam]] for i, lam in enumerate(LAMBDAS)])
    for axis, letter in zip(figure.axes, "abcd", strict=True):
        assert [text.get_text() for text in axis.get_xticklabels()] == [f"{lam:g}" for lam in LAMBDAS]
        assert axis.get_xlabel() == "λ_β = λ_γ"
        assert axis.get_title().startswith(f"({letter}) ")
    assert accuracy.get_ylim() == (0, 105)


def test_signal():
    nets = ("λ for the schedule", "both λ too large", "only λ_β too large", "only λ_γ too large")
    frame = pd.DataFrame([(n, k, 0.3 / (k + i + 1)) for i, n in enumerate(nets) for k in range(4)],
                         columns=["net", "layer", "spread"])  # fmt: skip
    (axis,) = named(figures.signal(frame)).axes
    assert [line.get_label() for line in axis.lines] == list(nets)
    for line, net in zip(axis.lines, nets, strict=True):
        np.testing.assert_allclose(line.get_xydata(), frame[frame.net == net][["layer", "spread"]])
    assert len({look(line) for line in axis.lines}) == 4
    assert axis.get_yscale() == "log"
    assert [text.get_text() for text in axis.get_legend().get_texts()] == list(nets)


def test_cost():
    ratios = {"lcnn": [1.2, 1.4, 1.3, 1.5, 9.0], "standard": [1.0] * 5, "cure": [3.0, 2.5, 3.5, 4.0, 2.0]}
    frame = pd.DataFrame(
        [(m, METHOD[m][0], r) for m, rs in ratios.items() for r in rs], columns=["method", "label", "ratio"]
    )
    (axis,) = named(figures.cost(frame)).axes
    order = ["cure", "lcnn", "standard"]
    assert [text.get_text() for text in axis.get_yticklabels()] == [METHOD[m][0] for m in order]
    assert [bar.get_width() for bar in axis.patches] == pytest.approx([3.0, 1.4, 1.0]), "medians, the dearest first"
    assert [to_hex(bar.get_facecolor()) for bar in axis.patches] == [to_hex(METHOD[m][1]) for m in order]
    assert [text.get_text() for text in axis.texts] == ["3×", "1.4×", "1×"]
    quartiles = [bar.lines[2][0].get_segments()[0][:, 0].tolist() for bar in axis.containers if hasattr(bar, "lines")]
    np.testing.assert_allclose(quartiles, [np.quantile(ratios[m], [0.25, 0.75]) for m in order])
    assert axis.get_xlim()[0] == 0


SEARCH = [(lam, seed, 0.95 - lam / 2 + 0.01 * seed, 0.5 / (1 + 9 * lam), 287) for lam in (0.0, 0.01, 0.1, 0.3)
          for seed in (0, 1, 2)]  # fmt: skip


@pytest.mark.parametrize(("seeds", "lambdas"), [(3, 4), (1, 3)])
def test_lambda_search(seeds, lambdas):
    frame = pd.DataFrame(SEARCH, columns=["lambda_", "seed", "accuracy", "curvature", "images"])
    lams = sorted(frame.lambda_.unique())[-lambdas:]  # without and with λ = 0
    frame = frame[frame.lambda_.isin(lams) & (frame.seed < seeds)]
    axes = named(figures.lambda_search(frame, lams[-1])).axes
    for axis, column in zip(axes, ("accuracy", "accuracy", "curvature"), strict=True):
        factor = 100 if column == "accuracy" else 1
        (points, _, (bars,)), ring = axis.containers[0], axis.lines[-1]
        means = factor * frame.groupby("lambda_")[column].mean()
        np.testing.assert_allclose(points.get_xydata(), np.stack([lams, means], 1))
        assert look(points) == (METHOD["lcnn"][1], "s")
        np.testing.assert_allclose(ring.get_xydata(), [[lams[-1], means.iloc[-1]]])
        assert [tick.get_text() for tick in axis.get_xticklabels()] == [f"{lam:g}" for lam in lams]
        low, high = axis.get_xlim()
        assert low < lams[0] <= lams[-1] < high
        if seeds > 1:
            half = factor * frame.groupby("lambda_")[column].std() / np.sqrt(seeds)
            ends = np.array([[bottom[1], top[1]] for bottom, top in bars.get_segments()])
            np.testing.assert_allclose(ends, np.stack([means - half, means + half], 1))
    said = axes[0].get_ylabel()
    assert "287 images" in said
    assert (f"± s.e. over {seeds} seeds" if seeds > 1 else "one seed") in said
    assert [text.get_text() for text in axes[0].get_legend().get_texts()] == [f"λ = {lams[-1]:g}"]
    best = 100 * frame.groupby("lambda_").accuracy.mean().max()
    assert axes[1].get_ylim() == pytest.approx((best - 4, best + 1))
    if seeds > 1:
        (band,) = axes[1].patches
        spread = 100 * frame[frame.lambda_ == lams[0]].accuracy.std() / np.sqrt(seeds)
        corners = band.get_extents().transformed(axes[1].transData.inverted())
        assert (corners.y0, corners.y1) == pytest.approx((best - spread, best + spread))
