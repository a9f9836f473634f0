"""Checks of robust accuracies: networks built to mask their gradients are caught, sound ones are not."""

import math
import sys

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attacks import DTYPES, NORMS, Scale, cnn, length, linear, margin_loss, net, predicted
from test_curves import means_of_digits
from torch import nn

from lcnn_utils.attacks import autoattack, masking_checks, pgd
from lcnn_utils.attacks.balls import _random_steps
from lcnn_utils.attacks.masking import random_search, zero_gradients
from lcnn_utils.data import Images, load
from lcnn_utils.experiments import run
from lcnn_utils.training import recipe

EPS = {"l2": 0.5, "linf": 0.1}
FGSM, LONGER, SEARCH = "one step (FGSM)", "5 × the steps", "search without gradients"
BOX, SCALED, CE = "with the whole box", "logits × 100", "the same with cross-entropy"
ZERO, ZERO_CE = (
    "share of gradients that are exactly 0, the margin",
    "share of gradients that are exactly 0, cross-entropy",
)
ODDS, ROUNDED, TIES = "log-odds", "share of images whose logits are rounded", "share of attacked points"
HEADS = {  # a last layer, and the check that it must fail
    "none": (lambda z: z, None),
    "log-softmax": (lambda z: z.log_softmax(1), None),
    "sure": (lambda z: (20 * z).log_softmax(1), None),
    "small": (lambda z: 1e-6 * z, None),
    "softmax": (lambda z: (10 * z).softmax(1), ODDS),
    "tanh": (lambda z: z.tanh(), ODDS),
    "sigmoid": (lambda z: z.sigmoid(), ODDS),
    "another bound": (lambda z: 7 * z.atan(), ODDS),
    "shifted": (lambda z: z + 1e5, ROUNDED),
    "bfloat16": (lambda z: z.bfloat16(), ROUNDED),
    "rounded": (lambda z: z.bfloat16().float(), ROUNDED),
    "cut off": (lambda z: z.clamp(-1, 1), TIES),
}


class Headed(nn.Module):
    """A network with another last layer."""

    def __init__(self, model: nn.Module, head) -> None:
        super().__init__()
        self.model, self.head = model, head

    def forward(self, x):
        return self.head(self.model(x))


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


class Rippled(nn.Module):
    """A network with steep ripples on its logits: 0.3·sin(300·x), summed over the pixels, for and against classes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x):
        z = self.model(x)
        return z + 0.3 * torch.sin(300 * x.flatten(1)).sum(1, keepdim=True) * torch.linspace(-1, 1, z.shape[1])


@pytest.fixture(scope="module")
def plain() -> tuple[nn.Module, Images]:
    """A linear network, and the test images of the digits."""
    return means_of_digits()[0], load("digits", "test")


def checked(*args, **options) -> pd.DataFrame:
    return masking_checks(*args, **options).set_index("check")


def row(frame: pd.DataFrame, name: str) -> pd.Series:
    """The one row whose name begins so."""
    (found,) = (index for index in frame.index if index.startswith(name))
    return frame.loc[found]


def failed(frame: pd.DataFrame) -> set[str]:
    return {name.split(":")[0] for name in frame.index[[passed is False for passed in frame.passed]]}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --------------------------------------------------------------------------------------- masked and sound networks
@pytest.mark.parametrize("norm", NORMS)
def test_a_linear_network_passes_all_checks(norm, plain):
    frame = checked(*plain, EPS[norm], norm=norm, restarts=1)
    assert not failed(frame)
    model, images = plain
    left = pgd(model, images.float(), images.y, EPS[norm], norm=norm)
    right = (margin_loss(model, left, images.y) <= 0).double().mean().item()
    assert 0.4 < right < 0.8, "neither nobody nor everybody survives"
    assert frame.standard.dropna().unique() == pytest.approx([right])
    assert (row(frame, ZERO).value, row(frame, ZERO_CE).value, row(frame, BOX).value) == (0, 0, 0)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("quantile", [0.1, 0.5, 0.95])
def test_a_linear_network_with_two_classes_passes_all_checks_in_every_ball(norm, quantile):
    model, x, y, radius = linear((1, 5, 5), torch.float32, norm)
    dual = (-margin_loss(model, x, y) / radius)[0]
    x = 0.4 + 0.2 * x  # around the boundary and far from the edges
    model[1].bias.data -= model(x).detach().mean(0)
    y = model(x).argmax(1)
    radius = -margin_loss(model, x, y) / dual
    eps = radius.quantile(quantile).item()
    frame = checked(model, (x, y), eps, norm=norm, steps=10)
    assert not failed(frame)
    for name in (LONGER, SCALED, CE):
        assert row(frame, name).value == pytest.approx((radius > eps).double().mean().item()), name


def test_the_shipped_lcnn_passes_all_checks():
    model = run(recipe("digits", "lcnn"), device="cpu", progress=False).model
    frame = checked(model, load("digits", "test", subset=20), 0.32, steps=6)
    assert not failed(frame)
    assert frame.standard.iloc[0] == pytest.approx(18 / 20), "one is wrong, and one within reach"


@pytest.mark.parametrize("name", HEADS)
def test_last_layers_that_mask_are_named_and_others_are_not(name, plain):
    """Saturated outputs mask a network of several layers: 42 % of the digits are left, not 28 %, behind a tanh."""
    head, caught = HEADS[name]
    if caught == ODDS:
        model = run(recipe("digits", "standard"), device="cpu", progress=False).model
        frame = checked(Headed(model, head), load("digits", "test", subset=100), 0.6, steps=10, restarts=2)
    else:
        frame = checked(Headed(nn.Sequential(plain[0], Scale(0.25)), head), plain[1], 0.5)
    if caught is None:
        assert not failed(frame)
    else:
        assert row(frame, caught).passed is False


def test_three_images_say_nothing(plain):
    model, images = plain
    with pytest.raises(ValueError, match="3 images"):
        masking_checks(model, (images.float()[:3], images.y[:3]), 0.5)


@pytest.mark.parametrize("norm", NORMS)
def test_rounded_pixels_are_caught(norm, plain):
    """Nothing to climb, so PGD stays where it began; the search finds the stairs, and so do the points of another."""
    model, images = plain
    frame = checked(Stairs(model, 0.0), images, EPS[norm], norm=norm, others={"the plain one": model})
    assert failed(frame) >= {SEARCH + " is no stronger", "points made for the plain one are no stronger", ZERO}
    assert (row(frame, ZERO).value, row(frame, ZERO_CE).value) == (1, 1)
    assert row(frame, SEARCH).value < row(frame, SEARCH).standard - 0.05
    assert row(frame, BOX).passed is False


@pytest.mark.parametrize("norm", NORMS)
def test_gradients_that_point_the_wrong_way_are_caught(norm, plain):
    """None of them is 0."""
    model, images = plain
    frame = checked(Stairs(model, 0.1), images, EPS[norm], norm=norm, others={"the plain one": model})
    assert failed(frame) >= {SEARCH + " is no stronger", "points made for the plain one are no stronger"}
    assert row(frame, ZERO).passed
    assert row(frame, ZERO).value == 0


def test_ripples_are_caught(plain):
    """They lead the ascent astray: the search finds more."""
    model, images = plain
    frame = checked(Rippled(model), images, 0.1, norm="linf", restarts=1)
    assert SEARCH + " is no stronger" in failed(frame)


@pytest.mark.parametrize("norm", NORMS)
def test_confidence_masks_cross_entropy_but_not_the_margin(norm, plain):
    model, images = plain
    quiet = checked(model, images, EPS[norm], norm=norm, restarts=1)
    loud = checked(nn.Sequential(model, Scale(1e4)), images, EPS[norm], norm=norm, restarts=1)
    assert not failed(loud)
    clean = (model(images.float()).argmax(1) == images.y).double().mean().item()
    assert row(loud, CE).value > clean - 0.02, "cross-entropy finds next to nothing"
    assert row(quiet, CE).value < clean - 0.1
    assert row(loud, ZERO_CE).value > clean - 0.02
    for name in (FGSM, LONGER, SEARCH, BOX, SCALED, ZERO):
        assert row(loud, name).value == pytest.approx(row(quiet, name).value, abs=0.006)


def test_a_network_that_ignores_its_input_is_caught():
    model = nn.Linear(12, 3)
    model.weight.data.zero_()
    model.bias.data = torch.tensor([1.0, 0.0, 0.0])
    frame = checked(model, (torch.rand(20, 12), torch.zeros(20, dtype=torch.long)), 0.1, steps=2)
    caught = failed(frame)
    assert caught >= {"with the whole box as its ball, nothing survives", ZERO}
    assert any(name.startswith(ROUNDED) for name in caught), "all images have the same logits"


# -------------------------------------------------------------------------------------------------- masking_checks
def test_the_rows_and_columns_of_the_checks():
    model = net(1)
    x, y = predicted(model, 16, 12)
    frame = masking_checks(model, (x, y), 0.2, steps=3, others={"a": net(2), "b": net(3)})
    assert list(frame) == ["check", "value", "standard", "passed"]
    assert frame.check.is_unique
    plain = masking_checks(model, (x, y), 0.2, steps=3)
    transferred = [name for name in frame.check if name not in set(plain.check)]
    assert transferred == ["points made for a are no stronger", "points made for b are no stronger"]
    assert set(frame.passed) <= {True, False, None}
    assert [row(frame.set_index("check"), name).passed for name in (CE, ZERO_CE)] == [None, None]
    assert frame.value.between(0, 1).all()
    assert frame.standard[~frame.check.str.startswith("share")].nunique() == 1
    assert frame.standard[frame.check.str.startswith("share")].isna().all()


def test_points_of_another_network_are_tried_on_this_one():
    """Those made for itself do as well as its own, those for a network of the opposite classes only help it."""
    model, x, y, radius = linear((12,), torch.float32, "l2")
    opposite = nn.Sequential(model, nn.Linear(2, 2))
    opposite[1].weight.data, opposite[1].bias.data = torch.eye(2).flip(0), torch.zeros(2)
    confused = nn.Sequential(model, Scale(-1.0))  # says 1 for 0: with true labels it is fooled from the beginning
    frame = checked(model, (x, y), radius.median().item(), others={"itself": model, "it": opposite, "-it": confused})
    assert row(frame, "points made for itself").value == row(frame, FGSM).standard < 0.7
    assert row(frame, "points made for it are").value == 1
    assert row(frame, "points made for -it are").value == 1


def test_the_seed_alone_decides_what_the_checks_say():
    model = net(1)
    pair, others = predicted(model, 64, 12), {"a": net(2)}
    state = torch.get_rng_state()
    frames = [masking_checks(model, pair, 0.25, steps=1, restarts=1, seed=seed, others=others) for seed in (0, 0, 1)]
    pd.testing.assert_frame_equal(frames[0], frames[1])
    assert not frames[0].equals(frames[2])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("eps", [0.0, -0.1, math.nan, math.inf])
def test_a_radius_that_is_none_is_named(eps):
    model = net()
    with pytest.raises(ValueError, match=rf"eps is {eps}: masking is checked at one finite radius above 0"):
        masking_checks(model, predicted(model, 4, 12), eps)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(norm="l1"), "unknown norm 'l1'"),
        (dict(steps=0), "steps must be"),
        (dict(images=(torch.full((4, 12), 2.0), torch.zeros(4).long())), "outside the box"),
        (dict(images=(torch.rand(4, 12), torch.full((4,), 9))), "4 classes"),
        (dict(images=(torch.rand(4, 12), torch.zeros(3).long())), "labels have shape"),
    ],
)
def test_bad_input_of_the_checks_is_named(change, message):
    arguments = dict(images=(torch.rand(4, 12), torch.zeros(4).long()), eps=0.1) | change
    with pytest.raises(ValueError, match=message):
        masking_checks(net(), **arguments)


def test_the_checks_leave_the_networks_as_found():
    models = [cnn(0).train(), cnn(1).train()]
    x, y = predicted(models[0], 8, 1, 8, 8)
    for model in models:
        model[3].eval()
        model[0].requires_grad_(False)
    found = lambda: [
        ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]) for model in models
    ]
    before, states = found(), [{k: v.clone() for k, v in model.state_dict().items()} for model in models]
    masking_checks(models[0], (x, y), 0.2, steps=2, others={"other": models[1]})
    random_search(models[0], x, y, 0.1, queries=3)
    zero_gradients(models[0], x, y, "ce")
    assert found() == before
    for model, state in zip(models, states, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match="norm"):
        masking_checks(models[0], (x, y), 0.2, norm="l3")
    assert found() == before


# --------------------------------------------------------------------------------------------------- random search
@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(NORMS), st.sampled_from(DTYPES), st.integers(0, 999), st.integers(1, 12),
    st.lists(st.just(0.0) | st.floats(1e-6, 3), min_size=3, max_size=3), st.booleans(),
)  # fmt: skip
def test_the_search_stays_in_the_ball_and_the_box_and_is_never_worse_than_x(norm, dtype, seed, queries, eps, boxed):
    model = net(seed, dtype)
    x, y = predicted(model, 3, 12, dtype=dtype, seed=seed)
    x[0] = x[0].round()  # corners of the box
    eps = torch.tensor(eps, dtype=dtype)
    point = random_search(model, x, y, eps, norm=norm, queries=queries, box=(0.0, 1.0) if boxed else None)
    assert (point.dtype, point.shape, point.requires_grad) == (x.dtype, x.shape, False)
    assert (length(point - x, norm) <= eps * (1 + 1e-6)).all()
    assert not boxed or ((point >= 0) & (point <= 1)).all()
    assert torch.equal(point[eps == 0], x[eps == 0])
    assert (margin_loss(model, point, y) >= margin_loss(model, x, y)).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("queries", [1, 2, 7, 40])
def test_the_first_half_of_the_search_is_drawn_anywhere_and_the_best_is_kept(norm, queries):
    """More queries need not find more, as they also move the half; but all do as well as their first half alone."""
    model = net(1, torch.float64)
    x, y = predicted(model, 20, 12, dtype=torch.float64)
    eps = torch.full((20,), EPS[norm] / 2, dtype=torch.float64)
    found = margin_loss(model, random_search(model, x, y, eps, norm=norm, queries=queries, generator=seeded(3)), y)
    half = list(_random_steps(x, eps, norm, (queries + 1) // 2, seeded(3)))
    plain = torch.stack([margin_loss(model, x, y), *(margin_loss(model, (x + s).clamp(0, 1), y) for s in half)])
    fooled = (plain > 0).any(0)
    assert (found[fooled] > 0).all()
    assert (found[~fooled] >= plain.amax(0)[~fooled] - 1e-9).all()
    if queries == 1:
        torch.testing.assert_close(found, plain.amax(0))


def test_the_second_half_of_the_search_improves_on_the_first():
    """On a linear network, against as many points drawn anywhere; and PGD, which has gradients, is better still."""
    model, x, y, radius = linear((1, 5, 5), torch.float64, "l2")
    eps = 0.9 * radius
    margins = lambda points: margin_loss(model, points, y)
    found = margins(random_search(model, x, y, eps, queries=200, box=None))
    drawn = torch.stack([margins(x + step) for step in _random_steps(x, eps, "l2", 200, seeded())]).amax(0)
    share = lambda margin: ((margin - margins(x)) / -margins(x)).mean() / 0.9  # of the way to the worst point
    assert share(found) > share(drawn) + 0.1
    assert share(margins(pgd(model, x, y, eps, box=None))) > share(found)


def test_what_the_search_has_fooled_stays_and_what_is_wrong_is_not_touched():
    model = net(2)
    x, y = predicted(model, 10, 12)
    y[:4] = (y[:4] + 1) % 4
    seen = []
    model.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    point = random_search(model, x, y, 0.3, queries=9)
    assert seen == [2, 2, 1, 1] + [10] * (9 + 1)
    assert torch.equal(point[:4], x[:4])
    assert not torch.equal(point[4:], x[4:])
    assert torch.equal(point, random_search(model, x, y, 0.3, queries=9))
    assert not torch.equal(point, random_search(model, x, y, 0.3, queries=9, generator=seeded(1)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(queries=0), "queries must be a whole number of at least 1, got 0"),
        (dict(queries=2.5), "queries must be"),
        (dict(norm="l1"), "unknown norm 'l1'"),
        (dict(eps=-1.0), "eps is -1"),
        (dict(eps=math.nan), "eps is nan"),
        (dict(x=torch.full((2, 12), 1.5)), "outside the box"),
        (dict(y=torch.tensor([0])), "labels have shape"),
    ],
)
def test_bad_input_of_the_search_is_named(change, message):
    arguments = dict(model=net(), x=torch.rand(2, 12), y=torch.tensor([0, 1]), eps=0.1) | change
    with pytest.raises(ValueError, match=message):
        random_search(**arguments)


# --------------------------------------------------------------------------------------------------- zero gradients
def test_where_cross_entropy_has_no_gradient_left():
    """e^{−m} is 0 in float32 for margins m above 104, and for none of these in float64; the margin's gradient is w."""
    model = nn.Linear(1, 2)
    model.weight.data, model.bias.data = torch.tensor([[-0.5], [0.5]]), torch.zeros(2)
    x, y = torch.tensor([[1.0], [50.0], [200.0], [700.0]]), torch.ones(4, dtype=torch.long)
    assert zero_gradients(model, x, y, "ce") == 0.5
    assert zero_gradients(model, x, y, "margin") == 0
    assert zero_gradients(model, x, 1 - y, "ce") == 0, "where it is wrong it has one"
    assert zero_gradients(model.double(), x.double(), y, "ce") == 0
    assert x.grad is None


@pytest.mark.parametrize("loss", ["margin", "ce"])
def test_dead_inputs_have_no_gradient_in_any_entry(loss):
    """One entry that isn't 0 is enough to climb."""
    model = nn.Sequential(nn.ReLU(), nn.Linear(3, 2)).train()
    x = torch.tensor([[-1.0, -1.0, -1.0], [1.0, -1.0, -1.0], [1.0, 1.0, 1.0], [-2.0, -1.0, -3.0], [-1.0, -1.0, 1.0]])
    assert zero_gradients(model, x, torch.zeros(5, dtype=torch.long), loss) == pytest.approx(0.4)
    assert model.training


# ------------------------------------------------------------------------------------------------------ AutoAttack
@pytest.mark.parametrize("norm", NORMS)
def test_autoattack_fools_those_of_a_linear_network_that_can_be(norm):
    """Of ten classes the nearest boundary is at min_j margin_j/‖w_y − w_j‖ in the dual norm."""
    pytest.importorskip("pyautoattack")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    x = 0.3 + 0.4 * load("digits", "test", subset=12).float()  # far from the edges of the box
    z, W = model(x).detach(), model[1].weight.detach()
    y = z.argmax(1)
    margins, ways = z.gather(1, y[:, None]) - z, W[y][:, None] - W
    dual = ways.norm(dim=2) if norm == "l2" else ways.abs().sum(2)
    radius = (margins / dual).masked_fill(F.one_hot(y, 10).bool(), math.inf).amin(1)
    eps = radius.sort().values[5:7].mean().item()
    state = torch.get_rng_state()
    point = autoattack(model, x, y, eps, norm=norm)
    assert torch.equal(torch.get_rng_state(), state), "it seeds the global generator"
    assert (point.shape, point.dtype, point.requires_grad) == (x.shape, x.dtype, False)
    assert (length(point - x, norm) <= eps * (1 + 1e-4)).all()
    assert torch.equal(margin_loss(model, point, y) > 0, radius < eps)
    assert torch.equal(point[radius > eps], x[radius > eps])


def test_autoattack_on_digits_stays_in_the_box():
    pytest.importorskip("pyautoattack")
    model = run(recipe("digits", "lcnn"), device="cpu", progress=False).model.train()
    images = load("digits", "test", subset=12)
    point = autoattack(model, images.float(), images.y, 1.2)
    assert all(module.training for module in model.modules())
    assert ((point >= 0) & (point <= 1)).all()
    assert (length(point - images.float(), "l2") <= 1.2 * (1 + 1e-4)).all()
    assert (margin_loss(model, point, images.y) > 0).all()


def test_the_referee_has_a_row_of_its_own(plain):
    pytest.importorskip("pyautoattack")
    model, images = plain
    few = images.float()[:12], images.y[:12]
    ours = masking_checks(model, few, 2.0, steps=5)
    frame = masking_checks(model, few, 2.0, steps=5, referee=True)
    pd.testing.assert_frame_equal(frame[:-1], ours)
    assert frame.check.iloc[-1] == "AutoAttack: hardly stronger"
    assert (frame.value.iloc[-1], frame.standard.iloc[-1], frame.passed.iloc[-1]) == (0, 0, True)


def test_autoattack_wants_ten_classes():
    pytest.importorskip("pyautoattack")
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 9)).train()
    x, y = torch.rand(2, 1, 8, 8), torch.tensor([0, 8])
    with pytest.raises(ValueError, match="need 10 classes, the network has 9"):
        autoattack(model, x, y, 0.1)
    assert model.training


def test_without_pyautoattack_the_way_out_is_named(monkeypatch, plain):
    model, images = plain
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs pyautoattack: .*pip install pyautoattack"):
        autoattack(model, images.float()[:4], images.y[:4], 0.1)
    with pytest.raises(ModuleNotFoundError, match="pip install pyautoattack"):
        masking_checks(model, (images.float()[:4], images.y[:4]), 0.1, steps=1, referee=True)


def test_one_image_is_luck():
    """A difference of exactly one image is within the slack, however it rounds."""
    torch.manual_seed(0)
    model = nn.Linear(12, 4)
    model.bias.data = -model.weight.data.sum(1) / 2
    x = torch.rand(100, 12, generator=torch.Generator().manual_seed(1))
    first = masking_checks(model, (x, model(x).argmax(1)), 0.08, norm="linf", restarts=1).iloc[0]
    assert first.standard - first.value == pytest.approx(0.01)
    assert first.passed


def test_the_referee_leaves_no_gradients():
    pytest.importorskip("pyautoattack")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    x = 0.3 + 0.4 * torch.rand(4, 1, 8, 8)
    autoattack(model, x, model(x).argmax(1), 0.3)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="norm"):
        autoattack(model, x, model(x).argmax(1), 0.3, norm="l3")
