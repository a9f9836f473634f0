"""What moves in notebook 08: how much "far lower" has to be before a claim fails."""

from __future__ import annotations

from collections.abc import Mapping

import ipywidgets as widgets
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ..figures.style import CYCLE
from .engine import Picture, explore, log_slider

COLOURS = (CYCLE[0], CYCLE[3], CYCLE[1], CYCLE[2])


def claim_explorer(tables: Mapping[str, pd.DataFrame]) -> widgets.VBox:
    """Claims on ratios: the published number and ours with 95 % intervals, and a limit that the reader sets.
    ``tables``: title → of ``claims``, the same claims in each; those measured in "times" with a lower limit are shown.
    """
    first = next(iter(tables.values()))
    chosen = first.index[first.value.str.endswith("times") & np.isfinite(first.low_bound)]
    names = {f"{row.claim} ({row.rule})": i for i, row in zip(chosen, first.loc[chosen].itertuples(), strict=True)}
    figure = Figure(figsize=(9.5, 2.9), dpi=90, layout="constrained")
    axis = figure.subplots()
    rows = list(tables)
    colours = [COLOURS[k % len(COLOURS)] for k in range(len(rows))]
    bars = [axis.plot([1, 1], [k, k], "-", color=c, lw=3)[0] for k, c in enumerate(colours)]
    dots = [axis.plot([1], [k], "o", color=c, ms=10, mew=2)[0] for k, c in enumerate(colours)]
    printed = [axis.plot([1], [k - 0.25], "D", mfc="white", color=c, ms=8)[0] for k, c in enumerate(colours)]
    limit = axis.axvline(3.5, color="0.3", ls="--")
    axis.set(xscale="log", xlim=(0.5, 100), xlabel="times")
    axis.set_title("dot: ours, filled if its whole interval lies above the limit; diamond: published", fontsize=9)
    axis.set_xticks([0.5, 1, 2, 5, 10, 20, 50, 100], ["0.5", "1", "2", "5", "10", "20", "50", "100"])
    axis.set_yticks(range(len(rows)), rows)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    picture = Picture(figure, [limit, *bars, *dots, *printed])

    def update(claim: str, asked: float) -> str:
        limit.set_xdata([asked, asked])
        said = []
        for title, bar, dot, diamond in zip(rows, bars, dots, printed, strict=True):
            value, low, high, theirs = tables[title].loc[names[claim], ["ours", "low", "high", "theirs"]]
            bar.set_xdata([low, high])
            dot.set(xdata=[value], markerfacecolor=dot.get_color() if low >= asked else "white")
            diamond.set_xdata([theirs])
            state = "holds" if low >= asked else "fails" if high < asked else "open"
            known = f"<b>{state}</b> ({value:.3g}; published {theirs:.3g})"
            said.append(f"{title}: " + ("<b>not measured</b>" if np.isnan(value) else known))
        return f"At least {asked:.3g} times? " + "; ".join(said) + "."

    claim = widgets.Dropdown(options=list(names), description="claim")
    asked = log_slider(first.low_bound[chosen[0]], (10**-0.3, 100), "asked: at least", step=0.02)
    return explore(picture, update, claim=claim, asked=asked)
