"""Every control moved to its ends changes the picture, the numbers beneath are right, and blitting cheats nobody."""

import copy
import io
import math
import re

import ipywidgets as widgets
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from lcnn_utils import data, explorers, studies
from lcnn_utils.figures.style import METHOD
from lcnn_utils.nn import CenteredSoftplus

RESOLUTION = 16


@pytest.fixture(autouse=True)
def seen(monkeypatch, tmp_path):
    """The pictures made by a test; ``CONTROLS`` starts empty."""
    monkeypatch.setenv("LCNN_STORE", str(tmp_path / "store"))
    pictures: list[explorers.Picture] = []

    class Seen(explorers.Picture):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            pictures.append(self)

    monkeypatch.setattr(explorers, "Picture", Seen)
    monkeypatch.setattr(explorers, "CONTROLS", [])
    return pictures


def net(seed: int, beta: float) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Linear(2, 8), CenteredSoftplus(beta), nn.Linear(8, 8), CenteredSoftplus(beta), nn.Linear(8, 2)]
    return nn.Sequential(*layers)


MODELS = {"standard": net(0, 1000.0), "lcnn": net(1, 3.0)}
POINTS = data.two_moons(200, noise=0.15, seed=3)


def estimates() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = [
        (name, k, s, 2.0 * (1 - rng.uniform() * 0.5**k), 2.0)
        for name in ("power", "Lanczos", "published")
        for k in range(1, 7)
        for s in range(4)
    ]
    return pd.DataFrame(rows, columns=["estimator", "products", "sample", "estimate", "exact"])


MAKE = {
    "beta": explorers.beta_explorer,
    "moons": lambda: explorers.moons_explorer(MODELS, *POINTS, resolution=RESOLUTION),
    "convergence": lambda: explorers.convergence_explorer(estimates()),
}
EACH = pytest.mark.parametrize("name", MAKE)


def parts(box: widgets.VBox) -> tuple[list, widgets.Image, widgets.HTML]:
    *controls, image, text = box.children
    return controls, image, text


def ends(control) -> list:
    if isinstance(control, widgets.FloatLogSlider):
        return [control.base**control.min, control.base**control.max]
    if isinstance(control, widgets.IntSlider):
        return [control.min, control.max]
    return list(control.options)


def pixels(image: widgets.Image) -> np.ndarray:
    with Image.open(io.BytesIO(image.value)) as png:
        assert png.format == "PNG"
        return np.asarray(png.convert("RGB"))


def numbers(text: widgets.HTML) -> list[str]:
    return re.findall(r"<b>(.*?)</b>", text.value)


@EACH
def test_every_control_moved_to_both_ends_changes_the_picture(name):
    controls, image, text = parts(MAKE[name]())
    assert [(control, image) for control in controls] == explorers.CONTROLS
    assert len({control.description for control in controls}) == len(controls) >= 2
    first, said = pixels(image), text.value
    assert numbers(text)
    for control, shown in explorers.CONTROLS:
        assert shown is image
        start = control.value
        values = [value for value in ends(control) if value != start]
        assert values, control.description
        for value in [*values, start]:
            before, words = image.value, text.value
            control.value = value  # outside a kernel, what a callback raises comes out here
            assert image.value != before, f"{control.description} at {value}"
            assert text.value != words or control.description.startswith("range")
            assert pixels(image).shape == first.shape
            assert "nan" not in text.value
    np.testing.assert_array_equal(pixels(image), first)
    assert text.value == said, "back at the start"


@pytest.mark.parametrize("name", ["beta", "moons"])
def test_blitting_shows_what_a_fresh_explorer_shows(name, seen):
    """By way of every end and back, against one that went straight there, and against a redraw of everything."""
    walked, straight = parts(MAKE[name]()), parts(MAKE[name]())
    for control in walked[0]:
        for value in ends(control):
            control.value = value
    for control in straight[0]:
        control.value = ends(control)[-1]
    np.testing.assert_array_equal(pixels(walked[1]), pixels(straight[1]))
    assert walked[2].value == straight[2].value
    picture = seen[0]
    for artist in picture.moving:
        artist.set_animated(False)
    picture.canvas.draw()
    full = np.asarray(picture.canvas.buffer_rgba())[..., :3].astype(int)
    # Only the order of overlapping things may differ: lines over a legend, frame or fixed line instead of under it.
    off = np.abs(full - pixels(walked[1])).max(2) > 8
    allowed = np.zeros_like(off)
    for axis in picture.canvas.figure.axes:
        boxes = [spine.get_window_extent() for spine in axis.spines.values()]
        boxes += [line.get_window_extent() for line in axis.lines if line not in picture.moving]
        boxes += [axis.get_legend().get_window_extent()] if axis.get_legend() else []
        for box in boxes:
            top, bottom = len(off) - box.y1, len(off) - box.y0
            allowed[int(top) - 2 : int(bottom) + 4, int(box.x0) - 2 : int(box.x1) + 4] = True
    assert not (off & ~allowed).any(), f"{(off & ~allowed).sum()} pixels differ"


def test_the_beta_slider():
    slider = explorers.beta_slider(3.0)
    assert isinstance(slider, widgets.FloatLogSlider)
    assert slider.value == 3.0
    assert ends(slider) == pytest.approx([0.01, 1000.0])
    assert "β" in slider.description
    assert explorers.beta_slider().value == 5.0
    for value in (1e-9, 1e9):  # clipped, as every ipywidgets slider does
        slider.value = value
        assert 0.01 <= slider.value <= 1000


@pytest.mark.parametrize(("beta", "depth"), [(1000.0, 20)])
def test_the_numbers_under_the_activations(beta, depth):
    (beta_control, span, depth_control), _, text = parts(explorers.beta_explorer())
    span.value, beta_control.value, depth_control.value = 10.0, beta, depth
    largest, drift, kept = numbers(text)
    assert float(largest) == pytest.approx(beta / 4, rel=5e-3)
    assert float(drift) == pytest.approx(math.log(depth + 1) / beta, rel=5e-3)
    assert float(kept) == 0
    assert ("layers" in text.value) == (depth > 1)


def test_the_lines_of_the_activations(seen):
    (beta, span, depth), _, _ = parts(explorers.beta_explorer())
    beta.value, span.value, depth.value = 3.0, 2.0, 4
    axes = seen[0].canvas.figure.axes
    x = np.linspace(-2, 2, 400)
    t = 3 * x
    sigma = 1 / (1 + np.exp(-t))
    softplus = np.logaddexp(0, t) / 3
    # relu, centered, softplus
    expected = [
        (np.maximum(x, 0), softplus - math.log(2) / 3, softplus),
        (x > 0, sigma, sigma),
        (0 * x, 3 * sigma * (1 - sigma), 3 * sigma * (1 - sigma)),
        (np.maximum(x, 0), np.log1p(np.expm1(t) / 2**4) / 3, np.logaddexp(math.log(4), t) / 3),
    ]
    for axis, curves in zip(axes, expected, strict=True):
        for line, curve in zip(axis.lines, curves, strict=True):
            np.testing.assert_allclose(line.get_xdata(), x, atol=1e-6)
            np.testing.assert_allclose(line.get_ydata(), curve, atol=1e-5)
        assert axis.get_xlim() == pytest.approx((-2, 2))


@pytest.mark.parametrize(("method", "beta"), [("standard", 7.0), ("lcnn", 1000.0)])
def test_the_numbers_under_the_moons(method, beta, seen):
    (chosen, slider), _, text = parts(MAKE["moons"]())
    chosen.value, slider.value = METHOD[method][0], beta
    model = copy.deepcopy(MODELS[method])
    for module in model.modules():
        if isinstance(module, CenteredSoftplus):
            module.beta = beta
    x, y = POINTS
    share, median, largest = numbers(text)
    assert share == f"{(model(x).argmax(1) == y).float().mean().item():.1%}"
    margin, curvature = measurements.moons_fields(model, measurements.moons_grid(RESOLUTION))
    assert float(median) == pytest.approx(np.median(curvature.numpy()), rel=1e-2)
    assert float(largest) == pytest.approx(curvature.max().item(), rel=1e-2)
    assert METHOD[method][0] in text.value
    left, right = seen[0].canvas.figure.axes[:2]
    np.testing.assert_allclose(left.images[0].get_array(), margin.view(RESOLUTION, -1), rtol=1e-4, atol=1e-5)
    expected = np.log10(curvature.view(RESOLUTION, -1).numpy() + 1e-12)
    np.testing.assert_allclose(right.images[0].get_array(), expected, rtol=1e-2, atol=1e-2)
    for axis in (left, right):
        boundary = torch.tensor(axis.lines[-1].get_xydata(), dtype=torch.float32)
        boundary = boundary[~boundary.isnan().any(1)]
        outputs = model(boundary).detach()
        if len(boundary):
            assert (outputs[:, 1] - outputs[:, 0]).abs().max() < 0.1 * margin.abs().max(), "the margin is 0 there"


def test_the_models_given_are_not_changed():
    models = {name: copy.deepcopy(model).train() for name, model in MODELS.items()}
    before = {name: copy.deepcopy(model.state_dict()) for name, model in models.items()}
    (chosen, slider), _, _ = parts(explorers.moons_explorer(models, *POINTS, resolution=8))
    for label in chosen.options:
        chosen.value = label
        for value in ends(slider):
            slider.value = value
    for name, model in models.items():
        assert all(torch.equal(model.state_dict()[key], value) for key, value in before[name].items())
        assert all(module.training for module in model.modules())
        assert [m.beta.item() for m in model.modules() if isinstance(m, CenteredSoftplus)] == pytest.approx(
            [1000.0 if name == "standard" else 3.0] * 2
        )
        assert all(parameter.grad is None for parameter in model.parameters())


def test_the_numbers_under_the_convergence(seen):
    frame = estimates()
    (sample, products), _, text = parts(explorers.convergence_explorer(frame))
    assert ends(sample) == [0, 3]
    assert ends(products) == [1, 6]
    for s, k in ((0, 1), (3, 6), (2, 4)):
        sample.value, products.value = s, k
        part = frame[(frame["sample"] == s) & (frame.products == k)].set_index("estimator")
        errors = [float(number.rstrip("%")) / 100 for number in numbers(text)]
        assert errors == pytest.approx((part.estimate / part.exact - 1).tolist(), abs=1e-4)
        assert re.findall(r"[ ,] ?(\w+): <b>", text.value) == list(part.index)
        axis = seen[0].canvas.figure.axes[0]
        for line, name in zip(axis.lines, part.index, strict=False):
            wanted = frame[(frame["sample"] == s) & (frame.products <= k) & (frame.estimator == name)]
            np.testing.assert_array_equal(line.get_xdata(), range(1, k + 1))
            np.testing.assert_allclose(line.get_ydata(), wanted.estimate / 2)


def test_a_picture_draws_only_what_moves():
    figure = Figure(figsize=(2, 2), dpi=50)
    axis = figure.subplots()
    (moving,) = axis.plot([0, 1], [0, 1], "r")
    (still,) = axis.plot([0, 1], [1, 0], "b")
    picture = explorers.Picture(figure, [moving])
    picture.draw()
    first = pixels(picture.image)
    assert first.shape == (100, 100, 3)
    still.set_data([0, 1], [0.5, 0.5])
    picture.draw()
    np.testing.assert_array_equal(pixels(picture.image), first)
    picture.frame()
    picture.draw()
    assert (pixels(picture.image) != first).any()
    moving.set_data([], [])
    picture.draw()
    nothing_red = pixels(picture.image).astype(int)
    assert not ((nothing_red[..., 0] > 200) & (nothing_red[..., 1] < 50)).any()


def test_a_failing_update_comes_out():
    """Jupyter swallows what callbacks raise: these tests rely on its coming out elsewhere."""
    figure = Figure(figsize=(1, 1))
    line = figure.subplots().plot([0, 1])

    def update(n: int) -> str:
        if n == 2:
            raise ZeroDivisionError
        return f"<b>{n}</b>"

    control = widgets.IntSlider(1, min=1, max=2, description="n")
    explorers._explore(explorers.Picture(figure, line), update, n=control)
    with pytest.raises(ZeroDivisionError):
        control.value = 2
