"""Interactive figures: plain computations drawn into one reused figure, behind keyboard-usable sliders.

Every control is made by ``explore``, which keeps it in ``CONTROLS`` with the picture it redraws, so that a test can
move each one to its ends: Jupyter swallows what a widget callback raises.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Sequence

import ipywidgets as widgets
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from PIL import Image
from torch import Tensor

DRAWING = threading.RLock()  # JupyterLab runs callbacks in threads: one at a time, and again from within itself
CONTROLS: list[tuple[widgets.ValueWidget, widgets.Image]] = []


class Picture:
    """A figure shown as a PNG widget. Only ``moving`` artists are drawn anew, over a stored background."""

    def __init__(self, figure: Figure, moving: Sequence) -> None:
        self.canvas, self.moving = FigureCanvasAgg(figure), moving
        for artist in moving:
            artist.set_animated(True)
        self.canvas.draw()  # lays the figure out, once
        figure.set_layout_engine("none")
        width = int(figure.get_figwidth() * figure.dpi)
        self.image = widgets.Image(format="png", layout={"width": f"{width}px", "max_width": "100%"})
        self.frame()

    def frame(self) -> None:
        """Draw what stands still: needed when axis limits or titles changed."""
        self.canvas.draw()
        self.background = self.canvas.copy_from_bbox(self.canvas.figure.bbox)

    def draw(self) -> None:
        self.canvas.restore_region(self.background)
        for artist in self.moving:
            artist.axes.draw_artist(artist)
        buffer = io.BytesIO()
        Image.fromarray(np.asarray(self.canvas.buffer_rgba())[..., :3]).save(buffer, "png", compress_level=1)
        self.image.value = buffer.getvalue()


def explore(picture: Picture, update: Callable[..., str], **controls: widgets.ValueWidget) -> widgets.VBox:
    """Controls above a picture above a line of text; ``update(**values)`` changes the artists and returns the text."""
    text = widgets.HTML()

    def changed(_=None) -> None:
        with DRAWING:
            text.value = update(**{name: control.value for name, control in controls.items()})
            picture.draw()

    for control in controls.values():
        control.style.description_width = "11em"
        control.layout.width = "34em"
        control.observe(changed, "value")
        CONTROLS.append((control, picture.image))
    changed()
    return widgets.VBox([*controls.values(), picture.image, text])


def log_slider(
    value: float, ends: tuple[float, float], description: str, *, step: float = 0.1, digits: int = 3
) -> widgets.FloatLogSlider:
    """A slider of the numbers between ``ends`` on a logarithmic scale; ``step`` is in powers of ten."""
    low, high = np.log10(ends)
    look = dict(description=description, readout_format=f".{digits}g")
    return widgets.FloatLogSlider(value, base=10, min=low, max=high, step=step, **look)


def measured_slider(values: np.ndarray, value: float, description: str) -> widgets.FloatLogSlider:
    """A slider over sorted ``values`` > 0, evenly spaced on a logarithmic axis; see :func:`nearest`."""
    step = np.log10(values[-1] / values[0]) / max(len(values) - 1, 1)
    return log_slider(value, (values[0], values[-1]), description, step=step)


def nearest(values: np.ndarray, value: float) -> float:
    """Of ``values`` > 0 the one whose logarithm is nearest."""
    return values[np.abs(np.log(values / value)).argmin()]


def blank(shape: Sequence[int]) -> np.ndarray:
    """A black image for images (C, H, W), as :func:`show` fills it: (H, W) or (H, W, 3)."""
    return np.zeros(shape[1:] if shape[0] == 1 else (*shape[1:], 3))


def show(artist: AxesImage, image: Tensor) -> None:
    """Draw an image (C, H, W) with one channel or three."""
    values = image.detach().cpu()
    artist.set_data(values[0].numpy() if len(values) == 1 else values.permute(1, 2, 0).numpy())


def beta_slider(value: float = 5.0) -> widgets.FloatLogSlider:
    """The one β slider: logarithmic, 0.01 to 1000."""
    return log_slider(value, (0.01, 1000), "β: sharpness", step=0.05, digits=4)
