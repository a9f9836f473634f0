"""The explorer of notebook 03: one layer's part in the bound, and in the truth."""

import ipywidgets as widgets
import numpy as np
from torch import Tensor, nn

from ..curvature import layer_terms
from ..figures.style import CYCLE
from ..measurements.bound import layer_numbers, slope_scaled
from .engine import Picture, beta_slider, explore, log_slider, panels

REACH = np.array([1e-6, 1e5])  # ends of the axes, times the largest number as trained
ROWS = {"bound": "(B), at every x", "local": "largest (A)", "truth": "largest ‖∇²m‖"}


def layer_explorer(model: nn.Module, x: Tensor, y: Tensor) -> widgets.VBox:
    """Set one layer's β and the slope before it: the layers' shares of bound (B), and the bound beside the truth.
    ``model``: an LCNN made of a sequence of layers (``mlp``); it is not changed. ``x, y``: points (n, d) with few
    inputs d, and labels (n,), on which (A), the truth and accuracy are measured."""
    terms = layer_terms(model, x.shape[1:]).set_index("layer")
    trained = terms[terms.beta.notna()]
    before = layer_numbers(model, x, y)
    left, right = panels((9.5, 3.4), 1, 2)
    places = np.arange(len(trained))
    left.bar(places - 0.2, trained.contribution, 0.38, color="0.75", label="as trained")
    bars = left.bar(places + 0.2, trained.contribution, 0.38, color=CYCLE[1], label="now")
    left.set(yscale="log", ylabel="contribution to (B)", xlabel="activation, from input to output")
    left.set_ylim(REACH * trained.contribution.max())
    left.set_xticks(places, places + 1)
    left.legend(fontsize=8, loc="upper left")
    numbers_before = [before[name] for name in ROWS]
    right.plot(numbers_before, range(3), "o", color="0.6", ms=11, mfc="none", label="as trained")
    (dots,) = right.plot(numbers_before, range(3), "D", color=CYCLE[1], label="now")
    right.set_yticks(range(3), list(ROWS.values()))
    right.set(xscale="log", xlabel="curvature of the margin (1/unit of x²)", ylim=(-0.6, 2.6))
    right.set_xlim(REACH * max(numbers_before))
    right.legend(fontsize=8, loc="upper right")
    picture = Picture([*bars, dots])

    def update(layer: str, beta: float, slope: float) -> str:
        changed = slope_scaled(model, layer, beta, slope)
        terms = layer_terms(changed, x.shape[1:]).set_index("layer").contribution[trained.index]
        numbers = layer_numbers(changed, x, y)
        for bar, name in zip(bars, trained.index, strict=True):
            bar.set_height(max(terms[name], left.get_ylim()[0]))
            bar.set(edgecolor="k", linewidth=2 if name == layer else 0)
        dots.set_xdata([max(numbers[name], right.get_xlim()[0]) for name in ROWS])
        times = numbers["bound"] / numbers["truth"] if numbers["truth"] else float("inf")
        return (
            f"Activation {list(trained.index).index(layer) + 1}: <b>{terms[layer] / terms.sum():.0%}</b> of the bound "
            f"<b>{numbers['bound']:.3g}</b> (as trained {before['bound']:.3g}), which is <b>{times:.3g}</b> times the "
            f"largest ‖∇²m‖ of the points, {numbers['truth']:.3g}. Accuracy on them <b>{numbers['accuracy']:.1%}</b>."
        )

    options = [(str(number), name) for number, name in enumerate(trained.index, 1)]
    layer = widgets.Dropdown(options=options, description="activation")
    beta = beta_slider(trained.beta.iloc[0], [*trained.beta, *trained.beta / 2])
    slope = log_slider(1, 0.2, 5, "slope before it, times")

    def as_trained(change: dict) -> None:
        beta.value = trained.beta[change["new"]]
        slope.value = 1

    layer.observe(as_trained, "value")
    return explore(picture, update, layer=layer, beta=beta, slope=slope)
