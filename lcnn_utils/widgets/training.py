"""What moves in notebook 05: curves of a training as it goes on, and the explorer of λ."""

from collections.abc import Callable

import ipywidgets as widgets
import pandas as pd
from IPython.display import display
from torch import nn

from ..figures.style import METHOD
from ..figures.training import ARM, KIND
from .engine import Picture, close_predecessors, explore, measured_slider, panels


def live_curves(method: str, epochs: int) -> Callable[[pd.DataFrame, nn.Module], None]:
    """Show a picture that follows a training: pass what this returns to ``fit`` as ``watch``."""
    left, right = panels((7.5, 2.3), 1, 2)
    label, colour, marker = METHOD[method]
    (loss,) = left.plot([], [], color=colour, marker=marker, ms=4)
    (curvature,) = right.plot([], [], color=colour, marker=marker, ms=4)
    left.set(title=f"{label}: cross-entropy", xlabel="epoch", xlim=(0, epochs + 1), ylim=(0, 2.5))
    right.set(title="C of 16 training images", xlabel="epoch", xlim=(0, epochs + 1), yscale="log", ylim=(0.1, 300))
    picture = Picture([loss, curvature])
    picture.draw()
    box = widgets.VBox([picture.image])
    close_predecessors(box)
    display(box)

    def watch(history: pd.DataFrame, model: nn.Module) -> None:
        loss.set_data(history.epoch, history.loss)
        curvature.set_data(history.epoch, history.curvature)
        picture.draw()

    return watch


def lambda_explorer(frame: pd.DataFrame, layers: pd.DataFrame) -> widgets.VBox:
    """Trained LCNNs by their λ: accuracy and C over seeds, and β and γ of every layer, beside those of λ = 0.
    ``frame``: of ``runs_frame`` (``measurements.training``), runs that differ in λ_β = λ_γ. ``layers``: of
    ``trained_layers``."""
    left, middle, right = panels((10.5, 3.3), 1, 3)
    lines = {}
    for axis, kind, (colour, marker) in zip((left, middle), KIND, ARM[:2], strict=True):
        values = layers[layers.kind == kind]
        unpenalised = values[values.lambda_ == 0]
        axis.plot(unpenalised.layer, unpenalised.value, color="0.6", marker="o", mfc="none", label="λ = 0")
        (lines[kind],) = axis.plot([], [], color=colour, marker=marker, label="this λ")
        axis.set(title=KIND[kind], xlabel="layer, from input to output", yscale="log")
        axis.set(ylim=(values.value.min() / 1.5, values.value.max() * 1.5))
        axis.legend(fontsize=8)
    by_lambda = frame.groupby("lambda_beta")[["accuracy", "curvature", "margin_curvature"]]
    means, deviations = by_lambda.mean(), by_lambda.std()
    drawn = means.curvature.clip(lower=1e-3)  # a net without curvature stays on the logarithmic axis
    right.plot(drawn, 100 * means.accuracy, "-", color="0.6", lw=1)
    right.plot(drawn, 100 * means.accuracy, "s", color=METHOD["lcnn"][1], ms=6)
    (ring,) = right.plot([], [], "o", ms=15, mfc="none", mec="black", mew=2)
    right.set(xscale="log", ylim=(-5, 105), xlabel="C of the loss (1/pixel unit)", ylabel="test accuracy (%)")
    right.set_title("every λ")
    picture = Picture([*lines.values(), ring])

    def update(lambda_: float) -> str:
        part = layers[layers.lambda_ == lambda_]
        for kind, line in lines.items():
            values = part[part.kind == kind]
            line.set_data(values.layer, values.value)
        mean = means.loc[lambda_]
        ring.set_data([drawn[lambda_]], [100 * mean.accuracy])
        seeds = len(frame[frame.lambda_beta == lambda_])
        interval = f" ± {deviations.accuracy[lambda_]:.1%}" if seeds > 1 else ""
        medians = part.groupby("kind").value.median()
        return (
            f"λ_β = λ_γ = {lambda_:g}, {seeds} seed{'s' * (seeds > 1)}: test accuracy "
            f"<b>{mean.accuracy:.1%}</b>{interval}, C of the loss <b>{mean.curvature:.3g}</b>, "
            f"of the margin <b>{mean.margin_curvature:.3g}</b>; "
            f"median β <b>{medians.beta:.3g}</b>, median γ <b>{medians.gamma:.3g}</b>."
        )

    penalised = [value for value in means.index if value > 0]
    return explore(picture, update, lambda_=measured_slider(penalised, 0.01, "λ: both penalties"))
