"""Checks of robust accuracies: networks built to mask their gradients are caught, sound ones are not."""

import copy
import importlib

import pandas as pd
import pytest
import torch
from networks import Scale, cnn, margin_loss, means_of_digits, net, predicted, same_weights
from torch import nn

from lcnn_utils.attacks import Headed, masking_checks, minimal_radius, pgd
from lcnn_utils.attacks.pgd import NORMS
from lcnn_utils.data import Images, load
from lcnn_utils.experiments import run
from lcnn_utils.training import recipe

masking = importlib.import_module("lcnn_utils.attacks.masking")
EPS = {"l2": 0.5, "linf": 0.1}
FGSM, LONGER, SEARCH = "one step (FGSM)", "5 × the steps", "search without gradients is no stronger"
BOX, SCALED, CE = "with the whole box", "logits × 100", "the same with cross-entropy"
ZERO, ZERO_CE = (f"share of gradients that are exactly 0, {loss}" for loss in ("the margin", "cross-entropy"))
ODDS, ROUNDED, TIES = "log-odds", "share of images whose logits are rounded", "share of attacked points"
HEADS = {  # a last layer, and the check that it must fail
    "none": (lambda z: z, None),
    "log-softmax": (lambda z: z.log_softmax(1), None),
    "small": (lambda z: 1e-6 * z, None),
    "softmax": (lambda z: (10 * z).softmax(1), ODDS),
    "another bound": (lambda z: 7 * z.atan(), ODDS),
    "shifted": (lambda z: z + 1e5, ROUNDED),
    "bfloat16": (lambda z: z.bfloat16(), ROUNDED),
    "rounded": (lambda z: z.bfloat16().float(), ROUNDED),
    "cut off": (lambda z: z.clamp(-1, 1), TIES),
}


class Stairs(nn.Module):
    """A network behind pixels that are rounded to fifths; between the steps they fall with a slope (0: they are flat).

    The stairs climb as the pixels do, but their gradient is 0, or points the wrong way.
    """

    def __init__(self, model: nn.Module, slope: float) -> None:
        super().__init__()
        self.model, self.slope = model, slope

    def forward(self, x):
        rounded = torch.round(5 * x) / 5
        return self.model(rounded - self.slope * (x - rounded))


@pytest.fixture(scope="module")
def plain() -> tuple[nn.Module, Images]:
    """A linear network, and test images of the digits."""
    return means_of_digits()[0], load("digits", "test", subset=120)


def checked(*args, **options) -> pd.DataFrame:
    return masking_checks(*args, **options).set_index("check")


def row(frame: pd.DataFrame, name: str) -> pd.Series:
    """The one row whose name begins so."""
    (found,) = (index for index in frame.index if index.startswith(name))
    return frame.loc[found]


def failed(frame: pd.DataFrame) -> set[str]:
    return set(frame.index[[passed is False for passed in frame.passed]])


@pytest.mark.parametrize("norm", NORMS)
def test_a_linear_network_passes_all_checks(norm, plain):
    model, images = plain
    other = nn.Sequential(model, Scale(-1.0))  # fooled from the beginning: its points are the images
    frame = checked(model, images, EPS[norm], norm=norm, restarts=1, others={"itself": model, "it": other})
    assert not failed(frame)
    share = lambda points: (margin_loss(model, points, images.y) <= 0).double().mean().item()
    right, clean = share(pgd(model, images.float(), images.y, EPS[norm], norm=norm)), share(images.float())
    assert 0.4 < right < 0.8, "neither nobody nor everybody survives"
    assert frame.standard.dropna().unique() == pytest.approx([right])
    assert (row(frame, ZERO).value, row(frame, ZERO_CE).value, row(frame, BOX).value) == (0, 0, 0)
    assert row(frame, "points made for itself").value == pytest.approx(right, abs=0.02)
    assert row(frame, "points made for it are").value == clean
    assert [row(frame, name).passed for name in (CE, ZERO_CE)] == [None, None]
    assert frame.standard[frame.index.str.startswith("share")].isna().all()
    assert frame.value.between(0, 1).all()


@pytest.mark.parametrize("name", HEADS)
def test_last_layers_that_mask_are_named_and_others_are_not(name, plain):
    """Saturated outputs mask a network of several layers."""
    head, caught = HEADS[name]
    if caught == ODDS:
        model = run(recipe("digits", "standard"), device="cpu", progress=False).model
        frame = checked(Headed(model, head), load("digits", "test", subset=20), 0.6, steps=8, restarts=1)
    else:
        frame = checked(Headed(nn.Sequential(plain[0], Scale(0.25)), head), plain[1], 0.5, restarts=1, steps=10)
    assert not failed(frame) if caught is None else row(frame, caught).passed is False


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("slope", [0.0, 0.1])
def test_rounded_pixels_are_caught(norm, slope, plain):
    """Nothing to climb, or the wrong way; the search finds the stairs, and so do the points of another network."""
    model, images = plain
    frame = checked(Stairs(model, slope), images, EPS[norm], norm=norm, restarts=1, steps=10, others={"plain": model})
    assert failed(frame) >= {SEARCH, "points made for plain are no stronger"}
    assert row(frame, ZERO).value == row(frame, ZERO_CE).value == (slope == 0)
    assert row(frame, ZERO).passed == (slope != 0)
    assert slope or row(frame, BOX).passed is False


def test_confidence_masks_cross_entropy_but_not_the_margin(plain):
    model, images = plain
    quiet = checked(model, images, EPS["l2"], restarts=1)
    loud = checked(nn.Sequential(model, Scale(1e4)), images, EPS["l2"], restarts=1)
    assert not failed(loud)
    clean = (model(images.float()).argmax(1) == images.y).double().mean().item()
    assert row(loud, CE).value > clean - 0.02, "cross-entropy finds next to nothing"
    assert row(quiet, CE).value < clean - 0.1
    assert row(loud, ZERO_CE).value > clean - 0.02
    for name in (FGSM, LONGER, SEARCH, BOX, SCALED, ZERO):
        assert row(loud, name).value == pytest.approx(row(quiet, name).value, abs=0.011)


@pytest.mark.parametrize(
    "measure",
    [
        lambda net, x, y: pgd(net, x, y, 0.2, steps=3),
        lambda net, x, y: minimal_radius(net, x, y, steps=3)[1],
        lambda net, x, y: torch.tensor(masking_checks(net, (x, y), 0.2, steps=2, others={"other": net}).value),
    ],
    ids=["pgd", "minimal_radius", "masking_checks"],
)
def test_a_network_in_training_mode_is_attacked_in_eval_mode(measure):
    """Without dropout, with BatchNorm at rest; the network, the images and torch's generator are left alone."""
    model = cnn().train()
    model[1].eval()
    model[0].requires_grad_(False)
    x, y = predicted(model, 8, 1, 8, 8)
    pixels, before, generator = x.clone(), copy.deepcopy(model), torch.get_rng_state()
    assert torch.equal(measure(model, x, y), measure(copy.deepcopy(model).eval(), x, y))
    assert [m for m in model.modules() if not m.training] == [model[1]]
    assert same_weights(model, before)
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(x, pixels)
    assert torch.equal(torch.get_rng_state(), generator)
    assert not any(p.requires_grad for p in model[0].parameters())
    with pytest.raises(ValueError, match="labels"):
        measure(model, x, y[:-1])


def test_the_seed_decides_and_the_referee_has_its_row(monkeypatch):
    model = net(1)
    x, y = predicted(model, 64, 12)
    table = lambda **more: masking_checks(model, (x, y), 0.25, steps=1, restarts=1, **more).set_index("check")
    assert not table(seed=0).equals(table(seed=1))
    monkeypatch.setattr(masking, "autoattack", lambda net, x, y, eps, **more: x)
    judged = table(referee=True)
    assert judged.loc["AutoAttack: hardly stronger", ["value", "passed"]].tolist() == [1, True]
    pd.testing.assert_frame_equal(judged.drop("AutoAttack: hardly stronger"), table())
