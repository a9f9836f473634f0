"""The explorer of notebook 08: the limit and the claim move, and what it says follows the rule."""

import re

import numpy as np
import pandas as pd
import pytest

from lcnn_utils import explorers
from lcnn_utils.experiments import claims
from lcnn_utils.widgets import paper


@pytest.fixture(autouse=True)
def controls(monkeypatch):
    monkeypatch.setattr(explorers, "CONTROLS", [])
    return explorers


def tables(missing: bool = False) -> dict[str, pd.DataFrame]:
    """Two made-up datasets: ratios 7 (6 to 8) and 20 (15 to 30) of every claim."""
    frame = claims("digits")
    one = frame.assign(ours=7.0, low=6.0, high=8.0)
    other = (
        frame.assign(ours=np.nan, low=np.nan, high=np.nan) if missing else frame.assign(ours=20.0, low=15.0, high=30.0)
    )
    return {"one": one, "other": other}  # fmt: skip


def states(box) -> dict[str, str]:
    return dict(re.findall(r"(\w+): <b>([a-z ]+)</b>", box.children[-1].value))


def test_the_limit_decides():
    box = paper.claim_explorer(tables())
    claim, asked = box.children[:2]
    assert len(claim.options) >= 4
    assert asked.value == pytest.approx(3.5)
    seen = {}
    for limit in (1.0, 5.0, 6.9, 25.0, 90.0):
        asked.value = limit
        seen[limit] = states(box)
    assert seen[1.0] == {"one": "holds", "other": "holds"}
    assert seen[5.0] == {"one": "holds", "other": "holds"}
    assert seen[6.9] == {"one": "open", "other": "holds"}
    assert seen[25.0] == {"one": "fails", "other": "open"}
    assert set(seen[90.0].values()) == {"fails"}


def test_what_was_not_measured_is_said():
    box = paper.claim_explorer(tables(missing=True))
    assert states(box)["other"] == "not measured"


def test_every_control_changes_the_picture_at_its_ends():
    box = paper.claim_explorer(tables())
    claim, asked = box.children[:2]
    image = box.children[2]
    for value in (10**asked.max, 10**asked.min):
        before = image.value
        asked.value = value
        assert image.value != before
    for option in [*claim.options[1:], claim.options[0]]:
        before = image.value
        claim.value = option
        assert image.value != before
    assert len(explorers.CONTROLS) == 2


def test_only_ratios_with_a_lower_limit_are_offered():
    box = paper.claim_explorer(tables())
    assert all("above" in option for option in box.children[0].options)
