"""What must be true of what figures draw, and how they are saved. That each draws: notebooks and `lcnn figures`."""

import itertools
import json

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import files_of_at_most
from matplotlib.figure import Figure

from lcnn_utils.experiments import CLAIMS
from lcnn_utils.figures import attacks, bound, curvature, own_network, paper, saliency, style
from lcnn_utils.figures.style import METHOD
from lcnn_utils.lab import use_style

NETS = ("standard", "lcnn", "gradreg", "lcnn_gradreg")


def every(**columns) -> pd.DataFrame:
    """A row for each combination of the columns' values."""
    return pd.DataFrame(itertools.product(*columns.values()), columns=list(columns))


def positive(frame: pd.DataFrame, **levels: float) -> pd.DataFrame:
    """Columns of random numbers around each level, over a decade."""
    rng = np.random.default_rng(0)
    return frame.assign(**{name: level * 10 ** rng.uniform(-0.5, 0.5, len(frame)) for name, level in levels.items()})


def interval(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    """low and high around a column, further above than below."""
    return frame.assign(low=0.9 * frame[column], high=1.2 * frame[column])


def labelled(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(label=[METHOD[method][0] for method in frame.method])


def field(**key) -> pd.DataFrame:
    """A grid whose margin is x1 − 0.5 and whose curvature is 10^(x1 + x2)."""
    frame = every(x2=np.linspace(-1, 1, 5), x1=np.linspace(-1, 2, 7))
    return frame.assign(margin=frame.x1 - 0.5, curvature=10 ** (frame.x1 + frame.x2), accuracy=0.9, **key)


def fields(name: str, values: tuple) -> pd.DataFrame:
    return pd.concat([field(**{name: value}) for value in values], ignore_index=True)


def points() -> pd.DataFrame:
    """An infinite ball, which no attack found a way out of, and a misread image."""
    return pd.DataFrame(dict(x1=[0, 1, 0.2], x2=[0, 0.5, -0.5], label=[0, 1, 0], certified=[0.3, np.inf, 0],
                             found1=[0.5, np.nan, 0.2], found2=[0, np.nan, -0.5]))  # fmt: skip


def images() -> pd.DataFrame:
    frame = labelled(every(method=NETS[:2], seed=(0, 1, 2), image=range(20)))
    frame = positive(frame, curvature=10.0, grad_norm=1.0, hessian_norm=10.0)
    return frame.assign(accuracy=0.9 + 0.01 * frame.seed)


def noisy(published: bool) -> pd.DataFrame:
    frame = positive(every(label=[METHOD[net][0] for net in NETS], eps=(1e-3, 0.1, 1.0)), value=0.3, theory=1.0)
    return frame if published else interval(frame, "value")


def by_map() -> pd.DataFrame:
    frame = every(net=NETS[:2], map=("Gradient", "SmoothGrad"), weights=("trained", "random"),
                  noise=("random", "worst"), measure=("relative_change", "infidelity"))  # fmt: skip
    return interval(positive(frame, value=0.3), "value")


def attacked(norm: str) -> pd.DataFrame:
    frame = every(method=NETS, eps=(0.0, 0.1, 0.2))
    return interval(frame.assign(accuracy=0.8 - 3 * frame.eps, norm=norm), "accuracy")


def claims(scale: float = 1.0) -> pd.DataFrame:
    """As ``experiments.claims`` gives them; the first was not measured."""
    frame = pd.DataFrame([(c.text, c.value, c.rule, c.low, c.high) for c in CLAIMS])
    frame.columns = ["claim", "value", "rule", "low_bound", "high_bound"]
    frame["ours"] = scale * (1.5 + frame.index.to_series()).where(frame.index > 0)
    return interval(frame.assign(theirs=2.0 + frame.index), "ours")


def softened() -> pd.DataFrame:
    frame = every(statistics=("as trained", "measured again"), beta=(100, 3, 0.3), measure=tuple(own_network.QUANTITY))
    return interval(positive(frame, value=0.1), "value")


def references() -> pd.DataFrame:
    """The margin of a ReLU net has no curvature."""
    frame = every(network=("lcnn", "relu"), measure=tuple(own_network.QUANTITY)).assign(n=9, eps=np.nan)
    nothing = (frame.network == "relu") & (frame.measure == "margin_curvature")
    return interval(frame.assign(value=np.where(nothing, 0.0, 0.5)), "value")


PUBLISHED = every(label=("Standard", "LCNN"), eps=(0.0, 0.1, 0.2)).assign(accuracy=[70, 50, 30, 71, 52, 33], sd=1.0)
LOSSES = interval(every(loss=("ce", "margin"), scale=(0.1, 1.0, 100.0), accuracy=(0.5,)), "accuracy")


@pytest.mark.parametrize(
    ("function", "frame"),
    [(saliency.gradient_robustness, noisy(published=False)),
     (attacks.logit_scale, LOSSES),
     (saliency.by_map, by_map().query("weights == 'trained' & measure == 'relative_change' & noise == 'random'")),
     (paper.claims, claims()[[("points" not in claim.value) for claim in CLAIMS]].dropna())],
)  # fmt: skip
def test_error_bars_reach_from_low_to_high(function, frame, drawing):
    panels = {saliency.gradient_robustness: {"ours": frame}, paper.claims: {"digits": claims()}}
    more = [["relative_change"], ["random"]] if function is saliency.by_map else []
    axis = function(panels.get(function, frame), *more).axes[0]
    direction = 0 if function in (saliency.by_map, paper.claims) else 1
    bars = [segment for container in axis.containers if hasattr(container, "has_yerr")
            for segment in container[2][0].get_segments() if len(segment)]  # fmt: skip
    ends = np.array(bars)[:, :, direction][: len(frame)]
    np.testing.assert_allclose(np.sort(ends, 0), np.sort(frame[["low", "high"]], 0))


def test_means_have_bars_of_their_standard_deviation(drawing):
    frame = images()
    runs = frame.groupby(["label", "seed"])[["curvature", "accuracy"]].mean()
    containers = curvature.curvature_distribution(frame).axes[1].containers
    for container, label in zip(containers, ("Standard", "LCNN"), strict=True):
        np.testing.assert_allclose(container[0].get_xydata(), [runs.loc[label].mean()])
        for bar, column in enumerate(("curvature", "accuracy")):
            ends = np.ptp(container[2][bar].get_segments()[0], axis=0)[bar]
            assert ends / 2 == pytest.approx(runs.loc[label][column].std())


def test_what_is_published_is_drawn_beside_ours(drawing):
    last = attacks.curves({"digits, L2": attacked("l2")}, PUBLISHED).axes[-1]
    for container, (_, part) in zip(last.containers, PUBLISHED.groupby("label", sort=False), strict=True):
        np.testing.assert_allclose(container[0].get_ydata().astype(float), part.accuracy / 100)
    ours, theirs = {"ours": noisy(published=False)}, {"published": noisy(published=True)}
    published = saliency.gradient_robustness(ours, theirs).axes[1]
    assert len(published.lines) == 2 * len(NETS), "solid and dashed"
    tables = {"digits": claims(), "CIFAR-10": claims(0.1)}
    drawn = [line.get_xdata() for axis in paper.claims(tables).axes for line in axis.lines if line.get_marker() == "D"]
    assert sorted(np.concatenate(drawn)) == sorted([*claims().theirs, *claims().theirs])


def test_softening_is_drawn_against_beta_and_beside_other_nets(drawing):
    frame, axes = softened(), own_network.softening(softened(), references()).axes
    values = frame.pivot(index=["statistics", "beta"], columns="measure", values="value")
    for axis, measure in zip(axes, own_network.QUANTITY, strict=False):
        dashed = [line.get_ydata()[0] for line in axis.lines if line.get_xdata()[-1] == 1]  # across the whole panel
        assert dashed == [0.5] * (1 if measure == "margin_curvature" else 2)
        for container, (_, part) in zip(axis.containers, values[measure].groupby("statistics"), strict=True):
            drawn = sorted(container[0].get_xydata().tolist())
            np.testing.assert_allclose(drawn, part.reset_index()[["beta", measure]])
    for line, (_, part) in zip(axes[5].lines, values.groupby("statistics"), strict=False):
        np.testing.assert_allclose(line.get_xydata(), part[["curvature", "accuracy"]])


def test_maps_are_the_right_way_up(drawing):
    """Also of a shuffled frame: x1 to the right, x2 upwards, class 1 where the margin is positive."""
    frame = fields("method", NETS[:1]).sample(frac=1, random_state=0)
    regions, image = curvature.moons(frame, points()[:0]).axes[:2]
    regions.get_legend().remove()
    regions.figure.canvas.draw()
    pixels = np.asarray(regions.figure.canvas.buffer_rgba())
    for x1, hexadecimal in ((0.1, style.CLASS_COLOURS[0]), (0.9, style.CLASS_COLOURS[1])):
        column, row = regions.transData.transform((x1, 0.25)).round().astype(int)
        colour = 0.25 * np.array(matplotlib.colors.to_rgb(hexadecimal)) + 0.75
        np.testing.assert_allclose(pixels[-row, column, :3] / 255, colour, atol=0.02)
    (shown,) = image.images
    np.testing.assert_allclose(shown.get_array(), np.add.outer(np.linspace(-1, 1, 5), np.linspace(-1, 2, 7)), atol=1e-9)
    assert (shown.origin, list(shown.get_extent())) == ("lower", [-1, 2, -1, 1])


def test_a_certified_ball_has_its_radius(drawing):
    axis = bound.moons_balls(points().assign(net="a"), fields("net", ("a",)), ["K = 7"]).axes[0]
    (balls,) = [c for c in axis.collections if hasattr(c, "get_widths")]
    np.testing.assert_allclose(balls.get_widths(), [0.6, np.nan, 0.0])
    assert axis.get_aspect() == 1


def a_figure() -> Figure:
    figure, axis = plt.subplots(figsize=(1.5, 1))
    axis.plot([0, 1], [0, 1], label="β")
    return figure


@pytest.fixture
def saved(tmp_path):
    """A figure and a table in a folder; what they are saved by, and the bytes of every file."""
    with plt.rc_context():
        use_style()
        style.save(a_figure(), "it", {"seeds": [0], "what": "β"}, tmp_path / "f")
        style.save_table(pd.DataFrame({"net": ["A|B"], "n": [3]}), "t", {}, tmp_path / "f")
        yield {path: path.read_bytes() for path in (tmp_path / "f").iterdir()}
    plt.close("all")


def test_save_is_the_same_byte_for_byte(saved):
    assert not plt.get_fignums(), "it is closed"
    folder = next(iter(saved)).parent
    style.save(a_figure(), "it", {"seeds": [0], "what": "β"}, folder)
    style.save_table(pd.DataFrame({"net": ["A|B"], "n": [3]}), "t", {}, folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == saved
    assert {path.name for path in saved} == {*("it.png", "it.svg", "it.json"), *("t.csv", "t.md", "t.json")}
    record = json.loads((folder / "it.json").read_text("utf-8"))
    assert (record["seeds"], record["what"]) == ([0], "β")
    assert record["versions"]["torch"] == torch.__version__
    assert (folder / "t.md").read_text("utf-8") == "| net | n |\n| --- | --- |\n| A\\|B | 3 |\n"


def test_what_cannot_be_replaced_stays(saved, monkeypatch):
    folder = next(iter(saved)).parent
    with files_of_at_most(1000), pytest.raises(OSError, match=r"cannot write .*it\.png"):
        style.save(a_figure(), "it", {}, folder)
    broken = a_figure()
    broken.suptitle("$\\nonsense$")  # found while it is drawn
    with pytest.raises(ValueError, match="nonsense"):
        style.save(broken, "it", {}, folder)
    monkeypatch.setattr(style, "markdown", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        style.save_table(pd.DataFrame({"new": [1]}), "t", {}, folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == saved


def test_the_style_does_not_depend_on_the_readers_settings():
    backend = plt.get_backend()
    with plt.rc_context():
        use_style()
        ours = dict(matplotlib.rcParams)
        matplotlib.rcParams.update({"text.usetex": True, "font.size": 30, "lines.linestyle": "--"})
        use_style()
        assert dict(matplotlib.rcParams) == ours
        assert plt.get_backend() == backend
