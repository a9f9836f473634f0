"""One look for all figures, what several figures draw, and the only place that saves figures and tables.

A method has the same colour and marker in every figure (seaborn's colour-blind palette); sizes are in lcnn.mplstyle.
"""

from __future__ import annotations

import io
import itertools
import json
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter

from .. import __version__
from ..files import PROJECT, atomic_path
from ..lab import LABEL

LOOK = {  # method: (colour, marker)
    "standard": ("#0173b2", "o"),
    "lcnn": ("#de8f05", "s"),
    "gradreg": ("#029e73", "^"),
    "lcnn_gradreg": ("#d55e00", "D"),
    "cure": ("#cc78bc", "v"),
    "softplus_wd": ("#ca9161", "P"),
    "adversarial": ("#949494", "X"),
    "minimal": ("#56b4e9", "*"),
    "relu": ("#000000", "h"),
    "relu_reading": ("#4d4d4d", "d"),
}
METHOD = {method: (LABEL[method], *look) for method, look in LOOK.items()}  # (label, colour, marker)
BY_LABEL = {look[0]: look for look in METHOD.values()}
ACTIVATION = {  # name: (label, colour, line style)
    "relu": ("ReLU", "#000000", ":"),
    "centered": ("centered softplus s₀", "#de8f05", "-"),
    "softplus": ("softplus", "#cc78bc", "--"),  # drawn last: it has the slope and curvature of the centered one
}
VARIANTS = (("#0173b2", "o"), ("#de8f05", "s"), ("#7a4b00", "D"), ("#595959", "v"))  # Standard, LCNN, more λ, linear
CYCLE = ("#332288", "#44aa99", "#999933", "#882255", "#aa4499", "#88ccee")  # P. Tol's muted: for what is no method
MARKS = "o^vXsD"
CURVATURE_MAP = "viridis"  # even in lightness, readable without colour vision
CLASS_COLOURS = ("#56b4e9", "#ca9161")  # not those of Standard and LCNN


def look(method: str) -> dict[str, Any]:
    """Label, colour and marker of a method, by its name or its label: options of ``plot`` and ``errorbar``."""
    label, colour, marker = (METHOD | BY_LABEL)[method]
    return dict(label=label, color=colour, marker=marker)


def looks(names: Iterable[Any], label: str = "{}") -> dict[Any, dict[str, Any]]:
    """A look for each of ``names`` that are no methods, in colours of no method. ``label``: with {} for the name."""
    cycles = zip(names, itertools.cycle(CYCLE), itertools.cycle(MARKS), itertools.cycle(("-", "--", "-.", ":")))
    return {
        name: dict(label=label.format(name), color=colour, marker=marker, linestyle=style)
        for name, colour, marker, style in cycles
    }


def shades(values: Iterable[float], label: str = "{:g}") -> dict[float, dict[str, Any]]:
    """A colour for each value of a quantity, from dark to bright, as options of ``plot``."""
    ordered = sorted(set(values))
    colours = plt.colormaps["viridis"](np.linspace(0, 0.85, len(ordered)))  # without its palest end
    return {value: dict(label=label.format(value), color=tuple(c)) for value, c in zip(ordered, colours, strict=True)}


def series(
    axis: Axes, frame: pd.DataFrame, x: str, y: str, by: str, known: Mapping[Any, Any] | None = None, **style: Any
) -> None:
    """A line for each group of ``frame``, with error bars where it has columns low and high.
    ``by``: column of the groups. ``known``: group → its look (default: that of a method). ``style``: what all share."""
    for name, part in frame.groupby(by, sort=False):
        options: dict[str, Any] = (known[name] if known else look(str(name))) | style
        if {"low", "high"} <= set(part):
            axis.errorbar(part[x], part[y], error_bars(part[y], part.low, part.high), **options)
        else:
            axis.plot(part[x], part[y], **options)


def error_bars(middle: pd.Series, low: pd.Series, high: pd.Series) -> np.ndarray:
    """Lengths (2, n) of error bars that reach from low to high."""
    return np.array([middle - low, high - middle]).clip(0)


def accuracy_points(axis: Axes, runs: pd.DataFrame, x: str, by: str) -> None:
    """Test accuracy against x, a point for each method: means over runs, ± their standard deviations."""
    for name, part in runs.groupby(by, sort=False):
        mean, deviation = part[[x, "accuracy"]].mean(), part[[x, "accuracy"]].std()
        errors = dict(xerr=deviation[x], yerr=deviation.accuracy)
        axis.errorbar(mean[x], mean.accuracy, **errors, linestyle="none", markersize=8, **look(str(name)))
    axis.set_ylabel("test accuracy")
    percent(axis)


def medians(axis: Axes, frame: pd.DataFrame, x: str, y: str, by: str, middle: int = 80) -> None:
    """The median of each group against x, in a band that holds the ``middle`` so many per cent of its values."""
    import seaborn as sns  # here only: it takes seconds to import

    palette = dict(zip(frame[by].unique(), CYCLE, strict=False))
    sns.lineplot(
        frame, x=x, y=y, hue=by, style=by, palette=palette, markers=True, dashes=False,
        estimator="median", errorbar=("pi", middle), ax=axis,
    )  # fmt: skip
    axis.legend(title=f"median, middle {middle} %" if middle < 100 else "median and range")


def percent(axis: Axes) -> None:
    """Write the shares on a y axis, from 0 to 1, as per cent."""
    axis.yaxis.set_major_formatter(PercentFormatter(1))


def log_axis(axis: Axes, which: str = "x") -> None:
    """Make the x or y axis logarithmic, its ticks plain numbers: 1, 2, 5, 10 …, or powers of ten over many decades.
    To be called when all is drawn."""
    axis.set(**{f"{which}scale": "log"})
    low, high = axis.get_xlim() if which == "x" else axis.get_ylim()
    line = axis.xaxis if which == "x" else axis.yaxis
    line.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    line.set_major_formatter("{x:g}")
    line.set_minor_locator(NullLocator())


def legend_beside(axis: Axes, title: str | None = None) -> None:
    """The legend of an axis, right of it."""
    axis.legend(title=title, loc="center left", bbox_to_anchor=(1, 0.5))


def legend_below(figure: Figure, columns: int = 4) -> None:
    """One legend of all panels below them, each label once."""
    handles: dict[str, Any] = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=columns)


def decision_regions(axis: Axes, field: pd.DataFrame) -> None:
    """Where each of two classes wins. ``field``: columns x1, x2 (a full grid), margin (of class 1)."""
    margin = field.pivot(index="x2", columns="x1", values="margin")
    axis.contourf(margin.columns, margin.index, margin, [-1e9, 0, 1e9], colors=CLASS_COLOURS, alpha=0.25)
    axis.grid(False)


def class_points(axis: Axes, points: pd.DataFrame, **style: Any) -> None:
    """Points of two classes. ``points``: columns x1, x2, label (0 or 1)."""
    for label, colour, marker in zip((0, 1), CLASS_COLOURS, "o^", strict=True):
        part = points[points.label == label]
        axis.plot(part.x1, part.x2, marker, color=colour, label=f"class {label}", **style)


def save(figure: Figure, name: str, provenance: dict[str, object], folder: Path | None = None) -> list[Path]:
    """Write ``name``.png, .svg and .json (what produced it) into ``figures/`` (OSError: it cannot be written)."""
    contents = {}
    for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):  # the same bytes every time
        picture = io.BytesIO()
        figure.savefig(picture, format=suffix, metadata=metadata)
        contents[suffix] = picture.getvalue()
    plt.close(figure)
    return _write(name, contents, provenance, folder)


def save_table(frame: pd.DataFrame, name: str, provenance: dict[str, object], folder: Path | None = None) -> list[Path]:
    """Write ``name``.csv, .md and .json (what produced it) into ``figures/`` (OSError: it cannot be written)."""
    texts = {"csv": frame.to_csv(index=False), "md": markdown(frame)}
    contents = {suffix: text.encode() for suffix, text in texts.items()}
    return _write(name, contents, provenance, folder)


def _write(name: str, contents: dict[str, bytes], provenance: dict[str, object], folder: Path | None) -> list[Path]:
    """Replace the files of a figure or table, once all of them are made; provenance goes into ``name``.json."""
    import torch  # here only: it takes seconds to import

    versions = {"lcnn_utils": __version__, "torch": torch.__version__, "matplotlib": matplotlib.__version__}
    hardware = f"{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}"  # decides the last digits
    record = provenance | {"versions": versions | {"python": platform.python_version()}, "hardware": hardware}
    contents["json"] = (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode()
    paths = []
    for suffix, content in contents.items():
        path = (folder or PROJECT / "figures") / f"{name}.{suffix}"
        with atomic_path(path, "choose another folder") as temporary:
            temporary.write_bytes(content)
        paths.append(path)
    return paths


def markdown(frame: pd.DataFrame) -> str:
    """A frame as a markdown table."""
    rows = [list(map(str, frame.columns)), ["---"] * frame.shape[1], *frame.astype(str).to_numpy().tolist()]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows) + "\n"
