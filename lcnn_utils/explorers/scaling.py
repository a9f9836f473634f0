"""What moves in notebook 05's last section: how many workers pay for runs of so many seconds."""

from __future__ import annotations

from collections.abc import Sequence

import ipywidgets as widgets
from matplotlib.figure import Figure

from ..experiments.progress import duration
from ..figures.style import CYCLE
from ..studies.scaling import makespan, speedups
from . import Picture, _explore

COUNTS = tuple(sorted({round(10 ** (k / 10)) for k in range(31)}))  # workers whose speed-up is drawn


def scaling_explorer(seconds: Sequence[float], overhead: float) -> widgets.VBox:
    """Speed-up against workers, redrawn for other runs and another scheduler.

    Args:
        seconds: of the runs, in order; the slider stretches them all alike.
        overhead: seconds a run, to begin with.
    """
    runs, mean = len(seconds), sum(seconds) / len(seconds)
    figure = Figure(figsize=(7.2, 4.0), dpi=90, layout="constrained")
    axis = figure.subplots()
    axis.plot([1, 1000], [1, 1000], "--", color="0.5", lw=1, label="ideal: as many times as workers")
    (curve,) = axis.plot([], [], "-", color=CYCLE[0], label="speed-up")
    (here,) = axis.plot([], [], "o", color=CYCLE[3], ms=9, label="W")
    ticks = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
    axis.set(xscale="log", yscale="log", xlim=(0.9, 1100), ylim=(0.09, 1100))
    axis.set_xticks(ticks, [f"{tick}" for tick in ticks])
    axis.set_yticks((0.1, 0.2, 0.5, *ticks), [f"{tick:g}" for tick in (0.1, 0.2, 0.5, *ticks)])
    axis.minorticks_off()
    axis.set(xlabel="W: workers", ylabel="speed-up", title=f"{runs} runs")
    axis.legend(fontsize=8, loc="upper left")
    picture = Picture(figure, [curve, here])

    def update(workers: float, handing: float, length: float) -> str:
        lengths, cost = [length / mean * one for one in seconds], handing / 1000
        frame = speedups(lengths, COUNTS, cost)
        curve.set_data(frame.workers, frame.speedup.clip(lower=0.1))
        count, total = round(workers), sum(lengths)
        end = makespan(lengths, count, cost)
        here.set_data([count], [max(total / end, 0.1)])
        limits = {
            "the longest run": max(lengths),
            "the work itself, shared evenly": total / count,
            "the scheduler": runs * cost,
        }
        limit = max(limits, key=lambda name: limits[name])
        return (
            f"{runs} runs of {duration(length)} on {count} worker{'s' * (count > 1)}: <b>{duration(end)}</b> in place "
            f"of {duration(total)}, a speed-up of <b>{total / end:.3g}</b>; a worker is at work "
            f"<b>{total / end / count:.0%}</b> of the time. What limits it most: <b>{limit}</b>."
        )

    log = {"base": 10, "step": 0.05, "readout_format": ".3g"}
    return _explore(
        picture,
        update,
        workers=widgets.FloatLogSlider(20, min=0, max=3, description="W: workers", **log),
        handing=widgets.FloatLogSlider(1000 * overhead, min=-1, max=4, description="overhead a run (ms)", **log),
        length=widgets.FloatLogSlider(mean, min=-1, max=4, description="seconds a run, mean", **log),
    )
