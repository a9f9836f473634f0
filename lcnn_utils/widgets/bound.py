"""The explorer of notebook 03: one layer's part in the bound, and in the truth."""

from __future__ import annotations

import ipywidgets as widgets
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor, nn

from ..curvature import layer_terms
from ..figures.style import CYCLE
from ..measurements.bound import layer_numbers, slope_scaled
from .engine import Picture, beta_slider, explore, log_slider

SLOPES = (0.2, 5.0)  # ends of the slope's slider


def layer_explorer(model: nn.Module, x: Tensor, y: Tensor) -> widgets.VBox:
    """Set one layer's β and the slope before it: the layers' shares of bound (B), and the bound beside the truth.
    ``model``: an LCNN made of a sequence of layers (``mlp``); it is not changed. ``x, y``: points (n, d) with few
    inputs d, and labels (n,), on which (A), the truth and accuracy are measured."""
    trained = layer_terms(model, input_shape=x.shape[1:])
    trained = trained[trained.beta.notna()].set_index("layer")
    before = layer_numbers(model, x, y)
    called = {str(i): name for i, name in enumerate(trained.index, 1)}  # activations by number, from input to output
    figure = Figure(figsize=(9.5, 3.4), dpi=90, layout="constrained")
    left, right = figure.subplots(1, 2)
    at, names = np.arange(len(trained)), ["bound", "local", "truth"]
    left.bar(at - 0.2, trained.contribution, 0.38, color="0.75", label="as trained")
    bars = list(left.bar(at + 0.2, trained.contribution, 0.38, color=CYCLE[1], label="now"))
    left.set(yscale="log", ylabel="contribution to (B)", xlabel="activation, from input to output")
    low, high = SLOPES[0] ** 2 * 0.01 / trained.beta.max(), SLOPES[1] ** 2 * 1000 / trained.beta.min()  # sliders' ends
    bottom, least = trained.contribution.min() * low / 2, max(before["truth"], 1e-6) / 1e4
    left.set_ylim(bottom, trained.contribution.sum() * high * 2)
    left.set_xticks(at, list(called))
    left.legend(fontsize=8, loc="upper left")
    right.plot([before[name] for name in names], range(3), "o", color="0.6", ms=11, mfc="none", label="as trained")
    dots = right.plot([before[name] for name in names], range(3), "D", color=CYCLE[1], label="now")
    right.set_yticks(range(3), ["(B), at every x", "largest (A)", "largest ‖∇²m‖"])
    right.set(xscale="log", xlim=(least, max(before["bound"], before["local"]) * high * 2), ylim=(-0.6, 2.6))
    right.set_xlabel("curvature of the margin (1/unit of x²)")
    right.legend(fontsize=8, loc="upper right")
    picture = Picture(figure, bars + dots)

    def update(activation: str, beta: float, slope: float) -> str:
        layer = called[activation]
        changed = slope_scaled(model, layer, beta, slope)
        terms = layer_terms(changed, input_shape=x.shape[1:]).set_index("layer").contribution[trained.index]
        numbers = layer_numbers(changed, x, y)
        for bar, value in zip(bars, terms, strict=True):
            bar.set_height(max(value, bottom))
        for bar, name in zip(bars, trained.index, strict=True):
            bar.set(edgecolor="k", linewidth=2 if name == layer else 0)
        dots[0].set_xdata([max(numbers[name], least) for name in names])
        times = numbers["bound"] / numbers["truth"] if numbers["truth"] else float("inf")
        return (
            f"Activation {activation}: <b>{terms[layer] / terms.sum():.0%}</b> of the bound {numbers['bound']:.3g} "
            f"(as trained {before['bound']:.3g}), which is <b>{times:.3g}</b> times the "
            f"largest ‖∇²m‖ of the points, {numbers['truth']:.3g}. Accuracy on them <b>{numbers['accuracy']:.1%}</b>."
        )

    number = widgets.Dropdown(options=list(called), description="activation")
    beta = beta_slider(trained.beta.iloc[0])
    slope = log_slider(1, SLOPES, "slope before it, times", step=0.05)

    def as_trained(change: dict) -> None:
        beta.value, slope.value = trained.beta[called[change["new"]]], 1.0

    number.observe(as_trained, "value")
    return explore(picture, update, activation=number, beta=beta, slope=slope)
