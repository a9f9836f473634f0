"""The figures of notebook 09: each takes a tidy frame of ``measurements.own_network`` and returns a Figure."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from .style import error_bars, legend_below, log_axis, look, looks, percent, series

QUANTITY = {  # of ``measurements.own_network.qualities``
    "accuracy": "accuracy",
    "robust": "accuracy left by PGD",
    "change": "relative change of the gradient",
    "curvature": "C of the loss (1/pixel unit)",
    "margin_curvature": "C of the margin (1/pixel unit)",
}
SHARES = ("accuracy", "robust")


def softening(frame: pd.DataFrame, reference: pd.DataFrame | None = None) -> Figure:
    """Every quantity against β, and accuracy against C of the loss on the way, a line for each kind of statistics.

    ``frame``: of ``measurements.own_network.softening``. ``reference``: of ``qualities``, of other nets, with a column
    label (of a method): dashed lines with their interval as a band (none where the value is 0), and points.
    """
    figure, axes = plt.subplots(2, 3, figsize=(11, 6.4))
    panels, trade = dict(zip(QUANTITY, axes.flat, strict=False)), axes[1, 2]
    styles = looks(frame.statistics.unique(), "softened, statistics {}")
    for quantity, axis in panels.items():
        series(axis, frame[frame.quantity == quantity], "beta", "value", "statistics", styles, markersize=4)
        axis.set(xlabel="sharpness β", ylabel=QUANTITY[quantity])
        log_axis(axis)
    for statistics, part in frame.groupby("statistics", sort=False):
        path = part.pivot(index="beta", columns="quantity", values="value")
        trade.plot(path.curvature, path.accuracy, **styles[statistics], markersize=4)
    if reference is not None:
        for label, part in reference.groupby("label", sort=False):
            style, values = look(str(label)), part.set_index("quantity")
            for quantity, axis in panels.items():
                value, low, high = values.loc[quantity, ["value", "low", "high"]].to_numpy(float)
                if value > 0:
                    axis.axhline(value, color=style["color"], linestyle="--", linewidth=1.5)
                    axis.axhspan(low, high, color=style["color"], alpha=0.15, linewidth=0)
            x, y = values.loc[["curvature"]], values.loc[["accuracy"]]
            errors = dict(xerr=error_bars(x.value, x.low, x.high), yerr=error_bars(y.value, y.low, y.high))
            trade.errorbar(x.value, y.value, **errors, linestyle="none", markersize=8, **style)
    trade.set(xlabel=QUANTITY["curvature"], ylabel=QUANTITY["accuracy"])
    for quantity, axis in [*panels.items(), ("accuracy", trade)]:
        if quantity in SHARES:
            axis.set_ylim(-0.03, 1.03)
            percent(axis)
        else:
            log_axis(axis, "y")
    log_axis(trade)
    legend_below(figure)
    return figure
