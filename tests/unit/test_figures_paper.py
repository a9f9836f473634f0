"""Figures of notebook 08 draw what their frames hold: every mark within its axes, none for what was not measured."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lcnn_utils.experiments import CLAIMS
from lcnn_utils.figures import paper as figures
from lcnn_utils.figures.style import MARKERS, METHOD, PALETTE

pytestmark = pytest.mark.usefixtures("drawing")

LABELS = [METHOD[m][0] for m in ("standard", "lcnn", "gradreg", "lcnn_gradreg")]


def inside(figure: Figure) -> Figure:
    """Every mark, bar and text is within its axes, and axes within the figure: nothing that was drawn is hidden."""
    figure.canvas.draw()
    for axis in figure.axes:
        (left, right), ends = sorted(axis.get_xlim()), sorted(axis.get_ylim())
        assert np.isfinite([left, right, *ends]).all()
        points = [line.get_xydata() for line in axis.lines if line.get_transform() == axis.transData]
        points += [path.vertices for bars in axis.collections for path in bars.get_paths()]
        for part in points:
            x, y = part[np.isfinite(part).all(1)].T
            assert ((x >= left) & (x <= right)).all(), axis.get_title()
            assert ((y >= ends[0]) & (y <= ends[1])).all(), axis.get_title()
        for text in axis.texts:
            box = text.get_window_extent()
            assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1, text.get_text()
    return figure


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


# ----------------------------------------------------------------------------------------------------------- claims
RATIO = [i for i, claim in enumerate(CLAIMS) if "points" not in claim.value]
POINTS = [i for i, claim in enumerate(CLAIMS) if "points" in claim.value]


def table(scale: float = 1.0, drop: tuple[int, ...] = (), theirs: bool = True, width: float = 0.1) -> pd.DataFrame:
    """As ``claims`` gives it."""
    rows = []
    for i, claim in enumerate(CLAIMS):
        value = np.nan if i in drop else scale * (1.5 + i) * (1 if i in RATIO else (-1) ** i)
        rows.append(dict(claim=claim.text, value=claim.value, rule=claim.rule, low_bound=claim.low,
                         high_bound=claim.high, theirs=2.0 + i if theirs else np.nan, theirs_holds="", ours=value,
                         low=value - width * abs(value), high=value + width * abs(value), verdict=""))  # fmt: skip
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    "tables",
    [
        {"digits": table(0.2), "CIFAR-10": table(), "CIFAR-100": table(5.0, drop=tuple(range(len(CLAIMS))))},
        {"digits": table(drop=tuple(range(len(CLAIMS))))},
        {"digits": table(0.01, width=0.9)},
    ],
    ids=["three, one empty", "nothing of ours", "far from theirs"],
)
def test_claims(tables):
    figure = inside(figures.claims(tables))
    assert len(figure.axes) == 2
    for axis, rows, scale in zip(figure.axes, (RATIO, POINTS), ("log", "linear"), strict=True):
        assert axis.get_xscale() == scale
        assert axis.get_xlabel() == ("times" if scale == "log" else "percentage points")
        names = [text.get_text() for text in axis.get_yticklabels()]
        assert names == [f"{CLAIMS[i].text}\n({CLAIMS[i].rule})" for i in rows]
        assert axis.get_ylim()[0] > axis.get_ylim()[1], "the first claim at the top"
        diamonds = [line for line in axis.lines if line.get_marker() == "D"]
        for diamond, frame in zip(diamonds, tables.values(), strict=True):
            np.testing.assert_array_equal(np.array(diamond.get_xdata(), float), frame.theirs[rows])
        for container, (title, frame) in zip(axis.containers, tables.items(), strict=True):
            marks, _, (bars,) = container
            assert container.get_label() == title
            np.testing.assert_array_equal(marks.get_xdata().astype(float), frame.ours[rows])
            np.testing.assert_array_equal(np.round(np.array(marks.get_ydata()) - 0.05), range(len(rows)))
            ends = np.stack([path.vertices[:, 0] for path in bars.get_paths()])
            np.testing.assert_allclose(ends, frame.loc[rows, ["low", "high"]].astype(float))
        grey = [patch for patch in axis.patches if isinstance(patch, Rectangle)]
        left, right = axis.get_xlim()
        for patch, i in zip(grey, rows, strict=True):
            for value in np.linspace(left, right, 41)[1:-1]:
                covered = min(patch.get_x(), patch.get_x() + patch.get_width()) <= value <= max(
                    patch.get_x(), patch.get_x() + patch.get_width())  # fmt: skip
                assert covered == (CLAIMS[i].low <= value <= CLAIMS[i].high), "grey where the claim holds"
            assert to_hex(patch.get_facecolor()) == figures.HOLDS
        looks = {(to_hex(c[0].get_color()), c[0].get_marker()) for c in axis.containers}
        assert len(looks) == len(tables)
    assert legend(figure) == ["published", *tables, "where the claim holds"]


def test_claims_of_different_datasets_do_not_hide_each_other():
    tables = {name: table() for name in ("digits", "CIFAR-10", "CIFAR-100")}
    for axis in inside(figures.claims(tables)).axes:
        places = [np.array(line.get_ydata()) % 1 for line in axis.lines if line.get_marker() in "osvD"]
        heights = {round(float(h), 3) for part in places for h in part}
        assert len(heights) == 3, "each published number on the line of ours"


# ------------------------------------------------------------------------------------------------------------- cost
def costs(labels=LABELS, seeds: int = 2, unit: float = 3.0) -> pd.DataFrame:
    rows = [(label, s, unit * (1 + i) * (1 + 0.1 * s)) for i, label in enumerate(labels) for s in range(seeds)]
    frame = pd.DataFrame(rows, columns=["label", "seed", "seconds"])
    return frame.assign(ratio=frame.seconds / frame.seconds[:seeds].median())


@pytest.mark.parametrize(
    "panels",
    [
        {"digits": costs(list(PALETTE), 3), "CIFAR-10": costs(LABELS[:2], 1, 1234.5)},
        {"digits": costs(LABELS[:1], 1)},
    ],
    ids=["two, of fewer nets", "one run"],
)
def test_cost(panels):
    figure = inside(figures.cost(panels))
    assert len(figure.axes) == len(panels)
    names = list(next(iter(panels.values())).label.unique())
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == names
    for axis, (title, frame) in zip(figure.axes, panels.items(), strict=True):
        assert (axis.get_title(), axis.get_xscale()) == (title, "log")
        assert "Standard" in axis.get_xlabel()
        for line, text, (label, part) in zip(axis.lines, axis.texts, frame.groupby("label", sort=False), strict=True):
            np.testing.assert_array_equal(line.get_xdata(), part.ratio)
            assert set(line.get_ydata()) == {names.index(label)}
            assert (to_hex(line.get_color()), line.get_marker()) == (PALETTE[label], MARKERS[label])
            assert text.get_text() == f"{part.seconds.median():.3g} s"
        box = axis.get_window_extent()
        assert all(text.get_window_extent().x1 <= box.x1 for text in axis.texts), "the seconds are within the panel"


# ----------------------------------------------------------------------------------------------------------- layers
def trained(labels=LABELS[1:3], seeds: int = 2, kinds=("beta", "gamma"), spread: float = 0.2, layers: int = 5):
    rows = [
        (kind, layer, label, seed, (3.0 if kind == "beta" else 9.0) * (1 - spread + 2 * spread * seed) / (1 + i))
        for i, label in enumerate(labels)
        for kind in kinds
        for layer in range(1, layers + 1)
        for seed in range(seeds)
    ]
    return pd.DataFrame(rows, columns=["kind", "layer", "label", "seed", "value"])


@pytest.mark.parametrize(
    "panels",
    [
        {"digits": trained(), "CIFAR-10": trained(LABELS[1:2], 1)},
        {"digits": trained(spread=0.99), "CIFAR-10": trained(spread=0.05, layers=2)},
        {"digits": trained(kinds=("beta",))},
    ],
    ids=["two, of one seed", "wide", "no γ"],
)
def test_layers(panels):
    figure = figures.layers(panels)
    figure.canvas.draw()
    assert len(figure.axes) == 2 * len(panels)
    axes = iter(figure.axes)
    for title, frame in panels.items():
        for kind, symbol, start in (("beta", "β", 5.0), ("gamma", "γ", 10.0)):
            axis, part = next(axes), frame[frame.kind == kind]
            assert axis.get_title() == title
            assert axis.get_ylabel().startswith(symbol)
            low, high = axis.get_ylim()
            assert low == 0
            assert high > start, "where it began is in sight"
            for container, (label, values) in zip(axis.containers, part.groupby("label", sort=False), strict=True):
                over = values.groupby("layer").value.agg(["mean", "std"]).fillna(0)
                np.testing.assert_allclose(container[0].get_xydata(), np.stack([over.index, over["mean"]], 1))
                assert to_hex(container[0].get_color()) == PALETTE[label]
                tops = [segment[1][1] for segment in container[2][0].get_segments()]
                np.testing.assert_allclose(tops, over["mean"] + over["std"])
                assert max(tops) < high, "a bar that is cut off looks shorter than it is"
            assert any(line.get_linestyle() == ":" and set(line.get_ydata()) == {start} for line in axis.lines)
    assert legend(figure)[-1] == "start"
    assert legend(figure)[:-1] == list(next(iter(panels.values())).label.unique())
    assert all(axis.get_xlabel() for axis in figure.axes[-2:])


# ------------------------------------------------------------------------------------------------ training and test
def pairs(labels=LABELS, seeds: int = 2, scale: float = 4.0) -> pd.DataFrame:
    rows = [(label, s, scale * 3**i * (1 + s), scale * 3**i * (2 - s)) for i, label in enumerate(labels)
            for s in range(seeds)]  # fmt: skip
    return pd.DataFrame(rows, columns=["label", "seed", "train", "test"])


@pytest.mark.parametrize(
    "panels",
    [{"digits": pairs(list(PALETTE), 1), "CIFAR-10": pairs(LABELS[:2], 1, 90.0)},
     {"digits": pairs(LABELS[:1], 1)}],
    ids=["two", "one run"],
)  # fmt: skip
def test_train_test(panels):
    figure = inside(figures.train_test(panels))
    assert len(figure.axes) == len(panels)
    for axis, (title, frame) in zip(figure.axes, panels.items(), strict=True):
        assert axis.get_title() == title
        assert axis.get_xlim() == axis.get_ylim(), "the diagonal is one"
        assert "training" in axis.get_xlabel()
        assert "test" in axis.get_ylabel()
        diagonal, *lines = axis.lines
        np.testing.assert_array_equal(diagonal.get_xdata(), diagonal.get_ydata())
        for line, (label, part) in zip(lines, frame.groupby("label", sort=False), strict=True):
            np.testing.assert_array_equal(line.get_xydata(), part[["train", "test"]])
            assert (to_hex(line.get_color()), line.get_marker()) == (PALETTE[label], MARKERS[label])
    assert legend(figure) == ["equal", *next(iter(panels.values())).label.unique()]
