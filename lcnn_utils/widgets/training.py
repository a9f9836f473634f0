"""What moves in notebook 05: curves of a training as it goes on, and the explorer of λ."""

from __future__ import annotations

from collections.abc import Callable

import ipywidgets as widgets
import numpy as np
import pandas as pd
from IPython.display import display
from matplotlib.figure import Figure

from ..figures.style import METHOD
from ..figures.training import ARM, KIND
from .engine import Picture, explore, measured_slider, nearest


def live_curves(method: str, epochs: int) -> Callable[[pd.DataFrame], None]:
    """A picture under the cell that follows a training: pass what this returns to ``fit`` as ``watch``."""
    figure = Figure(figsize=(7.5, 2.3), dpi=90, layout="constrained")
    left, right = figure.subplots(1, 2)
    label, colour, marker = METHOD[method]
    axes = {"loss": left, "curvature": right}
    lines = {name: axis.plot([], [], color=colour, marker=marker, ms=4)[0] for name, axis in axes.items()}
    left.set(title=f"{label}: cross-entropy", xlabel="epoch", xlim=(0, epochs + 1), ylim=(0, 2.5))
    right.set(title="C of 16 training images", xlabel="epoch", xlim=(0, epochs + 1), yscale="log", ylim=(0.1, 300))
    picture = Picture(figure, list(lines.values()))
    shown = False

    def watch(history: pd.DataFrame) -> None:
        nonlocal shown
        for name, line in lines.items():
            line.set_data(history.epoch, history[name])
        picture.draw()
        if not shown:
            display(picture.image)
        shown = True

    return watch


def lambda_explorer(frame: pd.DataFrame, layers: pd.DataFrame) -> widgets.VBox:
    """Trained LCNNs by their λ: accuracy and C over seeds, and β and γ of every layer, beside those of λ = 0. λ snaps
    to what was trained. ``frame``: of ``runs_frame`` (``measurements.training``), runs that differ in λ_β = λ_γ.
    ``layers``: of ``lambda_layers``."""
    lams = sorted(frame.lambda_beta.unique())
    figure = Figure(figsize=(10.5, 3.3), dpi=90, layout="constrained")
    beta, gamma, plane = figure.subplots(1, 3)
    start = layers[layers.lambda_ == lams[0]]
    lines = {}
    for axis, kind, (colour, marker) in zip((beta, gamma), KIND, ARM[:2], strict=True):
        part, all_values = start[start.kind == kind], layers[layers.kind == kind].value
        axis.plot(part.layer, part.value, color="0.6", marker="o", mfc="none", label=f"λ = {lams[0]:g}")
        lines[kind] = axis.plot(part.layer, part.value, color=colour, marker=marker, label="this λ")[0]
        axis.set(title=KIND[kind], xlabel="layer, from input to output", yscale="log")
        axis.set_ylim(all_values.min() / 1.5, all_values.max() * 1.5)
        axis.legend(fontsize=8)
    means = frame.groupby("lambda_beta")[["accuracy", "curvature", "margin_curvature"]].mean()
    spread = frame.groupby("lambda_beta")[["accuracy", "curvature"]].std()
    plane.plot(means.curvature.clip(lower=1e-3), 100 * means.accuracy, "-", color="0.6", lw=1)
    plane.plot(means.curvature.clip(lower=1e-3), 100 * means.accuracy, "s", color=METHOD["lcnn"][1], ms=6)
    (here,) = plane.plot([1], [50], "o", ms=15, mfc="none", mec="black", mew=2)
    plane.set(xscale="log", ylim=(-5, 105), xlabel="C of the loss (1/pixel unit)", ylabel="test accuracy (%)")
    plane.set_title("every λ")
    picture = Picture(figure, [*lines.values(), here])

    def update(lambda_: float) -> str:
        lambda_ = nearest(priced, lambda_)
        part = layers[layers.lambda_ == lambda_]
        for kind, line in lines.items():
            values = part[part.kind == kind]
            line.set_data(values.layer, values.value)
        here.set_data([max(means.curvature[lambda_], 1e-3)], [100 * means.accuracy[lambda_]])
        seeds = len(frame[frame.lambda_beta == lambda_])
        medians = part.groupby("kind").value.median()
        more = f" ± {spread.accuracy[lambda_]:.1%}" if seeds > 1 else ""
        return (
            f"λ_β = λ_γ = {lambda_:g}, {seeds} seed{'s' * (seeds > 1)}: test accuracy "
            f"<b>{means.accuracy[lambda_]:.1%}</b>{more}, C of the loss <b>{means.curvature[lambda_]:.3g}</b>, "
            f"of the margin <b>{means.margin_curvature[lambda_]:.3g}</b>; "
            f"median β {medians.beta:.3g}, median γ {medians.gamma:.3g}."
        )

    priced = np.array([lam for lam in lams if lam > 0])
    return explore(picture, update, lambda_=measured_slider(priced, nearest(priced, 0.01), "λ: price of β and γ"))
