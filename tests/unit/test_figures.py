"""Figures draw what their frame holds, touch no file, and are saved byte for byte the same."""

import json
import os

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import files_of_at_most
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from lcnn_utils import figures, studies
from lcnn_utils.figures import style
from lcnn_utils.lab import use_style

X = torch.linspace(-3, 3, 31)


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    monkeypatch.setenv("LCNN_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("LCNN_DEVICE", "cpu")
    backend, threads = matplotlib.get_backend(), torch.get_num_threads()
    plt.switch_backend("agg")
    with matplotlib.rc_context():
        use_style()
        yield
    plt.close("all")
    plt.switch_backend(backend)
    torch.set_num_threads(threads)


@pytest.fixture
def no_disk(monkeypatch, tmp_path):
    """A figure function computes nothing and saves nothing."""
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: pytest.fail("a figure function saved"))
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield
    assert os.listdir(folder) == []


def labelled(figure: Figure, panels: int) -> list:
    """The first axes of the figure, each of which must name both axes (a shared one may leave it to its neighbour)."""
    axes = figure.axes[:panels]
    assert any(axis.get_xlabel() for axis in axes)
    assert any(axis.get_ylabel() for axis in axes)
    for axis in axes:
        shared_x = axis.get_shared_x_axes().get_siblings(axis)
        shared_y = axis.get_shared_y_axes().get_siblings(axis)
        assert any(other.get_xlabel() for other in shared_x)
        assert any(other.get_ylabel() for other in shared_y)
    return axes


def lines(axis) -> dict[str, np.ndarray]:
    return {line.get_label(): np.asarray(line.get_xydata()) for line in axis.lines}


# ---- the look ----------------------------------------------------------------------------------------------------


def test_no_two_methods_look_alike():
    labels, colours, markers = zip(*style.METHOD.values(), strict=True)
    assert len(set(labels)) == len(set(markers)) == len(labels)
    assert len({to_hex(colour) for colour in colours}) == len(colours)
    assert dict(zip(labels, colours, strict=True)) == style.PALETTE
    assert dict(zip(labels, markers, strict=True)) == style.MARKERS
    assert not {to_hex(c) for c in style.CLASS_COLOURS} & {to_hex(style.METHOD[m][1]) for m in ("standard", "lcnn")}
    styles = [style_ for _, _, style_ in style.ACTIVATION.values()]
    assert len(set(styles)) == len(styles)


# ---- what is drawn -----------------------------------------------------------------------------------------------


def test_activations(no_disk):
    frame = measurements.activation_frame((0.5, 4.0), X)
    axes = labelled(figures.activations(frame), 3)
    for axis, column in zip(axes, ("value", "slope", "curvature"), strict=True):
        drawn = lines(axis)
        assert len(drawn) == 5
        for label, data in drawn.items():
            name, _, beta = label.partition(", β = ")
            key = next(key for key, (text, _, _) in style.ACTIVATION.items() if text == name)
            part = frame[(frame.activation == key) & (frame.beta.eq(float(beta)) if beta else frame.beta.isna())]
            np.testing.assert_array_equal(data, part[["x", column]])
    assert axes[0].get_legend() is not None


def test_figure_1c(no_disk):
    frame = measurements.activation_frame((0.5, 4.0), X)
    axes = labelled(figures.figure_1c(frame), 2)
    for axis, name in zip(axes, ("softplus", "centered"), strict=True):
        assert axis.get_title() == style.ACTIVATION[name][0]
        drawn = lines(axis)
        assert set(drawn) == {"β = 0.5", "β = 4", "ReLU (β → ∞)", "x/2"}
        for beta in (0.5, 4.0):
            part = frame[(frame.activation == name) & (frame.beta == beta)]
            np.testing.assert_array_equal(drawn[f"β = {beta:g}"], part[["x", "value"]])
        np.testing.assert_allclose(drawn["ReLU (β → ∞)"][:, 1], X.relu())
        np.testing.assert_allclose(drawn["x/2"][:, 1], X / 2)
    low, high = axes[0].get_ylim()
    assert low < frame.value.min()
    assert high > frame.value.max()


def test_composition(no_disk):
    frame = measurements.composition_frame((0.5, 4.0, 9.0), (1, 5), X)
    axes = labelled(figures.composition(frame), 6)
    for axis, (name, beta) in zip(axes, [(n, b) for n in ("softplus", "centered") for b in (0.5, 4.0, 9.0)]):  # noqa: B905
        assert axis.get_title() == f"{style.ACTIVATION[name][0]}, β = {beta:g}"
        drawn = lines(axis)
        assert set(drawn) == {"n = 1", "n = 5"}
        for depth in (1, 5):
            part = frame[(frame.activation == name) & (frame.beta == beta) & (frame.depth == depth)]
            np.testing.assert_array_equal(drawn[f"n = {depth}"], part[["x", "value"]])
    assert len(figures.composition(frame[frame.beta == 4.0]).axes) == 2, "one β is enough"


@pytest.mark.parametrize("points", [(-2.0, -1.0, 0.0, 0.1, 1.0, 2.0, 3.0)])
def test_normalised_curvature(no_disk, points):
    betas = (0.1, 1.0, 10.0)
    frame = measurements.normalised_curvature_frame(betas, points)
    (axis,) = labelled(figures.normalised_curvature(frame), 1)
    drawn = lines(axis)
    assert set(drawn) == {"bound β", *(f"x = {x:g}" for x in points)}, "every x is drawn"
    for x in points:
        np.testing.assert_array_equal(drawn[f"x = {x:g}"], frame[frame.x == x][["beta", "normalised"]])
    np.testing.assert_allclose(drawn["bound β"], [[0.1, 0.1], [10, 10]])
    assert axis.get_xscale() == axis.get_yscale() == "log"


def field(**constant) -> pd.DataFrame:
    """A 4 by 3 grid whose margin is x1 − 0.5 and whose curvature is 10^(x1 + x2)."""
    x2, x1 = (a.ravel() for a in np.meshgrid([-1.0, 0.0, 1.0], [0.0, 0.3, 0.6, 0.9], indexing="ij"))
    return pd.DataFrame(dict(x1=x1, x2=x2, margin=x1 - 0.5, curvature=10 ** (x1 + x2)) | constant)


def test_moons(no_disk):
    frame = pd.concat([field(method="standard", accuracy=0.5), field(method="lcnn", accuracy=0.987)])
    frame.loc[frame.method == "lcnn", "curvature"] /= 10
    shuffled = frame.sample(frac=1, random_state=0).sort_values("method", ascending=False, kind="stable")
    points = pd.DataFrame(dict(x1=[0.1, 0.8, 0.9], x2=[0.0, 0.5, -0.5], label=[0, 1, 1]))
    figure = figures.moons(shuffled, points)
    axes = np.array(labelled(figure, 4)).reshape(2, 2)
    assert [axis.get_title() for axis in axes[0]] == ["Standard: test accuracy 50.0%", "LCNN: test accuracy 98.7%"]
    expected = np.add.outer([-1.0, 0.0, 1.0], [0.0, 0.3, 0.6, 0.9])
    for axis, shift in zip(axes[1], (0, -1), strict=True):
        (image,) = axis.images
        np.testing.assert_allclose(image.get_array(), expected + shift, atol=1e-9)
        assert image.get_extent() == pytest.approx([0, 0.9, -1, 1])
        assert image.origin == "lower"
    for axis in axes[0]:
        clouds = [c for c in axis.collections if str(c.get_label()).startswith("class")]
        for label, cloud in enumerate(clouds):
            np.testing.assert_array_equal(cloud.get_offsets(), points[points.label == label][["x1", "x2"]])
            assert to_hex(cloud.get_facecolor()[0]) == style.CLASS_COLOURS[label]
        assert len(clouds) == 2
    assert "C" in figure.axes[-1].get_ylabel()


def test_the_region_of_a_class_has_its_colour(no_disk):
    """One method is enough for a figure, too."""
    frame = field(method="standard", accuracy=1.0)
    figure = figures.moons(frame, pd.DataFrame(dict(x1=[], x2=[], label=[])))
    axis = figure.axes[0]
    axis.get_legend().remove()
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())
    found = []
    for point in ((0.15, 0.5), (0.85, 0.5)):  # margin −0.35, then 0.35
        column, row = axis.transData.transform(point).round().astype(int)
        found.append(pixels[-row, column, :3] / 255)
    for colour, hexadecimal in zip(found, style.CLASS_COLOURS, strict=True):
        expected = 0.25 * np.array(matplotlib.colors.to_rgb(hexadecimal)) + 0.75
        np.testing.assert_allclose(colour, expected, atol=0.02)


def test_beta_maps(no_disk):
    frame = pd.concat([field(beta=b, accuracy=a) for b, a in ((1.0, 0.5), (1000.0, 0.75))])
    frame.loc[frame.beta == 1.0, "curvature"] /= 10
    axes = labelled(figures.beta_maps(frame), 2)
    assert [axis.get_title() for axis in axes] == ["β = 1000: accuracy 75.0%", "β = 1: accuracy 50.0%"]
    expected = np.add.outer([-1.0, 0.0, 1.0], [0.0, 0.3, 0.6, 0.9])
    for axis, shift in zip(axes, (0, -1), strict=True):
        np.testing.assert_allclose(axis.images[0].get_array(), expected + shift, atol=1e-9)
    assert len(figures.beta_maps(frame[frame.beta == 1.0]).axes) == 2, "one β and the colour bar"


def distribution(scale: float = 1.0, seeds: int = 3) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        [
            dict(label=label, seed=seed, curvature=scale * level * c, accuracy=0.9 + 0.01 * seed)
            for label, level in (("Standard", 30.0), ("LCNN", 3.0))
            for seed in range(seeds)
            for c in rng.lognormal(size=20)
        ]
    )


def test_curvature_distribution(no_disk):
    frame = distribution()
    left, right = labelled(figures.curvature_distribution(frame), 2)
    groups = [(label, seed) for label in ("Standard", "LCNN") for seed in range(3)]
    assert len(left.lines) == 6
    for line, (label, seed) in zip(left.lines, groups, strict=True):
        values = frame[(frame.label == label) & (frame.seed == seed)].curvature
        for x, share in line.get_xydata():
            assert share == pytest.approx((values <= x).mean()), "the empirical distribution function"
        assert to_hex(line.get_color()) == style.PALETTE[label]
    bars = {bar.get_label(): bar for bar in right.containers}
    for label, bar in bars.items():
        runs = frame[frame.label == label].groupby("seed").agg(c=("curvature", "mean"), a=("accuracy", "first"))
        np.testing.assert_allclose(bar.lines[0].get_xydata(), [[runs.c.mean(), 100 * runs.a.mean()]])
        assert bar.lines[0].get_marker() == style.MARKERS[label]
        (x0, _), (x1, _) = bar.lines[2][0].get_segments()[0]
        assert (x1 - x0) / 2 == pytest.approx(runs.c.std())
        (_, y0), (_, y1) = bar.lines[2][1].get_segments()[0]
        assert (y1 - y0) / 2 == pytest.approx(100 * runs.a.std())
    assert set(bars) == {"Standard", "LCNN"}
    assert "3 seeds" in right.get_title()


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_no_method_falls_off_the_distribution(no_disk, scale):
    right = figures.curvature_distribution(distribution(scale)).axes[1]
    low, high = right.get_xlim()
    for bar in right.containers:
        assert low < bar.lines[0].get_xdata()[0] < high


def test_convergence(no_disk):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        [(e, k, s, rng.uniform() * 10.0**-k) for e in ("a", "b", "c") for k in (1, 2, 3) for s in range(5)],
        columns=["estimator", "products", "sample", "error"],
    )
    (axis,) = labelled(figures.convergence(frame), 1)
    drawn = [line.get_xydata() for line in axis.lines if len(line.get_xydata()) == 3]
    for data, name in zip(drawn, ("a", "b", "c"), strict=True):
        medians = frame[frame.estimator == name].groupby("products").error.median()
        np.testing.assert_allclose(data, np.stack([medians.index, medians], 1))
    assert axis.get_yscale() == "log"
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["a", "b", "c"]


# ---- saving ------------------------------------------------------------------------------------------------------


def a_figure() -> Figure:
    figure, axis = plt.subplots(figsize=(1.5, 1))
    axis.plot([0, 1], [0, 1], label="β")
    return figure


def test_save_is_the_same_byte_for_byte(tmp_path):
    first = style.save(a_figure(), "it", {"seeds": [0], "what": "β"}, tmp_path / "one")
    second = style.save(a_figure(), "it", {"seeds": [0], "what": "β"}, tmp_path / "two")
    assert [path.name for path in first] == ["it.png", "it.svg", "it.json"]
    assert sorted(os.listdir(tmp_path / "one")) == sorted(path.name for path in first)
    assert not plt.get_fignums(), "it is closed"
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes(), a.name
    assert Image.open(first[0]).format == "PNG"
    assert first[1].read_text().startswith("<?xml")
    record = json.loads(first[2].read_text())
    assert record["seeds"] == [0]
    assert record["what"] == "β"
    assert record["versions"]["torch"] == torch.__version__


def test_save_is_the_same_whatever_the_style(tmp_path):
    """Whoever forgot use_style still gets ids in the SVG that do not change with every run."""
    matplotlib.rcdefaults()
    first, second = (style.save(a_figure(), "it", {}, tmp_path / name)[1] for name in ("one", "two"))
    assert first.read_bytes() == second.read_bytes()


def test_save_table(tmp_path):
    frame = pd.DataFrame({"net": ["Standard", "LCNN"], "C": ["1 ± 0.2", "0.5"], "n": [3, 4]})
    paths = style.save_table(frame, "t", {"seeds": [0, 1]}, tmp_path)
    assert [path.name for path in paths] == ["t.csv", "t.md", "t.tex", "t.json"]
    pd.testing.assert_frame_equal(pd.read_csv(paths[0]), frame.astype(pd.read_csv(paths[0]).dtypes))
    assert paths[1].read_text() == style.markdown(frame)
    assert paths[2].read_text() == style.latex(frame)
    assert json.loads(paths[3].read_text())["seeds"] == [0, 1]


def test_markdown():
    frame = pd.DataFrame({"net": ["A", "B"], "‖∇f‖": [1, 2.5]})
    assert style.markdown(frame) == "| net | ‖∇f‖ |\n| --- | --- |\n| A | 1.0 |\n| B | 2.5 |\n"
    assert style.markdown(frame[:0]) == "| net | ‖∇f‖ |\n| --- | --- |\n"


@pytest.mark.parametrize(
    ("save", "what"), [(style.save, a_figure), (style.save_table, lambda: pd.DataFrame({"a": [1]}))]
)
def test_a_folder_that_cannot_be_made(tmp_path, save, what):
    (tmp_path / "file").write_text("in the way")
    made = what()
    with pytest.raises(OSError, match=r"cannot write .*file/sub/it\."):
        save(made, "it", {}, tmp_path / "file" / "sub")
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_disk_that_fills_up_keeps_the_old_picture(tmp_path):
    paths = style.save(a_figure(), "it", {}, tmp_path / "f")
    old = [path.read_bytes() for path in paths]
    assert min(map(len, old[:2])) > 1000
    with files_of_at_most(1000), pytest.raises(OSError, match=r"cannot write .*it\.png"):
        style.save(a_figure(), "it", {"new": True}, tmp_path / "f")
    assert [path.read_bytes() for path in paths] == old
    assert sorted(os.listdir(tmp_path / "f")) == ["it.json", "it.png", "it.svg"]
