"""Interactive figures: plain computations drawn into one reused figure, behind keyboard-usable sliders."""

import base64
import html
import io
import math
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import numpy as np
from IPython import get_ipython
from IPython.display import display
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from PIL import Image
from torch import Tensor

DRAWING = threading.RLock()  # JupyterLab runs callbacks in threads: one at a time, and again from within itself
SCRIPT = Path(__file__).with_name("explorers.js").read_text(encoding="utf-8")
SHOWN: dict[str, tuple[str, list[widgets.Box]]] = {}  # by cell: its last run, and the boxes which that run showed
ROUND = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)


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


class Explorer(widgets.VBox):
    """Controls above a picture above a line of text. A notebook stores both as they were at first, for readers without
    a running kernel; ``explorers.js`` tells screen readers what is shown."""

    def _repr_mimebundle_(self, **options: Any) -> Any:
        *_, image, text = self.children
        png = base64.b64encode(image.value).decode()
        alt = html.escape(re.sub("<.*?>", "", text.value))
        line = f"<p>{text.value} <i>Run this cell to move it.</i></p>"
        still = {"image/png": png, "text/html": f'<img src="data:image/png;base64,{png}" alt="{alt}">{line}'}
        return super()._repr_mimebundle_(**options) | still


def explore(picture: Picture, update: Callable[..., str], **controls: widgets.ValueWidget) -> Explorer:
    """Controls, a picture and a line of text; ``update(**values)`` changes the artists and returns the text."""
    text = widgets.HTML()

    def changed(_=None) -> None:
        with DRAWING:
            text.value = update(**{name: control.value for name, control in controls.items()})
            picture.draw()

    for control in controls.values():
        control.style.description_width = "11em"
        control.layout.width = "46em"
        control.observe(changed, "value")
    changed()
    box = Explorer([*controls.values(), picture.image, text])
    box.add_class("lcnn-explorer")
    close_predecessors(box)
    if get_ipython():
        display({"application/javascript": SCRIPT}, raw=True)
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


def log_slider(
    value: float, low: float, high: float, description: str, others: Iterable[float] = ()
) -> widgets.SelectionSlider:  # fmt: skip
    """A slider over round values, ten to a factor of ten, among which ``value`` and ``others`` are."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    values = [float(f"{digits}e{power}") for digits in ROUND for power in powers]
    return measured_slider(sorted({*(v for v in values if low <= v <= high), value, *others}), value, description)


def beta_slider(value: float, others: Iterable[float] = ()) -> widgets.SelectionSlider:
    """The one β slider: 0.01 to 1000."""
    return log_slider(value, 0.01, 1000, "β: sharpness", others)


def measured_slider(values: Sequence[float], value: float, description: str) -> widgets.SelectionSlider:
    """A slider over these values, and nothing between them."""
    options = [(f"{measured:.4g}", measured) for measured in values]
    slider = widgets.SelectionSlider(options=options, value=value, description=description)
    slider.add_class("lcnn-choices")
    return slider


def show(artist: AxesImage, image: Tensor) -> None:
    """Draw an image (C, H, W) with one channel or three."""
    artist.set_data(image.detach().cpu().permute(1, 2, 0).numpy())
