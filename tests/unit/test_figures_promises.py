"""Figures of notebooks 06 and 07 draw what their frame holds, name their axes, warn of nothing, and touch no file."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle
from test_figures_methods import look

from lcnn_utils.figures import attacks, saliency
from lcnn_utils.figures.style import CYCLE, METHOD
from lcnn_utils.saliency import MAPS

pytestmark = pytest.mark.usefixtures("drawing")


def drawn(figure: Figure) -> Figure:
    assert isinstance(figure, Figure)
    figure.canvas.draw()
    return figure


def words(legend) -> list[str]:
    return [text.get_text() for text in legend.get_texts()]


def bars_of(container) -> np.ndarray:
    """From, to of each error bar, along the axis on which they lie."""
    _, _, (segments,) = container.lines
    along = 1 if container.has_yerr else 0
    return np.array([segment[:, along] for segment in segments.get_segments()])


# ---- notebook 07 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "shape", "size"), [("l2", Circle, dict(radius=0.5)), ("linf", Rectangle, dict(width=1.0, height=1.0))]
)
def test_paths(norm, shape, size):
    x1, x2 = np.linspace(-2, 3, 9), np.linspace(-1, 2, 7)
    loss = x1[None] - 0.5 + 0 * x2[:, None]
    path = np.array([[0.0, 0.0], [0.1, 0.2], [0.3, 0.2], [0.4, 0.3]])
    panel = dict(title="a way", x1=x1, x2=x2, loss=loss, path=path, eps=0.5, norm=norm)
    figure = drawn(attacks.paths([panel, panel | dict(title="another", path=path[[0, 3]])]))
    assert [axis.get_title() for axis in figure.axes] == ["a way", "another"]
    assert figure.axes[0].get_ylabel() == "x₂"
    for axis in figure.axes:
        assert axis.get_xlabel() == "x₁"
        assert axis.get_xlim() == pytest.approx((-0.75, 0.75)), "the ball fits in"
        assert axis.get_ylim() == pytest.approx((-0.75, 0.75))
        (ball,) = axis.patches
        assert isinstance(ball, shape)
        assert {name: getattr(ball, f"get_{name}")() for name in size} == size
        centre = ball.get_center()
        np.testing.assert_allclose(centre, path[0], atol=1e-12)
        assert ball.get_linestyle() == "--"
    way, between, begin, end = figure.axes[0].lines
    for line, points in ((way, path), (between, path[1:3]), (begin, path[:1]), (end, path[3:])):
        np.testing.assert_array_equal(line.get_xydata(), points)
    assert words(figure.axes[0].get_legend()) == ["on the way", "x", "end"]
    boundary = figure.axes[0].collections[-1]
    vertices = np.concatenate([p.vertices for p in boundary.get_paths()])
    np.testing.assert_allclose(vertices[:, 0], 0.5, err_msg="the decision boundary is where the loss is 0")


def test_step_sizes():
    rows = [(rule, eps, a / (1 + eps)) for rule, a in (("falling", 0.5), ("fixed", 0.7)) for eps in (0.1, 0.2, 0.4)]
    frame = pd.DataFrame(rows, columns=["rule", "eps", "accuracy"])
    (axis,) = drawn(attacks.step_sizes(frame)).axes
    for line, (rule, part), colour, marker in zip(axis.lines, frame.groupby("rule", sort=False), CYCLE, "os"):  # noqa: B905
        np.testing.assert_allclose(line.get_xydata(), np.stack([part.eps, 100 * part.accuracy], 1))
        assert (line.get_label(), *look(line)) == (rule, colour, marker)
    assert len(axis.lines) == 2
    assert words(axis.get_legend()) == ["falling", "fixed"]
    assert axis.get_legend().get_title().get_text() == "length of a step"
    assert axis.get_xlabel().startswith("ε (L2")
    assert axis.get_ylabel() == "accuracy left (%)"


def test_logit_scale():
    scales = [1.0, 10.0, 100.0]
    rows = [("ce", s, 0.3 + s / 500, 0.2, 0.8) for s in scales] + [("margin", s, 0.25, 0.2, 0.35) for s in scales]
    frame = pd.DataFrame(rows, columns=["loss", "scale", "accuracy", "low", "high"])
    (axis,) = drawn(attacks.logit_scale(frame)).axes
    assert axis.get_xscale() == "log"
    assert "logits" in axis.get_xlabel()
    assert words(axis.get_legend()) == ["cross-entropy", "margin loss"]
    colours = set()
    for container, loss in zip(axis.containers, ("ce", "margin"), strict=True):
        part = frame[frame.loss == loss]
        np.testing.assert_allclose(container.lines[0].get_xydata(), np.stack([part.scale, 100 * part.accuracy], 1))
        np.testing.assert_allclose(bars_of(container), 100 * part[["low", "high"]], rtol=1e-6)
        colours.add(look(container.lines[0]))
    assert len(colours) == 2


def curve(methods, norm: str = "l2") -> pd.DataFrame:
    rows = []
    for i, method in enumerate(methods):
        for eps in (0.0, 0.1, 0.2):
            a = 0.9 - 0.1 * i - 2 * eps
            rows.append(("digits", method, METHOD[method][0], norm, eps, a, a - 0.05, a + 0.04, 3))
    names = ["dataset", "method", "label", "norm", "eps", "accuracy", "low", "high", "seeds"]
    return pd.DataFrame(rows, columns=names)


def test_curves():
    methods = ("standard", "lcnn", "adversarial")
    panels = {"one": curve(methods), "two": curve(methods[:2], "linf")}
    paper = pd.DataFrame({"label": ["Standard", "Standard", "LCNN"], "eps": [0, 0.1, 0.1], "accuracy": [77.0, 37.5, 39],
                          "spread": [0.1, 2.0, 0.2]})  # fmt: skip
    figure = drawn(attacks.curves(panels, paper))
    left, middle, right = figure.axes
    for axis, (title, frame) in zip((left, middle), panels.items(), strict=True):
        assert axis.get_title() == title
        groups = frame.groupby("method", sort=False)
        assert len(axis.lines) == len(axis.collections) == groups.ngroups
        for line, band, (method, part) in zip(axis.lines, axis.collections, groups, strict=True):
            np.testing.assert_allclose(line.get_xydata(), np.stack([part.eps, 100 * part.accuracy], 1))
            assert (line.get_label(), *look(line)) == METHOD[method]
            inside = band.get_paths()[0].vertices
            for column, bound in (("low", "min"), ("high", "max")):
                for eps, value in zip(part.eps, part[column], strict=True):
                    assert getattr(inside[inside[:, 0] == eps, 1], bound)() == pytest.approx(100 * value)
    assert "L2" in left.get_xlabel()
    assert "L∞" in middle.get_xlabel()
    assert "published" in right.get_title()
    for container, method in zip(right.containers, ("standard", "lcnn"), strict=True):
        part = paper[paper.label == METHOD[method][0]]
        np.testing.assert_allclose(container.lines[0].get_xydata(), part[["eps", "accuracy"]])
        assert look(container.lines[0]) == METHOD[method][1:]
        half = np.stack([part.accuracy - part.spread, part.accuracy + part.spread], 1)
        np.testing.assert_allclose(bars_of(container), half)
    assert "(%)" in left.get_ylabel()
    assert words(figure.legends[0]) == [METHOD[m][0] for m in methods]


@pytest.mark.parametrize("channels", [(), (3,)])
def test_examples(channels):
    rng = np.random.default_rng(0)
    image = rng.uniform(0.2, 0.8, (4, 4, *channels))
    found = image + rng.uniform(-0.1, 0.1, image.shape)
    rows = [dict(title="LCNN", image=image, found=found, before=1, after=0, confidence=0.876)]
    rows.append(rows[0] | dict(found=image, after=1))  # nothing added
    figure = drawn(attacks.examples(rows, ("cat", "dog")))
    assert len(figure.axes) == 6
    first, added, total, _, nothing, _ = figure.axes
    assert first.get_title() == "LCNN\nfrom: dog"
    assert total.get_title() == "seen as cat\n(88% sure)"
    np.testing.assert_array_equal(first.images[0].get_array(), image)
    np.testing.assert_array_equal(total.images[0].get_array(), found)
    step = found - image
    np.testing.assert_allclose(added.images[0].get_array(), step if not channels else step.sum(-1))
    top = np.abs(step).max()
    assert added.images[0].get_clim() == pytest.approx((-top, top))
    assert added.get_title() == f"added, from −{top:.2f} to {top:.2f}"
    assert not nothing.images[0].get_array().any()
    assert all(not len(axis.get_xticks()) and not len(axis.get_yticks()) for axis in figure.axes)


def test_picture_of_an_image_and_of_a_signed_map():
    figure, axes = plt.subplots(1, 2)
    grey, signed = attacks.picture(axes[0], np.ones((2, 2)), "white"), attacks.picture(axes[1], np.ones((2, 2)), "", 1)
    assert (grey.get_clim(), signed.get_clim()) == ((0, 1), (-1, 1))
    assert grey.to_rgba(1.0) == (1, 1, 1, 1)
    assert (grey.get_cmap().name, signed.get_cmap().name) == ("gray", "RdBu_r")
    assert axes[0].get_title() == "white"
    drawn(figure)


# ---- notebook 06 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [2])
def test_maps(rows):
    rng = np.random.default_rng(0)
    images = [rng.uniform(size=(3, 3, 3)) for _ in range(rows)]
    columns = {
        "grey": [rng.normal(size=(3, 3)) for _ in images],
        "colour": [rng.normal(size=(3, 3, 3)) for _ in images],
    }
    columns["zero"] = [np.zeros((3, 3)) for _ in images]
    titles = [f"number {i}" for i in range(rows)]
    axes = np.array(drawn(saliency.maps(images, columns, titles)).axes).reshape(rows, 4)
    for i, line in enumerate(axes):
        assert [axis.get_title() for axis in line] == [titles[i], *(list(columns) if i == 0 else [""] * 3)]
        np.testing.assert_array_equal(line[0].images[0].get_array(), images[i])
        for axis, name in zip(line[1:], columns, strict=True):
            values = columns[name][i] if columns[name][i].ndim == 2 else columns[name][i].sum(-1)
            np.testing.assert_allclose(axis.images[0].get_array(), values)
            top = max(np.abs(values).max(), 1e-12)
            assert axis.images[0].get_clim() == pytest.approx((-top, top)), "a scale of its own, with 0 in the middle"


def line_points(nets=("standard", "lcnn"), noise="random") -> pd.DataFrame:
    rows = []
    for i, net in enumerate(nets):
        for eps in (1e-3, 1e-2, 1e-1):
            value = eps * 10 / (1 + i)
            rows.append((net, METHOD[net][0], noise, eps, 50, value, 0.8 * value, 1.3 * value, 3 * value))
    return pd.DataFrame(rows, columns=["net", "label", "noise", "eps", "n", "value", "low", "high", "theory"])


def test_gradient_robustness():
    panels = {"random η": line_points(), "worst η": line_points(noise="worst")}
    paper = {"the paper": pd.DataFrame({"label": ["Standard", "Standard", "LCNN"], "eps": [1e-3, 1e-2, 1e-2],
                                        "value": [0.01, 0.1, 0.05]})}  # fmt: skip
    figure = drawn(saliency.gradient_robustness(panels, paper))
    assert [axis.get_title() for axis in figure.axes] == ["random η", "worst η", "the paper"]
    for axis in figure.axes:
        assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
        assert "‖η‖" in axis.get_xlabel()
    for axis, frame in zip(figure.axes, panels.values(), strict=False):
        dashed = [line for line in axis.lines if line.get_linestyle() == "--"]
        for container, line, net in zip(axis.containers, dashed, ("standard", "lcnn"), strict=True):
            part = frame[frame.net == net]
            np.testing.assert_allclose(container.lines[0].get_xydata(), part[["eps", "value"]])
            np.testing.assert_allclose(bars_of(container), part[["low", "high"]])
            assert look(container.lines[0]) == METHOD[net][1:]
            np.testing.assert_allclose(line.get_xydata(), part[["eps", "theory"]])
            assert to_hex(line.get_color()) == METHOD[net][1]
    for line, net in zip(figure.axes[2].lines, ("standard", "lcnn"), strict=True):
        part = paper["the paper"]
        np.testing.assert_allclose(line.get_xydata(), part[part.label == METHOD[net][0]][["eps", "value"]])
        assert look(line) == METHOD[net][1:]
    (legend,) = figure.legends
    assert words(legend) == ["Standard", "LCNN", "‖η‖ · mean C"]
    assert legend.get_lines()[-1].get_linestyle() == "--"
    assert figure.axes[0].get_ylabel() == "‖∇f(x+η) − ∇f(x)‖ / ‖∇f(x)‖"


def map_points(nets=("standard", "lcnn"), weights=("trained",)) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = []
    for net in nets:
        for method in ("gradient", "smoothgrad", "occlusion"):
            for kind in weights:
                for noise in ("random", "worst"):
                    for measure in ("relative_change", "cosine", "infidelity"):
                        if measure == "infidelity" and noise == "worst":
                            continue
                        v = rng.uniform(0.02, 0.9)
                        about = (net, METHOD[net][0], method, MAPS[method], kind, noise, measure)
                        rows.append((*about, 9, v, 0.9 * v, 1.1 * v))
    names = ["net", "label", "method", "map", "weights", "noise", "measure", "n", "value", "low", "high"]
    return pd.DataFrame(rows, columns=names)


def test_by_map():
    frame = map_points()
    figure = drawn(saliency.by_map(frame, ("relative_change", "infidelity")))
    panels = [("relative_change", "random"), ("relative_change", "worst"), ("infidelity", "random")]
    expected = ["relative change, random η", "relative change, worst η found"]
    assert [axis.get_title() for axis in figure.axes] == [*expected, "infidelity (share unexplained), random η"]
    names = [MAPS[m] for m in ("gradient", "smoothgrad", "occlusion")]
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == names
    assert figure.axes[0].yaxis_inverted(), "the first on top"
    for axis, (measure, noise) in zip(figure.axes, panels, strict=True):
        part = frame[(frame.measure == measure) & (frame.noise == noise)]
        assert axis.get_xlim()[0] == 0
        for container, net in zip(axis.containers, ("standard", "lcnn"), strict=True):
            of = part[part.net == net]
            points = container.lines[0]
            np.testing.assert_allclose(np.asarray(points.get_xdata(), float), of.value)
            np.testing.assert_allclose(np.round(points.get_ydata()), range(3), err_msg="beside the map's name")
            np.testing.assert_allclose(bars_of(container), of[["low", "high"]])
            assert look(points) == METHOD[net][1:]
        ys = np.concatenate([container.lines[0].get_ydata() for container in axis.containers])
        assert len(set(ys)) == 6, "no net hides another"
    assert words(figure.legends[0]) == ["Standard", "LCNN"]


def test_by_map_where_one_net_lacks_a_map():
    frame = map_points()
    frame = frame[(frame.net != "lcnn") | (frame.method != "smoothgrad")]
    (axis,) = drawn(saliency.by_map(frame, ("cosine",), noise=("random",))).axes
    missing = np.asarray(axis.containers[1].lines[0].get_xdata(), float)
    assert np.isnan(missing).tolist() == [False, True, False]


def test_stable_or_right():
    frame = map_points(weights=("trained", "random"))
    frame = frame[frame.measure != "cosine"]
    figure = drawn(saliency.stable_or_right(frame))
    assert [axis.get_title() for axis in figure.axes] == ["Standard", "LCNN"]
    wide = frame[frame.noise == "random"].set_index(["net", "map", "weights", "measure"]).value
    looks = {}
    for axis, net in zip(figure.axes, ("standard", "lcnn"), strict=True):
        assert axis.get_xscale() == "log"
        assert "relative change" in axis.get_xlabel()
        order = [(MAPS[m], w) for m in ("gradient", "smoothgrad", "occlusion") for w in ("trained", "random")]
        for line, (name, weights) in zip(axis.lines, order, strict=True):
            at = [wide[net, name, weights, measure] for measure in ("relative_change", "infidelity")]
            np.testing.assert_allclose(line.get_xydata(), [at])
            hollow = to_hex(line.get_markerfacecolor()) == "#ffffff"
            assert hollow == (weights == "random")
            looks.setdefault(name, set()).add((to_hex(line.get_markeredgecolor()), line.get_marker()))
    assert all(len(each) == 1 for each in looks.values()), "a map looks alike in all panels"
    assert len(set.union(*looks.values())) == 3
    assert words(figure.legends[0]) == ["Gradient", "SmoothGrad", "Occlusion", "hollow: shuffled weights"]
    assert "infidelity" in figure.axes[0].get_ylabel()


def test_random_meets():
    frame = pd.DataFrame({"spectral": [3.0, 30.0], "frobenius": [1.0, 11.0], "measured": [1.1, 10.0]})
    (axis,) = drawn(saliency.random_meets(frame)).axes
    diagonal, theory, worst = axis.lines
    np.testing.assert_array_equal(diagonal.get_xdata(), diagonal.get_ydata())
    assert (diagonal.get_xdata()[0], diagonal.get_xdata()[1]) == (1.0, 30.0)
    np.testing.assert_array_equal(theory.get_xydata(), frame[["measured", "frobenius"]])
    np.testing.assert_array_equal(worst.get_xydata(), frame[["measured", "spectral"]])
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
    assert len(words(axis.get_legend())) == 2
    assert axis.get_xlabel()
    assert axis.get_ylabel()
