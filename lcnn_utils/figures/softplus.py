"""The figures of notebook 01: each takes a tidy frame of ``measurements.softplus`` and returns a Figure.
Inputs and outputs of an activation have no unit; β is per unit of its input."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from .style import ACTIVATION, looks, series, shades


def activations(frame: pd.DataFrame) -> Figure:
    """Value, slope and curvature of activations. ``frame``: columns x, activation, beta, value, slope, curvature."""
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.2))
    columns = {"value": "value φ(x)", "slope": "slope φ′(x)", "curvature": "curvature φ″(x)"}
    for axis, (column, name) in zip(axes, columns.items(), strict=True):
        for (activation, beta), part in frame.groupby(["activation", "beta"], dropna=False, sort=False):
            label, colour, style = ACTIVATION[str(activation)]
            if activation != "relu":
                label += f", β = {beta:g}"
            axis.plot(part.x, part[column], style, color=colour, label=label)
        axis.set(xlabel="input x", ylabel=name)
    axes[0].legend()
    return figure


def figure_1c(frame: pd.DataFrame) -> Figure:
    """The paper's Figure 1(c): softplus and centered softplus for several β. Columns as in :func:`activations`."""
    figure, axes = plt.subplots(1, 2, figsize=(8.6, 3.4), sharex=True, sharey=True)
    relu = frame[frame.activation == "relu"]
    betas = shades(frame.beta.dropna(), "β = {:g}")
    for axis, name in zip(axes, ("softplus", "centered"), strict=True):
        series(axis, frame[frame.activation == name], "x", "value", "beta", betas)
        axis.plot(relu.x, relu.value, "k:", label="ReLU (β → ∞)")
        axis.plot(relu.x, relu.x / 2, color="0.5", linestyle="-.", linewidth=1.2, label="x/2")
        axis.set(xlabel="input x", ylabel="output", title=ACTIVATION[name][0])
    axes[0].set_ylim(relu.x.min() / 2 - 0.3, relu.x.max() * 1.6)
    axes[1].legend()
    return figure


def composition(frame: pd.DataFrame) -> Figure:
    """n-fold compositions of an activation. Columns: x, activation, beta, depth, value."""
    betas = sorted(frame.beta.unique())
    size = (3.3 * len(betas), 5.2)
    figure, axes = plt.subplots(2, len(betas), figsize=size, sharex=True, sharey="row", squeeze=False)
    depths = shades(frame.depth, "n = {}")
    for row, name in zip(axes, ("softplus", "centered"), strict=True):
        for axis, beta in zip(row, betas, strict=True):
            series(axis, frame[(frame.activation == name) & (frame.beta == beta)], "x", "value", "depth", depths)
            axis.set_title(f"{ACTIVATION[name][0]}, β = {beta:g}")
        row[0].set_ylabel("output after n layers")
    for axis in axes[1]:
        axis.set_xlabel("input x")
    axes[0, 0].legend()
    return figure


def normalised_curvature(frame: pd.DataFrame) -> Figure:
    """φ″/φ′ of centered softplus against β, at several x. Columns: x, beta, normalised."""
    figure, axis = plt.subplots(figsize=(5.4, 3.6))
    series(axis, frame, "beta", "normalised", "x", looks(frame.x.unique(), "x = {:g}"), marker="")
    ends = [frame.beta.min(), frame.beta.max()]
    axis.plot(ends, ends, color="0.6", linewidth=1, label="bound β")
    axis.set(xlabel="sharpness β (1/unit of x)", ylabel="s₀″/s₀′ = β(1 − σ(βx))")
    axis.set(xscale="log", yscale="log", ylim=(1e-4, 2e3))
    axis.legend()
    return figure
