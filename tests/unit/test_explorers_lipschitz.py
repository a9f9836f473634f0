"""The γ explorer shows what its frame holds, whatever way one got there."""

import re

import numpy as np
import pandas as pd
import pytest
from test_explorers import ends, parts, pixels

from lcnn_utils import explorers
from lcnn_utils.widgets import lipschitz
from lcnn_utils.figures.style import METHOD

GAMMAS = [10 ** (k / 4) for k in range(6)]
LAYERS = ["stem", "block 1 conv 1", "block 1 shortcut"]


@pytest.fixture(autouse=True)
def seen(monkeypatch):
    pictures = []

    class Seen(explorers.Picture):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            pictures.append(self)

    monkeypatch.setattr(lipschitz, "Picture", Seen)
    monkeypatch.setattr(explorers, "CONTROLS", [])
    return pictures


def frame() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = []
    for method in ("standard", "lcnn"):
        for statistics in ("as trained", "taken anew"):
            natural = rng.uniform(2, 15, len(LAYERS))
            for gamma in GAMMAS:
                values = (rng.uniform(), 10 ** rng.uniform(-1, 1), rng.uniform())
                rows += [
                    (method, statistics, gamma, layer, min(slope, gamma), *values)
                    for layer, slope in zip(LAYERS, natural, strict=True)
                ]
    columns = ["method", "statistics", "gamma", "layer", "slope", "accuracy", "curvature", "grad_norm"]
    return pd.DataFrame(rows, columns=columns)


def test_every_control_changes_the_picture_and_is_registered():
    controls, image, text = parts(lipschitz.gamma_explorer(frame()))
    assert [(control, image) for control in controls] == explorers.CONTROLS
    assert len({control.description for control in controls}) == 3
    first, words = pixels(image), text.value
    for control in controls:
        start = control.value
        for value in [value for value in ends(control) if value != pytest.approx(start)] + [start]:
            before = image.value
            control.value = value
            assert image.value != before, control.description
            assert pixels(image).shape == first.shape
            assert "nan" not in text.value
    np.testing.assert_array_equal(pixels(image), first)
    assert text.value == words


@pytest.mark.parametrize(("net", "statistics", "k"), [("standard", "as trained", 0), ("lcnn", "taken anew", 3)])
def test_what_is_shown_is_what_was_measured(net, statistics, k, seen):
    measured = frame()
    (chosen, kind, slider), _, text = parts(lipschitz.gamma_explorer(measured))
    assert slider.base**slider.min == pytest.approx(GAMMAS[0])
    assert slider.base**slider.max == pytest.approx(GAMMAS[-1])
    chosen.value, kind.value = METHOD[net][0], statistics
    slider.value = min(GAMMAS[k] * 1.05, GAMMAS[-1])  # snaps to the nearest
    part = measured[(measured.method == net) & (measured.statistics == statistics)]
    row = part[part.gamma == GAMMAS[k]].iloc[0]
    numbers = re.findall(r"<b>(.*?)</b>", text.value)
    assert numbers == [f"{row.accuracy:.1%}", f"{row.curvature:.3g}", f"{row.grad_norm:.3g}"]
    cut = int((part[part.gamma == GAMMAS[k]].slope >= GAMMAS[k]).sum())
    assert f"cuts off slopes in {cut} of 3 layers" in text.value
    left, right, twin = seen[0].canvas.figure.axes
    tops = [line.get_ydata()[1] for line in left.lines[: len(LAYERS)]]
    np.testing.assert_allclose(tops, part[part.gamma == GAMMAS[k]].slope)
    whole = part.groupby("gamma").first()
    np.testing.assert_allclose(right.lines[0].get_ydata(), 100 * whole.accuracy)
    np.testing.assert_allclose(twin.lines[0].get_ydata(), whole.curvature)
    np.testing.assert_allclose(twin.lines[1].get_xydata(), [[GAMMAS[k], row.curvature]])
