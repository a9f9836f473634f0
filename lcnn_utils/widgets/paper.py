"""The explorer of notebook 08: how much "far lower" has to be before a claim fails."""

from collections.abc import Mapping

import ipywidgets as widgets
import numpy as np
import pandas as pd

from ..figures.style import CYCLE
from .engine import Picture, explore, log_slider, panels

COLOURS = (CYCLE[0], CYCLE[3], CYCLE[1], CYCLE[2])


def claim_explorer(tables: Mapping[str, pd.DataFrame]) -> widgets.VBox:
    """Claims on ratios: the published number and ours with 95 % intervals, and a limit that the reader sets.
    ``tables``: title → of ``claims``, the same claims in each, four at most; those measured in "times" with a lower
    limit are shown."""
    first = next(iter(tables.values()))
    ratios = first[first.value.str.endswith("times") & np.isfinite(first.low_bound)]
    axis = panels((9.5, 2.9))
    intervals, dots, diamonds = {}, {}, {}
    for height, (title, colour) in enumerate(zip(tables, COLOURS, strict=False)):
        (intervals[title],) = axis.plot([1, 1], [height, height], "-", color=colour, lw=3)
        (dots[title],) = axis.plot([1], [height], "o", color=colour, ms=10, mew=2)
        (diamonds[title],) = axis.plot([1], [height - 0.25], "D", mfc="white", color=colour, ms=8)
    limit = axis.axvline(1, color="0.3", ls="--")
    axis.set(xscale="log", xlim=(0.5, 100), xlabel="times")
    axis.set_title("dot: ours, filled if its whole interval lies above the limit; diamond: published", fontsize=9)
    axis.set_xticks([0.5, 1, 2, 5, 10, 20, 50, 100], ["0.5", "1", "2", "5", "10", "20", "50", "100"])
    axis.set_yticks(range(len(dots)), list(dots))
    axis.set_ylim(len(dots) - 0.4, -0.6)

    def update(claim: int, asked: float) -> str:
        limit.set_xdata([asked, asked])
        verdicts = []
        for title, dot in dots.items():
            row = tables[title].loc[claim]
            intervals[title].set_xdata([row.low, row.high])
            dot.set(xdata=[row.ours], markerfacecolor=dot.get_color() if row.low >= asked else "white")
            diamonds[title].set_xdata([row.theirs])
            verdict = "holds" if row.low >= asked else "fails" if row.high < asked else "open"
            if np.isnan(row.ours):
                verdicts.append(f"{title}: <b>not measured</b>")
            else:
                verdicts.append(f"{title}: <b>{verdict}</b> ({row.ours:.3g}; published {row.theirs:.3g})")
        return f"At least {asked:.3g} times? {'; '.join(verdicts)}."

    options = [(f"{row.claim} ({row.rule})", index) for index, row in ratios.iterrows()]
    claim = widgets.Dropdown(options=options, description="claim")
    asked = log_slider(ratios.low_bound.iloc[0], (-0.3, 2), "asked: at least")
    picture = Picture([limit, *intervals.values(), *dots.values(), *diamonds.values()])
    return explore(picture, update, claim=claim, asked=asked)
