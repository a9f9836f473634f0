"""One look for all figures, and the only place that saves figures and tables.

A method has the same colour and marker in every figure (seaborn's colour-blind palette).
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .. import __version__
from ..lab import PROJECT, atomic_path, write_text

METHOD = {  # name: (label, colour, marker)
    "standard": ("Standard", "#0173b2", "o"),
    "lcnn": ("LCNN", "#de8f05", "s"),
    "gradreg": ("GradReg", "#029e73", "^"),
    "lcnn_gradreg": ("LCNN + GradReg", "#d55e00", "D"),
    "cure": ("CURE", "#cc78bc", "v"),
    "softplus_wd": ("Softplus + weight decay", "#ca9161", "P"),
    "adversarial": ("Adversarial training", "#949494", "X"),
    "minimal": ("Minimal recipe", "#56b4e9", "*"),
    "relu": ("ReLU, ordinary net", "#000000", "h"),
    "relu_reading": ("Standard, read as ReLU", "#4d4d4d", "d"),
}
ACTIVATION = {  # name: (label, colour, line style)
    "relu": ("ReLU", "#000000", ":"),
    "centered": ("centered softplus s₀", "#de8f05", "-"),
    "softplus": ("softplus", "#cc78bc", "--"),  # drawn last: it has the slope and curvature of the centered one
}
PALETTE = {label: colour for label, colour, _ in METHOD.values()}
MARKERS = {label: marker for label, _, marker in METHOD.values()}
VARIANTS = (("#0173b2", "o"), ("#de8f05", "s"), ("#7a4b00", "D"), ("#595959", "v"))  # Standard, LCNN, more λ, linear
CYCLE = ("#332288", "#44aa99", "#999933", "#882255", "#aa4499", "#88ccee")  # P. Tol's muted: for what is no method
CURVATURE_MAP = "viridis"  # even in lightness, readable without colour vision
CLASS_COLOURS = ("#56b4e9", "#ca9161")  # not those of Standard and LCNN
# a legend right of its panel
BESIDE: dict[str, Any] = dict(fontsize=8, title_fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
LADDER = tuple(m * 10.0**e for e in range(-4, 4) for m in (1, 2, 5))  # ticks of a logarithmic axis
LATEX_NEEDS = r"lualatex or xelatex; \usepackage{booktabs, fontspec} \setmainfont{DejaVu Sans}, which has all symbols"


def label_ticks(axes: Axes, ticks: Sequence[float], which: str = "x") -> None:
    """Just these ticks on the x or y axis, written as plain numbers, and no minor ticks on either."""
    set_ticks = axes.set_xticks if which == "x" else axes.set_yticks
    set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def save(figure: Figure, name: str, provenance: dict[str, object], folder: Path | None = None) -> list[Path]:
    """Write ``name``.png, .svg and .json (what produced it) into ``figures/`` (OSError: it cannot be written)."""
    folder = folder or PROJECT / "figures"
    paths = []
    for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):  # the same bytes every time
        path = folder / f"{name}{suffix}"
        with plt.rc_context({"svg.hashsalt": "lcnn"}), atomic_path(path, "make the folder writable") as temporary:
            figure.savefig(temporary, metadata=metadata)
        paths.append(path)
    plt.close(figure)
    return [*paths, _write_provenance(folder / f"{name}.json", provenance)]


def save_table(frame: pd.DataFrame, name: str, provenance: dict[str, object], folder: Path | None = None) -> list[Path]:
    """Write ``name``.csv, .md, .tex and .json (what produced it) into ``figures/`` (OSError: it cannot be written)."""
    folder = folder or PROJECT / "figures"
    texts = {".csv": frame.to_csv(index=False), ".md": markdown(frame), ".tex": latex(frame)}
    paths = [write_text(folder / f"{name}{suffix}", text) for suffix, text in texts.items()]
    return [*paths, _write_provenance(folder / f"{name}.json", provenance)]


def _write_provenance(path: Path, provenance: dict[str, object]) -> Path:
    import torch  # here only: it takes seconds to import

    versions = {"lcnn_utils": __version__, "torch": torch.__version__, "matplotlib": matplotlib.__version__}
    hardware = f"{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}"  # decides the last digits
    record = provenance | {"versions": versions | {"python": platform.python_version()}, "hardware": hardware}
    return write_text(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def markdown(frame: pd.DataFrame) -> str:
    """A frame as a markdown table."""
    rows = [list(map(str, frame.columns)), ["---"] * frame.shape[1], *frame.astype(str).to_numpy().tolist()]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows) + "\n"


def latex(frame: pd.DataFrame) -> str:
    """A frame as a LaTeX table, its symbols as they are: see the comment in its first line."""
    styler = frame.astype(str).style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis=1)
    columns = "l" + "r" * (frame.shape[1] - 1)
    return f"% {LATEX_NEEDS}\n{styler.to_latex(hrules=True, column_format=columns)}"
