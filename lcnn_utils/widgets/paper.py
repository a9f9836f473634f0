"""The explorer of notebook 08: how strict a rule may be before a claim fails."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import ipywidgets as widgets
import numpy as np
import pandas as pd

from ..experiments import CLAIMS, Claim
from ..figures.style import CYCLE
from .engine import DRAWING, Picture, explore, panels

COLOURS = (CYCLE[0], CYCLE[3], CYCLE[1])


def claim_explorer(tables: Mapping[str, pd.DataFrame]) -> widgets.VBox:
    """The published number of a claim and ours with 95 % intervals, and a limit that the reader sets; it begins at the
    claim's own, whenever another claim is chosen. ``tables``: title → of ``claims`` (all of them), three at most."""
    rows = {title: list(table.itertuples()) for title, table in tables.items()}
    axis = panels((9.5, 2.9))
    intervals, dots, diamonds = {}, {}, {}
    for height, (title, colour) in enumerate(zip(tables, COLOURS, strict=False)):
        (intervals[title],) = axis.plot([0, 0], [height, height], "-", color=colour, lw=3)
        (dots[title],) = axis.plot([0], [height], "o", color=colour, ms=10, mew=2)
        (diamonds[title],) = axis.plot([0], [height - 0.25], "D", mfc="white", color=colour, ms=8)
    limits = [axis.axvline(0, color="0.3", ls="--") for _ in range(2)]
    axis.set_title("dot: ours, filled where the claim holds; diamond: published; dashed: the limit", fontsize=9)
    axis.set_yticks(range(len(dots)), list(dots))
    axis.set(ylim=(len(dots) - 0.4, -0.6), xlabel="times")  # laid out with a label
    picture = Picture([*limits, *intervals.values(), *dots.values(), *diamonds.values()])

    def begin(_=None) -> None:
        """Axis and slider for another claim."""
        chosen = CLAIMS[claim.value]
        numbers = [table.loc[claim.value, ["theirs", "ours"]].astype(float) for table in tables.values()]
        largest = 2.1 * float(np.nanmax([own_limit(chosen), *np.abs(pd.concat(numbers))]))
        step = 10 ** math.floor(math.log10(largest / 20)) / 2  # every claim's own limit is a multiple of it
        in_points = "points" in chosen.value
        with DRAWING:
            axis.set(xlim=(-largest if in_points else 0, largest), xlabel="percentage points" if in_points else "times")
            picture.draw_background()
        limit.min, limit.step = 0, step
        limit.max = step * math.ceil(largest / step)
        limit.value = own_limit(chosen)

    def update(claim: int, limit: float) -> str:
        rule = with_limit(CLAIMS[claim], limit)
        for line, place in zip(limits, (rule.low, rule.high), strict=True):
            line.set_xdata([place, place])
        verdicts = []
        for title, dot in dots.items():
            row: Any = rows[title][claim]
            verdict = rule.verdict((row.ours, row.low, row.high))
            intervals[title].set_xdata([row.low, row.high])
            dot.set(xdata=[row.ours], markerfacecolor=dot.get_color() if verdict == "holds" else "white")
            diamonds[title].set_xdata([row.theirs])
            numbers = "" if np.isnan(row.ours) else f" ({row.ours:.3g}; published {row.theirs:.3g})"
            verdicts.append(f"{title}: <b>{verdict}</b>{numbers}".replace("published nan", "nothing published"))
        return f"{rule.value[0].upper()}{rule.value[1:]}, {rule.rule}? {'; '.join(verdicts)}."

    options = [(f"{number + 1}. {known.text} ({known.rule})", number) for number, known in enumerate(CLAIMS)]
    claim = widgets.Dropdown(options=options, description="claim")
    limit = widgets.FloatSlider(description="limit", readout_format=".3g")
    claim.observe(begin, "value")
    begin()
    return explore(picture, update, claim=claim, limit=limit)


def own_limit(claim: Claim) -> float:
    """The limit of a claim that the reader may move."""
    return claim.low if np.isinf(claim.high) else claim.high


def with_limit(claim: Claim, limit: float) -> Claim:
    """The claim with another limit; where there are two, ± it."""
    if np.isinf(claim.high):
        return replace(claim, low=limit)
    return replace(claim, high=limit, low=claim.low if np.isinf(claim.low) else -limit)
