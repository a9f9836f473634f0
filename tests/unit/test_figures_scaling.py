"""The figure of speed-ups draws what its frames hold, and nothing lies outside of its axes."""

import warnings

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from lcnn_utils.figures import scaling as figures
from lcnn_utils.lab import use_style
from lcnn_utils.studies.scaling import speedups


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: pytest.fail("a figure function saved"))
    backend = matplotlib.get_backend()
    plt.switch_backend("agg")
    with matplotlib.rc_context(), warnings.catch_warnings():
        use_style()
        warnings.simplefilter("error")
        yield
    plt.close("all")
    plt.switch_backend(backend)


def frame(overheads=(0.0, 0.004, 0.5), runs=60, length=3.0, workers=(1, 2, 5, 20, 100, 1000)) -> pd.DataFrame:
    return pd.concat([speedups([length] * runs, workers, o).assign(overhead=o) for o in overheads], ignore_index=True)


@pytest.mark.parametrize(
    ("panels", "measured"),
    [
        ({"digits": frame()}, 0.004),
        ({"digits": frame(), "CIFAR-10": frame(length=1200.0)}, 0.004),
        ({"digits": frame((0.0,)), "short": frame((0.0,), length=1e-3)}, None),
        ({"slow": frame((3.0, 0.5), length=0.01)}, 3.0),
        ({"few": frame(workers=(1, 2))}, 0.25),
    ],
    ids=["one", "two", "no overhead", "slower than alone", "measured is none of them"],
)
def test_speedup(panels, measured):
    figure = figures.speedup(panels, measured)
    figure.canvas.draw()
    assert len(figure.axes) == len(panels)
    for axis, (title, part) in zip(figure.axes, panels.items(), strict=True):
        assert (axis.get_title(), axis.get_xscale(), axis.get_yscale()) == (title, "log", "log")
        assert axis.get_xlabel() == "W: workers"
        ideal, *lines = axis.lines
        np.testing.assert_array_equal(*ideal.get_data())
        assert ideal.get_linestyle() == "--"
        for line, (overhead, values) in zip(lines, part.groupby("overhead"), strict=True):
            np.testing.assert_array_equal(line.get_xydata(), values[["workers", "speedup"]])
            assert (line.get_marker() == "o") == ("measured" in line.get_label()) == (overhead == measured)
        looks = {(to_hex(line.get_color()), line._dash_pattern[1] and tuple(line._dash_pattern[1])) for line in lines}
        assert len(looks) == len(lines), "told apart by colour and by dashes"
        for line in axis.lines:
            for values, ends in zip(line.get_data(), (axis.get_xlim(), axis.get_ylim()), strict=True):
                assert ends[0] <= min(values) <= max(values) <= ends[1]
    assert "speed-up" in figure.axes[0].get_ylabel()
    assert len({axis.get_ylim() for axis in figure.axes}) == 1
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert named[0].startswith("ideal")
    assert len(named) == 1 + next(iter(panels.values())).overhead.nunique()


def test_names_of_overheads():
    figure = figures.speedup({"x": frame((0.0, 0.004, 0.5, 2.0))}, 0.004)
    names = [text.get_text() for text in figure.legends[0].get_texts()][1:]
    assert names == ["no overhead", "4 ms a run, measured", "500 ms a run", "2 s a run"]


def test_it_leaves_its_frames_alone():
    given = frame()
    before = given.copy()
    figures.speedup({"x": given})
    pd.testing.assert_frame_equal(given, before)
