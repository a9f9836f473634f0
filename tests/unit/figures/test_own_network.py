"""The figure of a report: what is drawn of one network or several, and what is shown in place of what is missing."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text

from lcnn_utils.figures.own_network import remarks, report

MEASURES = {  # measure: its ε
    "accuracy": [np.nan],
    "robust_accuracy": [0.0, 0.1, 0.5],
    "certified_radius": [np.nan],
    "certified_accuracy": [0.1, 0.5],
    "relative_change": [0.1, 0.5],
    "curvature": [np.nan],
    "margin_curvature": [np.nan],
}
COLUMNS = ["network", "measure", "eps", "value", "low", "high", "n", "p", "note"]


def frame(networks=("mine",), missing=()) -> pd.DataFrame:
    """As ``measurements.own_network.report`` gives it; ``missing``: pairs (network, measure) that were not measured."""
    rows = []
    for number, network in enumerate(networks):
        for measure, lengths in MEASURES.items():
            if (network, measure) in missing:
                rows.append((network, measure, np.nan, np.nan, np.nan, np.nan, 0, np.nan, "not measured: too curved"))
                continue
            for place, eps in enumerate(lengths):
                value = 0.9 - 0.1 * number - 0.2 * place
                rows.append((network, measure, eps, value, 0.9 * value, 1.05 * value, 50, np.nan, ""))
    return pd.DataFrame(rows, columns=COLUMNS)


def intervals(axis) -> np.ndarray:
    """Ends of the error bars drawn, (n, 2)."""
    segments = [segment for container in axis.containers for segment in container[2][0].get_segments()]
    return np.sort([segment[:, 1] for segment in segments], axis=0)


@pytest.mark.parametrize("networks", [("mine",), ("ReLU", "LCNN"), ("a", "b", "c")])
def test_error_bars_are_the_intervals(networks, drawing):
    rows = frame(networks)
    figure = report(rows)
    figure.canvas.draw()
    assert min(text.get_fontsize() for text in figure.findobj(Text) if text.get_text()) >= 8
    panels = (("robust_accuracy", "certified_accuracy"), ("curvature", "margin_curvature"), ("relative_change",))
    for axis, measures in zip(figure.axes, panels, strict=True):
        expected = rows[rows.measure.isin(measures)][["low", "high"]].to_numpy()
        np.testing.assert_allclose(intervals(axis), np.sort(expected, axis=0))
    (legend,) = figure.legends
    assert [text.get_text().split(":")[0] for text in legend.get_texts()] == list(networks)


@pytest.mark.parametrize("measures", [["certified_accuracy"], ["curvature", "margin_curvature"], ["relative_change"],
                                      ["robust_accuracy", "certified_accuracy"], list(MEASURES)])  # fmt: skip
def test_what_is_missing_is_said(measures, drawing):
    """Of one network, the other's points stay; of both, the panel says so."""
    frames = [frame("ab", {(network, measure) for network in nets for measure in measures}) for nets in ("a", "ab")]
    some, none = map(report, frames)
    for figure, rows in zip((some, none), frames, strict=True):
        figure.canvas.draw()
        assert "too curved" in "\n".join(remarks(rows))
    assert all(axis.containers for axis in some.axes)
    empty = [axis for axis in none.axes if not axis.containers]
    assert all("not measured" in [text.get_text() for text in axis.texts] for axis in empty)
    assert bool(empty) == (measures != ["certified_accuracy"])
