"""The explorer of notebook 04: the slope limit γ of a trained net's BatchNorms."""

from __future__ import annotations

import ipywidgets as widgets
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ..figures.style import CYCLE, METHOD
from .engine import Picture, explore, measured_slider, nearest


def gamma_explorer(frame: pd.DataFrame) -> widgets.VBox:
    """Slopes, accuracy and curvature of trained nets when every γ is set by hand; γ snaps to those that were measured.
    ``frame``: of :func:`measurements.lipschitz.gamma_frame`, its values of γ evenly spaced on a logarithmic axis.
    """
    gammas, layers = np.sort(frame.gamma.unique()), list(frame.layer.unique())
    named = {METHOD[method][0]: method for method in frame.method.unique()}
    figure = Figure(figsize=(10.5, 3.7), dpi=90, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(5, 6))
    bars = [left.plot([i, i], [1e-3, 1], lw=10, solid_capstyle="butt", color=CYCLE[0])[0] for i in range(len(layers))]
    limit = left.axhline(1, color="black", ls="--", lw=1.5, label="γ")
    left.set(yscale="log", ylim=(frame.slope.min() / 2, 2 * frame.slope.max()), xlim=(-0.7, len(layers) - 0.3))
    left.set(title="largest slope of each BatchNorm", ylabel="slope")
    left.set_xticks(range(len(layers)), layers, rotation=60, ha="right", fontsize=7)
    left.legend(fontsize=8, loc="upper right")
    twin = right.twinx()
    (shares,) = right.plot([], [], "o-", color=CYCLE[2], label="test accuracy")
    (curves,) = twin.plot([], [], "D--", color=CYCLE[4], label="median C of the margin")
    here = right.axvline(1, color="black", ls="--", lw=1.5)
    points = [axis.plot([], [], "o", ms=13, mfc="none", mec="black", mew=2)[0] for axis in (right, twin)]
    right.set(xscale="log", ylim=(-5, 105), xlabel="γ")
    right.set(title="the whole net", ylabel="test accuracy (%), circles")
    right.set_xticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    right.set_xlim(gammas[0] / 1.2, gammas[-1] * 1.2)
    twin.set(yscale="log", ylim=(frame.curvature.min() / 2, 2 * frame.curvature.max()))
    twin.set_ylabel("C (1/pixel unit), diamonds")
    twin.grid(False)
    picture = Picture(figure, [*bars, limit, shares, curves, here, *points])
    table = frame.set_index(["method", "statistics"]).sort_index()

    def update(net: str, statistics: str, gamma: float) -> str:
        gamma = nearest(gammas, gamma)
        part = table.loc[(named[net], statistics)]
        chosen, curve = part[part.gamma == gamma], part.groupby("gamma")[["accuracy", "curvature"]].first()
        for bar, slope in zip(bars, chosen.set_index("layer").slope[layers], strict=True):
            bar.set_ydata([left.get_ylim()[0], slope])
        limit.set_ydata([gamma] * 2)
        here.set_xdata([gamma] * 2)
        shares.set_data(curve.index, 100 * curve.accuracy)
        curves.set_data(curve.index, curve.curvature)
        accuracy, curvature, grad_norm = chosen[["accuracy", "curvature", "grad_norm"]].iloc[0]
        points[0].set_data([gamma], [100 * accuracy])
        points[1].set_data([gamma], [curvature])
        cut = (chosen.slope >= gamma * (1 - 1e-4)).sum()
        return (
            f"{net}, every γ = {gamma:.3g}, which cuts off slopes in {cut} of {len(layers)} layers: test accuracy "
            f"<b>{accuracy:.1%}</b>, median C <b>{curvature:.3g}</b>, median ‖∇f‖ <b>{grad_norm:.3g}</b>."
        )

    slider = measured_slider(gammas, gammas[-1], "γ: largest slope")
    net = widgets.Dropdown(options=list(named), description="trained net")
    statistics = widgets.Dropdown(options=list(frame.statistics.unique()), description="BatchNorm statistics")
    return explore(picture, update, net=net, statistics=statistics, gamma=slider)
