"""The figure of notebook 05's last section: how much faster a sweep gets on more workers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from .style import CYCLE

STYLES = ("-", "-.", (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1)))
TICKS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


def speedup(panels: Mapping[str, pd.DataFrame], measured: float | None = None) -> Figure:
    """Speed-up against workers, both logarithmic: a line for each overhead of the scheduler; dashed, the ideal.

    Args:
        panels: title → of ``studies.scaling.panels``, the same overheads in each.
        measured: the overhead that was measured, whose line is drawn with dots.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(0.6 + 4.6 * len(panels), 4.4), squeeze=False, sharey=True)
    for axis, (title, frame) in zip(axes[0], panels.items(), strict=True):
        ends = np.array([frame.workers.min(), frame.workers.max()])
        axis.plot(ends, ends, "--", color="0.5", lw=1, label="ideal: as many times as workers")
        for index, (overhead, part) in enumerate(frame.groupby("overhead")):
            said = _said(float(str(overhead))) + (", measured" if overhead == measured else "")
            look: dict[str, Any] = {"marker": "o", "ms": 4, "markevery": 3} if overhead == measured else {}
            look |= {"color": CYCLE[index % len(CYCLE)], "ls": STYLES[index % len(STYLES)]}
            axis.plot(part.workers, part.speedup, label=said, **look)
        axis.set(title=title, xscale="log", yscale="log", xlabel="W: workers")
        axis.set_xlim(0.9 * ends[0], 1.1 * ends[1])
        for set_ticks in (axis.set_xticks, axis.set_yticks):
            shown = [tick for tick in TICKS if tick <= ends[1]]
            set_ticks(shown, [f"{tick}" for tick in shown])
        axis.minorticks_off()
    low = min(frame.speedup.min() for frame in panels.values())
    high = max(frame.workers.max() for frame in panels.values())
    axes[0, 0].set_ylim(0.9 * min(1, low), 1.1 * high)
    axes[0, 0].set_ylabel("speed-up: all runs' time / the sweep's")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    return figure


def _said(seconds: float) -> str:
    if seconds == 0:
        return "no overhead"
    return f"{1000 * seconds:.3g} ms a run" if seconds < 1 else f"{seconds:.3g} s a run"
