"""The explorer of notebook 04: the slope limit γ of a trained net's BatchNorms."""

import ipywidgets as widgets
import pandas as pd

from ..figures.style import CYCLE, METHOD
from .engine import Picture, explore, measured_slider, panels


def gamma_explorer(frame: pd.DataFrame) -> widgets.VBox:
    """Slopes, accuracy and curvature of trained nets when every γ is set by hand, to one of those that were measured.
    ``frame``: of :func:`measurements.lipschitz.gamma_frame`."""
    gammas = sorted(frame.gamma.unique())
    layers = list(frame.layer.unique())
    lowest_slope, highest_slope = frame.slope.min() / 2, frame.slope.max() * 2
    left, right = panels((10.5, 3.7), 1, 2, width_ratios=(5, 6))
    bars = [left.plot([i, i], [1, 1], lw=10, solid_capstyle="butt", color=CYCLE[0])[0] for i in range(len(layers))]
    limit = left.axhline(1, color="black", ls="--", lw=1.5, label="γ")
    left.set(yscale="log", ylim=(lowest_slope, highest_slope), xlim=(-0.7, len(layers) - 0.3))
    left.set(title="largest slope of each BatchNorm", ylabel="slope")
    left.set_xticks(range(len(layers)), layers, rotation=60, ha="right", fontsize=8)
    left.legend(fontsize=8, loc="upper right")
    twin = right.twinx()
    (accuracies,) = right.plot([], [], "o-", color=CYCLE[2])
    (curvatures,) = twin.plot([], [], "D--", color=CYCLE[4])
    chosen_gamma = right.axvline(1, color="black", ls="--", lw=1.5)
    right.set(title="the whole net", xlabel="γ", ylabel="test accuracy (%), circles")
    right.set(xscale="log", xlim=(gammas[0] / 1.2, gammas[-1] * 1.2), ylim=(-5, 105))
    right.set_xticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    twin.set(yscale="log", ylim=(frame.curvature.min() / 2, frame.curvature.max() * 2))
    twin.set_ylabel("C (1/pixel unit), diamonds")
    twin.grid(False)
    picture = Picture([*bars, limit, accuracies, curvatures, chosen_gamma])

    def update(method: str, statistics: str, gamma: float) -> str:
        part = frame[(frame.method == method) & (frame.statistics == statistics)]
        curve = part.groupby("gamma")[["accuracy", "curvature", "grad_norm"]].first()
        slopes = part[part.gamma == gamma].set_index("layer").slope[layers]
        for bar, slope in zip(bars, slopes, strict=True):
            bar.set_ydata([lowest_slope, slope])
        limit.set_ydata([gamma, gamma])
        chosen_gamma.set_xdata([gamma, gamma])
        accuracies.set_data(curve.index, 100 * curve.accuracy)
        curvatures.set_data(curve.index, curve.curvature)
        net = curve.loc[gamma]
        cut = (slopes >= gamma * (1 - 1e-4)).sum()
        return (
            f"{METHOD[method][0]}, every γ = {gamma:.3g}, which cuts off slopes in <b>{cut}</b> of {len(layers)} "
            f"layers: test accuracy <b>{net.accuracy:.1%}</b>, median C <b>{net.curvature:.3g}</b>, "
            f"median ‖∇f‖ <b>{net.grad_norm:.3g}</b>."
        )

    methods = [(METHOD[method][0], method) for method in frame.method.unique()]
    return explore(
        picture, update,
        method=widgets.Dropdown(options=methods, description="trained net"),
        statistics=widgets.Dropdown(options=list(frame.statistics.unique()), description="BatchNorm statistics"),
        gamma=measured_slider(gammas, gammas[-1], "γ: largest slope"),
    )  # fmt: skip
