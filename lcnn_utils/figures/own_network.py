"""The figures of notebook 09: each takes what ``measurements.own_network`` measured and returns a Figure."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .style import BY_LABEL, METHOD, error_bars, legend_below, legend_beside, log_axis, look, looks, percent, series

CURVATURE = {"curvature": "of the loss", "margin_curvature": "of the margin"}
QUANTITY = {  # of softening
    "accuracy": "accuracy",
    "robust_accuracy": "accuracy left by PGD",
    "relative_change": "relative change of the gradient",
    "curvature": "C of the loss (1/unit of x)",
    "margin_curvature": "C of the margin (1/unit of x)",
}
SHARES = ("accuracy", "robust_accuracy")
PANELS = {  # title: the measures it shows
    "left by PGD": ("robust_accuracy", "certified_accuracy"),
    "normalised curvature C, median": tuple(CURVATURE),
    "change of the gradient, median": ("relative_change",),
}
Looks = Mapping[str, Mapping[str, Any]]
WAYS = ("as it came", "fine-tuned", "softened", "from the start")  # to low curvature, each with one look


def softened_looks(statistics: Iterable[str], label: str = "softened, statistics {}") -> dict[str, dict[str, Any]]:
    """A look for each kind of statistics of the softened network: one colour, the first kind hollow and dashed."""
    hollow: dict[str, Any] = dict(linestyle="--", markerfacecolor="white")
    shared = looks(WAYS)["softened"] | dict(linestyle="-")
    return {
        kind: shared | dict(label=label.format(kind)) | (hollow if place == 0 else {})
        for place, kind in enumerate(statistics)
    }


def report(frame: pd.DataFrame) -> Figure:
    """What was measured of one network, or of several to be compared; :func:`remarks` say what could not be, and why.
    ``frame``: of ``measurements.own_network.report``; error bars are its 95 % intervals."""
    frame = frame.assign(network=frame.network.astype(str))
    names = list(frame.network.unique())
    known = looks(names) | {name: look(name) for name in names if name in METHOD or name in BY_LABEL}
    known = {name: known[name] | {"label": _label(name, frame)} for name in names}
    figure, axes = plt.subplots(1, len(PANELS), figsize=(11.4, 3.8), width_ratios=(4, 3, 4))
    for axis, draw, (title, measures) in zip(axes, (_shares, _curvature, _changes), PANELS.items(), strict=True):
        part = frame[frame.measure.isin(measures) & (frame.n > 0)]
        draw(axis, part, known)
        if (part.measure == "certified_accuracy").any():
            title += " (solid), certified (dashed)"
        if len(part):
            title += f"; n = {part.n.max()}" if part.n.nunique() == 1 else f"; n = {part.n.min()}–{part.n.max()}"
        else:
            axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center")
            axis.set(xticks=[], yticks=[])
        axis.set_title(title)
    handles = [plt.Line2D([], [], **known[name]) for name in names]
    figure.legend(handles=handles, loc="outside upper center", ncols=2)
    return figure


def softening(frame: pd.DataFrame, reference: pd.DataFrame | None = None) -> Figure:
    """Every measure against β, and accuracy against C of the loss on the way, a line for each kind of statistics.

    ``frame``: of ``measurements.own_network.softening``. ``reference``: of ``report``, of nets named by their method,
    and for the same ε: dashed lines with their interval as a band (none where the value is 0), and points.
    """
    figure, axes = plt.subplots(2, 3, figsize=(11, 6.4))
    panels, trade = dict(zip(QUANTITY, axes.flat, strict=False)), axes[1, 2]
    styles = softened_looks(frame.statistics.unique())
    for measure, axis in panels.items():
        series(axis, frame[frame.measure == measure], "beta", "value", "statistics", styles, markersize=4)
        axis.set(xlabel="sharpness β", ylabel=QUANTITY[measure])
        log_axis(axis)
    for statistics, part in frame.groupby("statistics", sort=False):
        path = part.pivot(index="beta", columns="measure", values="value")
        trade.plot(path.curvature, path.accuracy, **styles[str(statistics)], markersize=4)
    if reference is not None:
        measured = reference[(reference.n > 0) & (reference.eps != 0)]
        for name, part in measured.groupby("network", sort=False):
            style, values = look(str(name)), part.set_index("measure")
            for measure, axis in panels.items():
                value, low, high = values.loc[measure, ["value", "low", "high"]].to_numpy(float)
                if value > 0:
                    axis.axhline(value, color=style["color"], linestyle="--", linewidth=1.5)
                    axis.axhspan(low, high, color=style["color"], alpha=0.15, linewidth=0)
            x, y = values.loc[["curvature"]], values.loc[["accuracy"]]
            errors = dict(xerr=error_bars(x.value, x.low, x.high), yerr=error_bars(y.value, y.low, y.high))
            trade.errorbar(x.value, y.value, **errors, linestyle="none", markersize=8, **style)
    trade.set(xlabel=QUANTITY["curvature"], ylabel=QUANTITY["accuracy"])
    for measure, axis in [*panels.items(), ("accuracy", trade)]:
        if measure in SHARES:
            axis.set_ylim(-0.03, 1.03)
            percent(axis)
        else:
            log_axis(axis, "y")
    log_axis(trade)
    legend_below(figure)
    return figure


def ways(frame: pd.DataFrame) -> Figure:
    """Accuracy against C of the margin: a line for each way to a low curvature, a point for each of its settings.

    ``frame``: columns way; setting, a text written beside its point; accuracy with low and high; curvature with
    low_curvature and high_curvature.
    """
    figure, axis = plt.subplots(figsize=(7.6, 4.6))
    styles = looks(WAYS)
    for way, part in frame.groupby("way", sort=False):
        part = part.sort_values("curvature")
        across = error_bars(part.curvature, part.low_curvature, part.high_curvature)
        along = error_bars(part.accuracy, part.low, part.high)
        axis.errorbar(part.curvature, part.accuracy, along, across, **styles[way], elinewidth=0.8)
        paper = dict(facecolor="white", edgecolor="none", alpha=0.8, pad=0.5)
        text: dict[str, Any] = dict(textcoords="offset points", fontsize=9, color=styles[way]["color"], bbox=paper)
        for place, point in enumerate(part.itertuples()):  # above and below the marker in turn
            shift = (5, 4 if place % 2 else -12)
            axis.annotate(str(point.setting), (point.curvature, point.accuracy), shift, **text)
    axis.set(xlabel=QUANTITY["margin_curvature"], ylabel="accuracy")
    percent(axis)
    log_axis(axis)
    legend_beside(axis)
    return figure


def _label(name: str, frame: pd.DataFrame) -> str:
    """The network's name with the measures that have no panel."""
    values = frame[(frame.network == name) & (frame.n > 0)].set_index("measure").value
    label = f"{name}: accuracy {values['accuracy']:.1%}" if "accuracy" in values else name
    if "certified_radius" in values:
        label += f", median certified radius {values['certified_radius']:.2g}"
    return label


def _shares(axis: Axes, part: pd.DataFrame, known: Looks) -> None:
    hollow = dict(linestyle="--", markerfacecolor="white")
    for measure, style in (("robust_accuracy", dict(linestyle="-")), ("certified_accuracy", hollow)):
        points = _apart(part[part.measure == measure], known, 0.01 * part.eps.max())
        series(axis, points, "eps", "value", "network", known, **style)
    axis.set(xlabel="ε (L2, units of x)", ylabel="share of images", ylim=(-0.03, 1.03))
    percent(axis)


def _curvature(axis: Axes, part: pd.DataFrame, known: Looks) -> None:
    for place, measure in enumerate(CURVATURE):
        rows = part[part.measure == measure].assign(eps=place)
        for name, row in _apart(rows, known, 0.15).groupby("network", sort=False):
            style = {**known[str(name)], "linestyle": "none", "markersize": 8}
            axis.errorbar(row.eps, row.value, error_bars(row.value, row.low, row.high), **style)
    axis.set_xticks(range(len(CURVATURE)), list(CURVATURE.values()))
    axis.set(xlim=(-0.6, len(CURVATURE) - 0.4), ylabel="C (1/unit of x)")
    _wide_log(axis, part)


def _changes(axis: Axes, part: pd.DataFrame, known: Looks) -> None:
    series(axis, _apart(part, known, 0.01 * part.eps.max()), "eps", "value", "network", known, linestyle="-")
    axis.set(xlabel="length ε of a random step η (units of x)", ylabel="‖∇ℓ(x + η) − ∇ℓ(x)‖ / ‖∇ℓ(x)‖")
    _wide_log(axis, part)
    if len(part):
        log_axis(axis)


def _apart(part: pd.DataFrame, known: Looks, step: float) -> pd.DataFrame:
    """The networks' points a ``step`` beside each other, so that none is hidden."""
    place = part.network.map(list(known).index) - (len(known) - 1) / 2
    return part.assign(eps=part.eps + step * place)


def _wide_log(axis: Axes, part: pd.DataFrame) -> None:
    """A logarithmic y axis with at least three ticks."""
    positive = part[part.value > 0]
    if len(positive):
        axis.set_ylim(max(part.low.min(), positive.value.min() / 10) / 2, 2 * part.high.max())
        log_axis(axis, "y")


def remarks(frame: pd.DataFrame) -> list[str]:
    """What was not measured, and how C was: a line for each note, whichever networks and measures it is about."""
    noted = frame[(frame.n == 0) | (frame.measure.isin(CURVATURE) & (frame.note != ""))]
    lines = []
    for note, part in noted.groupby("note", sort=False):
        about = f"{', '.join(part.network.unique())}, {' and '.join(part.measure.unique())}: ".replace("_", " ")
        lines += textwrap.wrap(about + str(note), 110, subsequent_indent="   ")
    return lines
