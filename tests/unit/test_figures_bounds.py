"""Figures of notebook 03 draw what their frame holds, name their axes, warn of nothing, and touch no file."""

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import EllipseCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.transforms import Affine2D

from lcnn_utils.figures import bound as figures
from lcnn_utils.figures import style

pytestmark = pytest.mark.usefixtures("drawing")

COLOURS = {"Standard": ("#0173b2", "o"), "LCNN": ("#de8f05", "s")}
PALETTE = {*style.CYCLE, *style.CLASS_COLOURS, "#000000", *(colour for colour, _ in COLOURS.values())}


def shown(figure: Figure) -> list:
    """The axes, after drawing; each is named in both directions (by a neighbour where shared), in fit colours."""
    figure.canvas.draw()
    for axis in figure.axes:
        below = axis.get_shared_x_axes().get_siblings(axis)
        row = [other for other in figure.axes if other.get_position().y0 == pytest.approx(axis.get_position().y0)]
        names = [tick.get_text() for tick in axis.get_xticklabels()]
        assert any(other.get_xlabel() for other in below) or set(names) <= set(COLOURS), (
            "an axis of nets says so itself"
        )
        assert any(other.get_ylabel() for other in row)
        looks = [
            (to_hex(line.get_color()), line.get_linestyle(), line.get_marker())
            for line in axis.lines
            if not line.get_label().startswith("_")
        ]
        assert len(set(looks)) == len(looks), "no two lines of a legend look alike"
        for line in axis.lines:
            red, green, blue = (to_hex(line.get_color())[i : i + 2] for i in (1, 3, 5))
            assert red == green == blue or to_hex(line.get_color()) in PALETTE
    return figure.axes


def lines(axis) -> dict[str, np.ndarray]:
    return {line.get_label(): np.asarray(line.get_xydata()) for line in axis.lines}


def legend(axis) -> list[str]:
    return [text.get_text() for text in axis.get_legend().get_texts()]


# ---- audit -------------------------------------------------------------------------------------------------------


def audited(n: int = 40) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    level = lambda low, high: 10 ** rng.uniform(low, high, n)
    frame = pd.DataFrame(dict(gradient=level(-2, 1), hessian=level(-1, 1), kappa=level(-2, 2)))
    frame["curvature"] = frame.hessian / frame.gradient
    frame["local"], frame["data_free"] = frame.hessian * level(0, 2), frame.hessian * level(1, 4)
    frame["normalised"], frame["published"] = frame.curvature * level(0, 3), frame.curvature * level(-1, 3)
    return frame.assign(published_widths=2 * frame.published)


def test_audit():
    frame = audited()
    left, right = shown(figures.audit(frame))
    drawn = lines(left)
    for column, truth in (("local", "hessian"), ("data_free", "hessian"), ("normalised", "curvature")):
        label, colour, _ = figures.BOUND[column]
        ratio = frame[column] / frame[truth]
        assert len(drawn[label]) == len(frame)
        for x, share in drawn[label]:
            assert share == pytest.approx((ratio <= x).mean()), "the empirical distribution function"
        (line,) = [line for line in left.lines if line.get_label() == label]
        assert to_hex(line.get_color()) == colour
    assert legend(left) == [label for label, _, _ in figures.BOUND.values()]
    ratio = frame.curvature / frame.published
    points = lines(right)
    for word, part in (("holds", ratio <= 1), ("fails", ratio > 1)):
        assert part.any()
        np.testing.assert_allclose(points[f"{word} ({part.sum()})"], np.stack([frame.kappa[part], ratio[part]], 1))
    (low, high), (_, top) = right.get_xlim(), right.get_ylim()
    assert high > frame.kappa.max()
    assert top > ratio.max()
    assert low < frame.kappa.quantile(0.02)
    assert left.get_xscale() == right.get_xscale() == right.get_yscale() == "log"


def test_audit_where_curvature_is_infinite_unknown_or_zero():
    """A gradient of 0 (C infinite), a unit without any part (0/0, κ = 0) and a net without curvature."""
    plain = audited()
    odd = plain[:3].copy()
    odd["gradient"] = [0, 0, 1.0]
    odd["hessian"] = [1.0, 0, 0]
    odd["curvature"] = [np.inf, np.nan, 0]
    odd["kappa"] = [np.inf, 0, 0]
    odd["normalised"] = [np.inf, 0, 0]
    odd["local"] = [2.0, 0, 0]
    left, right = shown(figures.audit(pd.concat([plain, odd])))
    drawn, expected = lines(left), plain.local / plain.hessian
    np.testing.assert_allclose(drawn["(A) local"][:, 0], sorted([*expected, 2.0]))
    assert len(drawn["(B) data-free"]) == len(plain) + 1
    normalised = drawn["(C) normalised"]
    finite = normalised[np.isfinite(normalised[:, 0])]
    np.testing.assert_allclose(finite[:, 0], sorted(plain.normalised / plain.curvature))
    assert sum(len(xy) for label, xy in lines(right).items() if label.split()[0] in ("holds", "fails")) == len(plain)


# ---- cancellation, depth, waterfall ------------------------------------------------------------------------------


def test_cancellation():
    x = np.array([1e-3, 1e-2, 0.1, 1.0])
    frame = pd.DataFrame(dict(x=x, curvature=1 / x, normalised=3 / x, published=7.0, published_widths=14.0))
    (axis,) = shown(figures.cancellation(frame))
    drawn = list(lines(axis).values())
    for line, column in zip(drawn, ("curvature", "normalised", "published", "published_widths"), strict=True):
        np.testing.assert_array_equal(line, frame[["x", column]])
    assert len(legend(axis)) == 4
    low, high = axis.get_ylim()
    assert low < 1
    assert high > 3000
    infinite = pd.concat([frame, frame[:1].assign(x=0.0, curvature=np.inf, normalised=np.inf)])
    assert shown(figures.cancellation(infinite))[0].get_ylim()[1] < 1e6


@pytest.mark.parametrize("seeds", [5])
def test_depth(seeds):
    rng = np.random.default_rng(0)
    rows = [(d, s, q, 10 ** (k + d * rng.uniform())) for d in (1, 2, 4) for s in range(seeds) for k, q in
            enumerate(("truth", "(A)", "(B)"))]  # fmt: skip
    frame = pd.DataFrame(rows, columns=["depth", "seed", "quantity", "value"])
    (axis,) = shown(figures.depth(frame.sample(frac=1, random_state=0).sort_values("quantity", kind="stable")))
    assert legend(axis) == ["(A)", "(B)", "truth"], "in the order given"
    for quantity, band in zip(("(A)", "(B)", "truth"), axis.collections, strict=True):
        values = {d: frame[(frame.quantity == quantity) & (frame.depth == d)].value for d in (1, 2, 4)}
        np.testing.assert_allclose(lines(axis)[quantity], [(d, v.median()) for d, v in values.items()])
        corners = {tuple(xy) for xy in band.get_paths()[0].vertices.round(9)}
        for d, v in values.items():
            assert {(d, round(v.quantile(q), 9)) for q in (0.1, 0.9)} <= corners
    assert axis.get_yscale() == "log"
    assert list(axis.get_xticks()) == [1, 2, 4]
    assert f"{seeds} net" in axis.get_legend().get_title().get_text()


def terms(net: str, contributions: list[float]) -> pd.DataFrame:
    """As bounds.layer_terms: linear layers between the activations have no β and contribute nothing."""
    rows = []
    for i, contribution in enumerate(contributions):
        rows += [(net, f"{2 * i}", np.nan, 2.0**i, 0.0), (net, f"{2 * i + 1}", 1.0 + i, 3.0**i, contribution)]
    return pd.DataFrame(rows, columns=["net", "layer", "beta", "before", "contribution"])


@pytest.mark.parametrize("count", [2])
def test_waterfall(count):
    frame = pd.concat([terms("a", [1.0, 5.0, 14.0]), terms("b", [30.0, 10.0])][:count])
    axes = np.array(shown(figures.waterfall(frame))).reshape(2, count)
    for column, (net, layers, total) in enumerate([("a", ["1", "2", "3"], "20"), ("b", ["1", "2"], "40")][:count]):
        top, bottom = axes[:, column]
        part = frame[(frame.net == net) & frame.beta.notna()]
        heights = np.array([bar.get_height() for bar in top.patches])
        np.testing.assert_allclose(heights, part.contribution / part.contribution.sum())
        assert heights.sum() == pytest.approx(1)
        np.testing.assert_allclose([bar.get_y() for bar in top.patches], [0, *heights.cumsum()[:-1]], atol=1e-12)
        np.testing.assert_allclose(
            [bar.get_x() + bar.get_width() / 2 for bar in top.patches], range(1, len(layers) + 1)
        )
        np.testing.assert_allclose(top.lines[0].get_ydata(), heights.cumsum())
        assert top.get_title() == f"{net}: K = {total}"
        slopes, betas, rest = (line.get_ydata() for line in bottom.lines)
        np.testing.assert_allclose(slopes, part.before)
        np.testing.assert_allclose(betas, part.beta)
        np.testing.assert_allclose(slopes**2 * betas / 4 * rest, part.contribution)
        assert [tick.get_text() for tick in bottom.get_xticklabels()] == layers
        assert bottom.get_yscale() == "log"
    assert len(legend(axes[1, 0])) == 3


def test_loss_parts():
    rng = np.random.default_rng(0)
    rows = [(net, *10 ** rng.uniform(-2, 2, 3)) for net in ("Standard", "LCNN") for _ in range(30)]
    frame = pd.DataFrame(rows, columns=["net", "total", "softmax", "activations"])
    (axis,) = shown(figures.loss_parts(frame))
    parts = axis.containers
    assert len(legend(axis)) == len(parts) == 3
    for part, column in zip(parts, ("total", "softmax", "activations"), strict=True):
        values = [frame[frame.net == net][column] for net in ("Standard", "LCNN")]
        np.testing.assert_allclose(part.lines[0].get_ydata().astype(float), [v.median() for v in values])
        ends = np.array(part.lines[2][0].get_segments())[:, :, 1].astype(float)
        np.testing.assert_allclose(ends, np.array([v.quantile([0.1, 0.9]) for v in values]))
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["Standard", "LCNN"]
    places = np.sort(np.concatenate([part.lines[0].get_xdata() for part in parts]))
    assert np.diff(places).min() > 0.1, "points lie beside each other"
    assert axis.get_yscale() == "log"
    shown(figures.loss_parts(frame[frame.net == "LCNN"].assign(activations=0.0)))


# ---- certificates ------------------------------------------------------------------------------------------------


def shares(seeds: int) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = []
    for net in COLOURS:
        for seed in range(seeds):
            certified, attacked = np.sort(rng.uniform(size=3))[::-1], np.sort(rng.uniform(size=3))[::-1]
            rows += [(net, seed, e, c, a) for e, c, a in zip((0.0, 0.1, 0.5), certified, attacked, strict=True)]
    return pd.DataFrame(rows, columns=["net", "seed", "eps", "certified", "attacked"])


@pytest.mark.parametrize("seeds", [1, 4])
def test_robust_accuracy(seeds):
    frame = shares(seeds)
    (axis,) = shown(figures.robust_accuracy(frame.sample(frac=1, random_state=1), COLOURS))
    curves = [(net, column) for net in COLOURS for column in ("certified", "attacked")]
    for bar, (net, column) in zip(axis.containers, curves, strict=True):
        groups = frame[frame.net == net].groupby("eps")[column]
        mean, std = 100 * groups.mean(), 100 * groups.std().fillna(0)
        np.testing.assert_allclose(bar.lines[0].get_xydata(), np.stack([mean.index, mean], 1))
        ends = np.array(bar.lines[2][0].get_segments())[:, :, 1]
        np.testing.assert_allclose(ends, np.stack([mean - std, mean + std], 1))
        assert (std > 0).all() == (seeds > 1)
        assert (to_hex(bar.lines[0].get_color()), bar.lines[0].get_marker()) == COLOURS[net]
        assert bar.lines[0].get_linestyle() == {"certified": "-", "attacked": "--"}[column]
    assert set(COLOURS) <= set(legend(axis))
    assert len(legend(axis)) == 4, "nets and the two line styles"
    assert f"{seeds} seed" in axis.get_title()
    assert axis.get_ylim()[0] < 0
    assert axis.get_ylim()[1] > 100


def radii_frame() -> pd.DataFrame:
    rows = [("Standard", 0.01, 0.2), ("Standard", 0.0, 0.0), ("Standard", 0.02, np.inf), ("LCNN", 0.1, 0.4),
            ("LCNN", 0.3, 0.31), ("LCNN", 0.0, 0.0)]  # fmt: skip
    return pd.DataFrame(rows, columns=["net", "certified", "attacked"])


def test_radii():
    (axis,) = shown(figures.radii(radii_frame(), COLOURS))
    drawn = lines(axis)
    np.testing.assert_array_equal(drawn["Standard"], [[0.2, 0.01]])
    np.testing.assert_array_equal(drawn["LCNN"], [[0.4, 0.1], [0.31, 0.3]])
    for line in axis.lines[:2]:
        assert (to_hex(line.get_color()), line.get_marker()) == COLOURS[line.get_label()]
    low, high = axis.get_xlim()
    assert axis.get_ylim() == (low, high)
    assert low < 0.01
    assert high > 0.4
    (forbidden,) = axis.collections
    (path,) = forbidden.get_paths()
    assert path.contains_point((0.05, 0.2)), "certified > attacked"
    assert not path.contains_point((0.2, 0.05))
    for attacked, certified in (*drawn["Standard"], *drawn["LCNN"]):
        assert not path.contains_point((attacked, certified))
    assert axis.get_xscale() == axis.get_yscale() == "log"


@pytest.mark.parametrize("attacked", [np.inf])
def test_radii_where_no_image_has_both(attacked):
    """No attack succeeds, or every image is misread: an empty picture."""
    frame = radii_frame().assign(attacked=attacked, certified=0.1 if attacked else 0.0)
    (axis,) = shown(figures.radii(frame, COLOURS))
    assert sum(len(xy) for label, xy in lines(axis).items() if label in COLOURS) == 0


def moons() -> tuple[pd.DataFrame, pd.DataFrame]:
    points = pd.DataFrame(
        dict(net=["a", "a", "a", "b", "b"], x1=[0.0, 1.0, 0.2, 0.0, 1.0], x2=[0.0, 0.5, -0.5, 0.0, 0.5],
             label=[0, 1, 0, 0, 1], certified=[0.3, 0.2, 0.0, 0.05, 0.1], found1=[0.5, np.nan, 0.2, 0.5, 0.5],
             found2=[0.0, np.nan, -0.5, 0.0, 0.5])
    )  # fmt: skip
    x2, x1 = (a.ravel() for a in np.meshgrid(np.linspace(-1, 1, 5), np.linspace(-1, 2, 7), indexing="ij"))
    fields = [pd.DataFrame(dict(net=n, x1=x1, x2=x2, margin=s * (x1 - 0.5))) for n, s in (("a", 1), ("b", -1))]
    return points, pd.concat(fields)


def test_moons_balls():
    points, fields = moons()
    axes = shown(figures.moons_balls(points, fields, ["net a", "net b"]))
    for axis, net in zip(axes, "ab", strict=True):
        part = points[points.net == net]
        assert axis.get_title() == f"net {net}"
        assert axis.get_aspect() == 1
        (balls,) = [c for c in axis.collections if isinstance(c, EllipseCollection)]
        np.testing.assert_array_equal(balls.get_offsets(), part[["x1", "x2"]])
        np.testing.assert_allclose(balls.get_widths(), 2 * part.certified)
        np.testing.assert_allclose(balls.get_heights(), 2 * part.certified)
        unit = axis.transData.transform((1, 0))[0] - axis.transData.transform((0, 0))[0]  # pixels of one unit of x₁
        for matrix, radius in zip(balls.get_transforms(), part.certified, strict=True):
            outline = balls.get_paths()[0].transformed(Affine2D(matrix)).transformed(balls.get_transform())
            np.testing.assert_allclose(np.ptp(outline.vertices, axis=0), 2 * radius * unit, rtol=1e-6)
        drawn = lines(axis)
        np.testing.assert_array_equal(drawn["PGD's nearest success"], part[["found1", "found2"]])
        steps = [line.get_xydata() for line in axis.lines if line.get_label().startswith("_child")][: len(part)]
        np.testing.assert_array_equal(steps, part[["x1", "x2", "found1", "found2"]].to_numpy().reshape(-1, 2, 2))
        for label in (0, 1):
            np.testing.assert_array_equal(drawn[f"class {label}"], part[part.label == label][["x1", "x2"]])
            (cloud,) = [line for line in axis.lines if line.get_label() == f"class {label}"]
            assert to_hex(cloud.get_color()) == style.CLASS_COLOURS[label]
    assert {"certified ball", "PGD's nearest success", "class 0", "class 1"} == set(legend(axes[0]))


def test_the_region_of_a_class_has_its_colour():
    """Where logit₁ > logit₀ the ground has the colour of class 1."""
    points, fields = moons()
    figure = figures.moons_balls(points.assign(x1=9.0, found1=9.0), fields, ["", ""])
    for axis in figure.axes:
        axis.set(xlim=(-1, 2), ylim=(-1, 1))
    figure.axes[0].get_legend().remove()
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())
    for axis, order in zip(figure.axes, (1, -1), strict=True):
        for point, hexadecimal in zip(((-0.5, 0.7), (1.5, 0.7)), style.CLASS_COLOURS[::order], strict=True):
            column, row = axis.transData.transform(point).round().astype(int)
            expected = 0.2 * np.array(matplotlib.colors.to_rgb(hexadecimal)) + 0.8
            np.testing.assert_allclose(pixels[-row, column, :3] / 255, expected, atol=0.02)


def test_layer_knobs():
    rng = np.random.default_rng(0)
    numbers = lambda: (*10 ** rng.uniform(0, 3, 3), rng.uniform(0.5, 1), 1.0)
    knobs = [("sharpness β", value) for value in (0.1, 1.0, 10.0)] + [("slope", value) for value in (0.5, 1.0)]
    rows = [(knob, layer, value, *numbers()) for layer in ("3", "6") for knob, value in knobs]
    frame = pd.DataFrame(rows, columns=["knob", "layer", "value", "bound", "local", "truth", "accuracy", "trained"])
    axes = np.array(shown(figures.layer_knobs(frame))).reshape(3, 2)
    for number, (row, layer) in enumerate(zip(axes[:2], ("3", "6"), strict=True), 1):
        for axis, last, knob in zip(row, axes[2], ("sharpness β", "slope"), strict=True):
            part = frame[(frame.layer == layer) & (frame.knob == knob)]
            for line, column in zip(axis.lines, ("bound", "local", "truth"), strict=False):
                np.testing.assert_array_equal(line.get_xydata(), part[["value", column]])
            assert axis.lines[3].get_xdata()[0] == 1.0, "as trained"
            np.testing.assert_allclose(last.lines[number - 1].get_ydata(), 100 * part.accuracy)
            assert axis.get_title() == f"activation {number}"
            assert axis.get_xscale() == axis.get_yscale() == "log"
            low, high = axis.get_ylim()
            assert low < frame[frame.layer == layer][["bound", "local", "truth"]].to_numpy().min()
            assert high > frame[frame.layer == layer][["bound", "local", "truth"]].to_numpy().max()
    assert [axis.get_xlabel() for axis in axes[-1]] == ["sharpness β", "slope"]
    assert len(legend(axes[0, 0])) == 4
    one = frame[(frame.layer == "6") & (frame.knob == "slope")]
    assert len(shown(figures.layer_knobs(one))) == 2
