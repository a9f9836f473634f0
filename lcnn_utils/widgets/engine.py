"""Interactive figures: plain computations drawn into one reused figure, behind keyboard-usable sliders."""

import io
import threading
from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets as widgets
import numpy as np
from IPython import get_ipython
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from PIL import Image
from torch import Tensor

DRAWING = threading.RLock()  # JupyterLab runs callbacks in threads: one at a time, and again from within itself
SHOWN: dict[str, tuple[str, list[widgets.Box]]] = {}  # by cell: its last run, and the boxes which that run showed


def panels(size: tuple[float, float], *shape: int, **options: Any) -> Any:
    """The axes of a new figure of ``size`` inches: one, or an array of them. Takes what ``Figure.subplots`` takes."""
    return Figure(figsize=size, dpi=90, layout="constrained").subplots(*shape, **options)


class Picture:
    """A figure shown as a PNG widget. Only its ``moving`` artists are drawn again, over a stored background."""

    def __init__(self, moving: Sequence[Any]) -> None:
        self.moving = moving
        for artist in moving:
            artist.set_animated(True)
        figure = moving[0].figure
        self.canvas = FigureCanvasAgg(figure)
        self.canvas.draw()  # lays the figure out, once
        figure.set_layout_engine("none")
        width = int(figure.get_figwidth() * figure.dpi)
        self.image = widgets.Image(format="png", layout={"width": f"{width}px", "max_width": "100%"})
        self.draw_background()

    def draw_background(self) -> None:
        """Draw what stands still: needed again when axis limits or titles changed."""
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
    changed()
    box = widgets.VBox([*controls.values(), picture.image, text])
    close_predecessors(box)
    return box


def close_predecessors(box: widgets.Box) -> None:
    """Close what an earlier run of the same cell showed before ``box``.

    ipywidgets keeps every widget that was not closed, and a control keeps its explorer's models. Front ends that don't
    say which cell they run (they send no ``cellId``) keep them all.
    """
    shell = get_ipython()
    request = shell.get_parent() if hasattr(shell, "get_parent") else {}
    cell = request.get("metadata", {}).get("cellId")
    if cell is None:
        return
    run = request["header"]["msg_id"]
    last_run, boxes = SHOWN.get(cell, (run, []))
    if last_run != run:
        for old in boxes:
            children, old.children = old.children, ()  # IPython's Out may still hold the box
            for widget in (*children, old):
                for part in (getattr(widget, "style", None), widget.layout):
                    if isinstance(part, widgets.Widget):
                        part.close()
                widget.close()
        boxes = []
    SHOWN[cell] = (run, [*boxes, box])


def log_slider(value: float, powers: tuple[float, float], description: str) -> widgets.FloatLogSlider:
    """A slider from one power of ten to another, on a logarithmic scale, 20 steps to a factor of ten."""
    slider = widgets.FloatLogSlider(value, base=10, min=powers[0], max=powers[1], step=0.05, description=description)
    slider.readout_format = ".4g"
    return slider


def beta_slider(value: float) -> widgets.FloatLogSlider:
    """The one β slider: 0.01 to 1000."""
    return log_slider(value, (-2, 3), "β: sharpness")


def measured_slider(values: Sequence[float], value: float, description: str) -> widgets.SelectionSlider:
    """A slider over the ``values`` that were measured, and nothing between them."""
    options = [(f"{measured:.3g}", measured) for measured in values]
    return widgets.SelectionSlider(options=options, value=value, description=description)


def show(artist: AxesImage, image: Tensor) -> None:
    """Draw an image (C, H, W) with one channel or three."""
    artist.set_data(image.detach().cpu().permute(1, 2, 0).numpy())
