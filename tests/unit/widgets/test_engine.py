"""A picture draws only what moves, a failing update comes out, and a cell that is run again frees what it showed."""

import base64
import gc
import io
import weakref
from types import SimpleNamespace

import ipywidgets
import numpy as np
import pytest
import torch
from ipywidgets.widgets.widget import _instances
from PIL import Image

from lcnn_utils.widgets import engine


def shown(picture: engine.Picture) -> np.ndarray:
    picture.draw()
    return np.asarray(picture.canvas.buffer_rgba())[..., :3].copy()


def counter(update=str):
    """An explorer of one number."""
    line = engine.panels((1, 1)).plot([0, 1])
    return engine.explore(engine.Picture(line), update, n=ipywidgets.IntSlider(1, 0, 3))


def test_only_what_moves_is_drawn_again():
    axis = engine.panels((2, 2))
    axis.axis("off")
    (moving,) = axis.plot([0, 1], [0, 1], "r", zorder=5)
    (still,) = axis.plot([0, 1], [1, 0], "b")
    picture = engine.Picture([moving])
    first = shown(picture)
    still.set_data([0, 1], [0.5, 0.5])
    np.testing.assert_array_equal(shown(picture), first)
    picture.draw_background()
    moving.set_data([0, 1], [0.2, 0.8])
    with_blitting = shown(picture)
    assert (with_blitting != first).any()
    moving.set_animated(False)
    picture.canvas.draw()
    everything = np.asarray(picture.canvas.buffer_rgba())[..., :3].astype(int)
    assert np.abs(everything - with_blitting).max() <= 8


@pytest.mark.parametrize("channels", [1, 3])
def test_show(channels):
    artist = engine.panels((1, 1)).imshow(np.zeros((4, 5)))
    image = torch.rand(channels, 4, 5)
    engine.show(artist, image)
    expected = image[0] if channels == 1 else image.permute(1, 2, 0)
    np.testing.assert_array_equal(artist.get_array(), expected)


def test_what_is_stored_beside_the_view():
    box = counter(lambda n: f"n = <b>{n}</b> & 2 < 3")
    bundle = box._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    pngs = base64.b64decode(bundle["image/png"]), box.children[-2].value
    stored, drawn = (np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), float) for png in pngs)
    assert np.abs(stored - drawn).mean() < 2
    assert 'alt="n = 1 &amp; 2 &lt; 3"' in bundle["text/html"]


def test_a_slider_has_round_values_and_those_asked_for():
    slider = engine.log_slider(0.3, 0.01, 100, "β", [0.1 + 0.2, 7.77])
    assert [label for label, value in slider.options if 0.8 <= value <= 2.5] == ["0.8", "1", "1.2", "1.5", "2", "2.5"]
    assert [slider.options[i][1] for i in (0, -1)] == [0.01, 100]
    slider.value = 7.77


class Model:
    """Stands for the network that an explorer holds."""


def test_a_cell_that_is_run_again_frees_what_it_showed(monkeypatch):
    """As in JupyterLab, which says which cell it runs; ``results`` holds the boxes as IPython's Out does."""
    request: dict = {}
    results = []
    models = []

    def run_cell(cell: str, run: str) -> None:
        request.update(metadata={"cellId": cell}, header={"msg_id": run})
        for _ in range(2):
            model = Model()
            models.append(weakref.ref(model))
            results.append(counter(lambda n, model=model: f"{n} {model}"))

    monkeypatch.setattr(engine, "SHOWN", {})
    monkeypatch.setattr(engine, "get_ipython", lambda: SimpleNamespace(get_parent=lambda: request))
    alive, registered = [], []
    for cell, run in (("a", "1"), ("b", "2"), ("a", "3"), ("a", "4")):
        run_cell(cell, run)
        gc.collect()
        alive.append([model() is not None for model in models])
        registered.append(len(_instances))
    assert alive[1] == [True] * 4, "two explorers a cell, and two cells"
    assert alive[3] == [False, False, True, True, False, False, True, True]
    assert registered[3] == registered[2], "nor do layouts and styles pile up"
    results[-1].children[0].value = 3
    assert results[-1].children[-1].value.startswith("3")
