"""The figures of notebook 01: each takes a tidy frame of ``measurements.softplus`` and returns a Figure."""

from __future__ import annotations

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from .style import ACTIVATION, CYCLE


def activations(frame: pd.DataFrame) -> Figure:
    """Value, slope and curvature of activations. ``frame``: columns x, activation, beta, value, slope, curvature."""
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.2))
    for (activation, beta), part in frame.groupby(["activation", "beta"], dropna=False, sort=False):
        name, colour, style = ACTIVATION[str(activation)]
        label = name if beta != beta else f"{name}, β = {beta:g}"
        for axis, column in zip(axes, ("value", "slope", "curvature"), strict=True):
            axis.plot(part.x, part[column], style, color=colour, label=label)
    for axis, name in zip(axes, ("value φ(x)", "slope φ′(x)", "curvature φ″(x)"), strict=True):
        axis.set(xlabel="input x", ylabel=name)
    axes[0].legend(fontsize=8)
    return figure


def figure_1c(frame: pd.DataFrame) -> Figure:
    """The paper's Figure 1(c): softplus and centered softplus for several β. Columns as in :func:`activations`."""
    figure, axes = plt.subplots(1, 2, figsize=(8.6, 3.4), sharex=True, sharey=True)
    betas = sorted(frame.beta.dropna().unique())
    shades = plt.colormaps["viridis"](np.linspace(0, 0.85, len(betas)))  # without its palest end
    relu = frame[frame.activation == "relu"]
    for axis, name in zip(axes, ("softplus", "centered"), strict=True):
        for beta, shade in zip(betas, shades, strict=True):
            part = frame[(frame.activation == name) & (frame.beta == beta)]
            axis.plot(part.x, part.value, color=shade, label=f"β = {beta:g}")
        axis.plot(relu.x, relu.value, "k:", label="ReLU (β → ∞)")
        axis.plot(relu.x, relu.x / 2, color="0.5", linestyle="-.", linewidth=1.2, label="x/2")
        axis.set(xlabel="input x", ylabel="output", title=ACTIVATION[name][0])
    axes[0].set_ylim(relu.x.min() / 2 - 0.3, relu.x.max() * 1.6)
    axes[1].legend(fontsize=8)
    return figure


def composition(frame: pd.DataFrame) -> Figure:
    """n-fold compositions of an activation. Columns: x, activation, beta, depth, value."""
    betas = sorted(frame.beta.unique())
    size = (3.3 * len(betas), 5.2)
    figure, axes = plt.subplots(2, len(betas), figsize=size, sharex=True, sharey="row", squeeze=False)
    depths = sorted(frame.depth.unique())
    shades = plt.colormaps["plasma"](np.linspace(0, 0.85, len(depths)))
    for row, name in zip(axes, ("softplus", "centered"), strict=True):
        for axis, beta in zip(row, betas, strict=True):
            for depth, shade in zip(depths, shades, strict=True):
                part = frame[(frame.activation == name) & (frame.beta == beta) & (frame.depth == depth)]
                axis.plot(part.x, part.value, color=shade, label=f"n = {depth}")
            axis.set_title(f"{ACTIVATION[name][0]}, β = {beta:g}")
        row[0].set_ylabel("output after n layers")
    for axis in axes[1]:
        axis.set_xlabel("input x")
    axes[0, 0].legend(fontsize=8)
    return figure


def normalised_curvature(frame: pd.DataFrame) -> Figure:
    """φ″/φ′ of centered softplus against β, at several x. Columns: x, beta, normalised."""
    figure, axis = plt.subplots(figsize=(5.4, 3.6))
    points = sorted(frame.x.unique())
    for x, shade, style in zip(points, itertools.cycle(CYCLE), itertools.cycle(("-", "--", "-.", ":")), strict=False):
        part = frame[frame.x == x]
        axis.loglog(part.beta, part.normalised, style, color=shade, label=f"x = {x:g}")
    ends = np.array([frame.beta.min(), frame.beta.max()])
    axis.loglog(ends, ends, color="0.6", linewidth=1, label="bound β")
    axis.set(xlabel="sharpness β (1/unit of x)", ylabel="s₀″/s₀′ = β(1 − σ(βx))", ylim=(1e-4, 2e3))
    axis.legend(fontsize=8)
    return figure
