"""The explorer of notebook 09: one β for all activations of a net, which is not trained again."""

import ipywidgets as widgets
import pandas as pd

from ..figures.own_network import QUANTITY, softened_looks
from ..figures.style import percent
from .engine import Picture, explore, measured_slider, panels


def softening_explorer(frame: pd.DataFrame) -> widgets.VBox:
    """What turning β down costs and brings: accuracy against C of the loss, and every measure as a multiple of what it
    is at the largest β. ``frame``: of :func:`measurements.own_network.softening`; moves only look it up."""
    values = frame.pivot(index=["statistics", "beta"], columns="measure", values="value")[list(QUANTITY)]
    betas = sorted(frame.beta.unique(), reverse=True)
    kinds = list(frame.statistics.unique())
    sharpest = values.loc[kinds[0]].loc[betas[0]]
    left, right = panels((10.5, 3.6), 1, 2, width_ratios=(5, 6))
    for kind, style in softened_looks(kinds, "statistics {}").items():
        left.plot(values.loc[kind].curvature, values.loc[kind].accuracy, **style, ms=4)
    (ring,) = left.plot([], [], "o", ms=15, mfc="none", mec="black", mew=2)
    left.set(xscale="log", ylim=(-0.03, 1.03), xlabel=QUANTITY["curvature"], ylabel="accuracy", title="every β")
    percent(left)
    left.legend(fontsize=8, loc="lower right")
    ratios = values / sharpest
    (dots,) = right.plot([], [], "o", color="black", ms=9)
    right.axvline(1, color="0.5", ls="--", lw=1.2)
    right.set(xscale="log", xlim=(ratios.min().min() / 1.3, ratios.max().max() * 1.3), ylim=(len(QUANTITY) - 0.5, -0.5))
    right.set_yticks(range(len(QUANTITY)), [name.partition(" (")[0] for name in QUANTITY.values()], fontsize=8)
    right.set(title=f"this β: multiple of what it is at β = {betas[0]:g}")
    picture = Picture([ring, dots])

    def update(statistics: str, beta: float) -> str:
        net = values.loc[statistics].loc[beta]
        ring.set_data([net.curvature], [net.accuracy])
        dots.set_data(ratios.loc[statistics].loc[beta], range(len(QUANTITY)))
        return (
            f"β = {beta:g}, statistics {statistics}: accuracy <b>{net.accuracy:.1%}</b>, "
            f"<b>{net.robust_accuracy:.1%}</b> after PGD; C of the loss <b>{net.curvature:.3g}</b>, of the margin "
            f"<b>{net.margin_curvature:.3g}</b>; relative change of the gradient <b>{net.relative_change:.3g}</b>."
        )

    return explore(
        picture, update,
        statistics=widgets.Dropdown(options=kinds, description="BatchNorm statistics"),
        beta=measured_slider(betas, betas[0], "β: sharpness"),
    )  # fmt: skip
