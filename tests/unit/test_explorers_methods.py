"""The live curves draw each epoch, and the λ explorer shows what its frames hold."""

import re

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from test_explorers import parts, pixels
from test_figures_methods import history, layer_frame

from lcnn_utils import explorers
from lcnn_utils.widgets import training as methods
from lcnn_utils.figures.style import METHOD
from lcnn_utils.training import fit, recipe

LAMBDAS = (0.0, 1e-3, 1e-2, 3e-1)


@pytest.fixture(autouse=True)
def seen(monkeypatch):
    pictures = []

    class Seen(explorers.Picture):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            pictures.append(self)

    monkeypatch.setattr(methods, "Picture", Seen)
    monkeypatch.setattr(explorers, "CONTROLS", [])
    return pictures


@pytest.fixture
def displayed(monkeypatch):
    shown = []
    monkeypatch.setattr(methods, "display", shown.append)
    return shown


# ---- live curves -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lcnn"])
def test_live_curves_draw_each_epoch(method, seen, displayed):
    watch = methods.live_curves(method, 5)
    assert displayed == [], "nothing before the first epoch"
    (picture,) = seen
    whole, pictures = history(5), set()
    for epoch in range(1, 6):
        watch(whole[:epoch])
        pictures.add(picture.image.value)
        assert displayed == [picture.image], "one picture, which changes"
        left, right = picture.canvas.figure.axes
        for axis, column in ((left, "loss"), (right, "curvature")):
            (line,) = axis.lines
            np.testing.assert_allclose(line.get_xydata(), whole[["epoch", column]][:epoch])
            assert to_hex(line.get_color()) == to_hex(METHOD[method][1])
            assert line.get_marker() == METHOD[method][2]
            assert axis.get_xlim() == (0, 6)
            assert axis.get_xlabel() == "epoch"
    assert len(pictures) == 5
    assert METHOD[method][0] in left.get_title()
    assert explorers.CONTROLS == [], "nothing to move"


def test_live_curves_of_a_training(store, seen, displayed):
    one = recipe("moons", "lcnn", epochs=3, width=4)
    calls = []
    watch = methods.live_curves("lcnn", one.epochs)
    _, found = fit(one, progress=False, watch=lambda table: (calls.append(len(table)), watch(table)))
    assert calls == [1, 2, 3]
    left, right = seen[0].canvas.figure.axes
    np.testing.assert_allclose(left.lines[0].get_xydata(), found[["epoch", "loss"]])
    np.testing.assert_allclose(right.lines[0].get_xydata(), found[["epoch", "curvature"]])
    low, high = left.get_ylim()
    assert found.loss.between(low, high).all()
    low, high = right.get_ylim()
    assert found.curvature.between(low, high).all()
    assert len(displayed) == 1


# ---- the λ explorer ----------------------------------------------------------------------------------------------


PRICED = [lam for lam in LAMBDAS if lam > 0]


def frames(seeds: int = 3) -> tuple[pd.DataFrame, pd.DataFrame]:
    rng = np.random.default_rng(0)
    rows = [
        (lam, lam, seed, rng.uniform(0.1, 1), 10 ** rng.uniform(-1, 2), 10 ** rng.uniform(-1, 1))
        for lam in LAMBDAS[::-1]
        for seed in range(seeds)
    ]
    columns = ["lambda_beta", "lambda_gamma", "seed", "accuracy", "curvature", "margin_curvature"]
    tables = [layer_frame(epochs=1).assign(lambda_=lam) for lam in LAMBDAS]
    layers = pd.concat(tables, ignore_index=True)
    return pd.DataFrame(rows, columns=columns), layers.assign(value=layers.value * rng.uniform(0.5, 2, len(layers)))


def test_every_option_changes_the_picture_and_back():
    (slider,), image, text = parts(methods.lambda_explorer(*frames()))
    assert [(slider, image)] == explorers.CONTROLS
    assert slider.value == pytest.approx(1e-2), "where the lab trains"
    first, words, shown = pixels(image), text.value, {image.value}
    for lam in [lam for lam in PRICED if lam != slider.value]:
        slider.value = 1.1 * lam if lam < PRICED[-1] else lam  # it snaps
        shown.add(image.value)
        assert pixels(image).shape == first.shape
        assert f"= {lam:g}," in text.value
        assert "nan" not in text.value
    assert len(shown) == len(PRICED)
    slider.value = 1e-2
    np.testing.assert_array_equal(pixels(image), first)
    assert text.value == words


@pytest.mark.parametrize("lam", PRICED[1:])
def test_what_is_shown_is_what_was_measured(lam, seen):
    frame, layers = frames()
    (slider,), _, text = parts(methods.lambda_explorer(frame, layers))
    slider.value = lam
    part = frame[frame.lambda_beta == lam]
    assert re.findall(r"<b>(.*?)</b>", text.value) == [
        f"{part.accuracy.mean():.1%}", f"{part.curvature.mean():.3g}", f"{part.margin_curvature.mean():.3g}"
    ]  # fmt: skip
    assert f"λ_β = λ_γ = {lam:g}, 3 seeds:" in text.value
    assert f"± {part.accuracy.std():.1%}" in text.value
    of = layers[layers.lambda_ == lam].groupby("kind").value.median()
    assert f"median β {of.beta:.3g}, median γ {of.gamma:.3g}." in text.value
    beta, gamma, plane = seen[0].canvas.figure.axes
    for axis, kind in ((beta, "beta"), (gamma, "gamma")):
        here = layers[(layers.lambda_ == lam) & (layers.kind == kind)]
        zero = layers[(layers.lambda_ == 0) & (layers.kind == kind)]
        np.testing.assert_allclose(axis.lines[0].get_xydata(), zero[["layer", "value"]])
        np.testing.assert_allclose(axis.lines[1].get_xydata(), here[["layer", "value"]])
        low, high = axis.get_ylim()
        assert layers[layers.kind == kind].value.between(low, high).all(), "room for every λ"
    means = frame.groupby("lambda_beta")[["curvature", "accuracy"]].mean()
    np.testing.assert_allclose(plane.lines[1].get_xydata(), means * [1, 100])
    np.testing.assert_allclose(plane.lines[2].get_xydata(), means.loc[[lam]] * [1, 100])
    low, high = plane.get_xlim()
    assert means.curvature.between(low, high).all()


def test_a_net_without_curvature_stays_on_the_plane(seen):
    frame, layers = frames()
    frame.loc[frame.lambda_beta == 0.3, "curvature"] = 0.0
    (slider,), _, text = parts(methods.lambda_explorer(frame, layers))
    slider.value = 0.3
    (x, _), (low, _) = seen[0].canvas.figure.axes[2].lines[2].get_xydata()[0], seen[0].canvas.figure.axes[2].get_xlim()
    assert x > low > 0
    assert "C of the loss <b>0</b>" in text.value


def test_one_seed_claims_no_spread():
    _, _, text = parts(methods.lambda_explorer(*frames(seeds=1)))
    assert "nan" not in text.value
