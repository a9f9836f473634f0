"""The explorer of speed-ups: its controls redraw, and what it says is what the model says."""

import re
import time

import pytest

from lcnn_utils import explorers
from lcnn_utils.explorers.scaling import scaling_explorer
from lcnn_utils.studies.scaling import makespan

SECONDS = [3.0, 1.0, 5.0] * 40


@pytest.fixture(autouse=True)
def controls(monkeypatch):
    monkeypatch.setattr(explorers, "CONTROLS", [])


@pytest.fixture
def box():
    return scaling_explorer(SECONDS, 0.004)


def test_labels_and_ends(box):
    workers, handing, length = box.children[:3]
    assert workers.description.startswith("W: ")
    assert "(ms)" in handing.description
    assert "seconds" in length.description
    assert (10**workers.min, 10**workers.max) == (1, 1000)
    assert handing.value == pytest.approx(4)
    assert length.value == pytest.approx(3)
    assert len(explorers.CONTROLS) == 3


def test_every_control_changes_the_picture_at_both_ends(box):
    image = box.children[3]
    for control in box.children[:3]:
        start, seen = control.value, [image.value]
        for value in (10**control.min, 10**control.max):
            control.value = value
            seen.append(image.value)
        assert len(set(seen)) == 3, control.description
        control.value = start
        assert image.value == seen[0]


@pytest.mark.parametrize("workers", [1, 7, 1000])
@pytest.mark.parametrize("handing", [0.1, 50, 10_000])
@pytest.mark.parametrize("length", [0.1, 3, 10_000])
def test_it_says_what_the_model_says(box, workers, handing, length):
    for control, value in zip(box.children[:3], (workers, handing, length), strict=True):
        control.value = value
    text = box.children[-1].value
    lengths = [length / 3 * one for one in SECONDS]
    end = makespan(lengths, workers, handing / 1000)
    speedup, share = re.search(r"speed-up of <b>([^<]+)</b>; a worker is at work <b>([^<]+)</b>", text).groups()
    assert speedup == f"{sum(lengths) / end:.3g}"
    assert share == f"{sum(lengths) / end / workers:.0%}"
    assert f"on {workers} worker{'s' * (workers > 1)}:" in text
    limits = {"the longest": max(lengths), "the work": sum(lengths) / workers, "the scheduler": 0.12 * handing}
    assert f"What limits it most: <b>{max(limits, key=limits.get)}" in text


def test_a_redraw_is_quick(box):
    begun = time.perf_counter()
    for value in (2.0, 30.0, 400.0):
        box.children[0].value = value
    assert time.perf_counter() - begun < 3
