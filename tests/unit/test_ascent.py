"""Projected gradient ascent: its one-step case, momentum, where it starts, how far it climbs, and another's PGD."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attacks import DTYPES, NORMS, cnn, length, linear, margin_loss, net, predicted
from torch import nn

from lcnn_utils.attacks import fgsm, pgd
from lcnn_utils.attacks.balls import _random_steps
from lcnn_utils.attacks.pgd import LOSSES
from lcnn_utils.curvature import scalar_of
from lcnn_utils.experiments import run
from lcnn_utils.training import recipe, samples


@pytest.fixture(scope="module")
def digits():
    """The shipped Standard net of the digits, and all test images."""
    one = recipe("digits", "standard")
    return run(one, device="cpu", progress=False).model, *samples(one, "test")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------------ FGSM: one step
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", LOSSES)
def test_fgsm_is_pgd_with_one_step_of_length_eps_from_x(norm, loss):
    model = net(1, torch.float64)
    x, y = predicted(model, 10, 12, dtype=torch.float64)
    eps = torch.linspace(0, 0.3, 10, dtype=torch.float64)
    step = fgsm(model, x, y, eps, norm=norm, loss=loss)
    assert torch.equal(step[0], x[0]), "its eps is 0"
    for i in range(1, 10):
        one = dict(norm=norm, loss=loss, steps=1, step_size=eps[i].item(), random_start=False)
        alone = pgd(model, x[i : i + 1], y[i : i + 1], eps[i].item(), **one)
        torch.testing.assert_close(step[i : i + 1], alone, rtol=0, atol=1e-12)
    assert torch.equal(fgsm(model, x, y, 0.0, norm=norm, loss=loss), x)
    assert torch.equal(fgsm(model, x, y, eps), step) == ((norm, loss) == ("linf", "ce")), "the defaults"


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("box", [None, (0.0, 1.0)])
def test_fgsm_of_a_linear_network_in_closed_form(norm, loss, box):
    """∇ℓ = Wᵀ(p − e_y) for cross-entropy and w_j − w_y for the margin, j the runner-up; x stays where no gain is."""
    torch.manual_seed(0)
    model = nn.Linear(12, 4).double()
    x = 0.3 + 0.4 * torch.rand(20, 12, dtype=torch.float64)
    z, W = model(x).detach(), model.weight.detach()
    y = z.argmax(1)
    own, runner_up = F.one_hot(y, 4).double(), F.one_hot(z.topk(2).indices[:, 1], 4).double()
    g = ((z.softmax(1) if loss == "ce" else runner_up) - own) @ W
    eps = torch.linspace(0.01, 0.2, 20, dtype=torch.float64)
    moved = x + eps[:, None] * (g.sign() if norm == "linf" else F.normalize(g, dim=1))
    gain = margin_loss(model, moved, y) > margin_loss(model, x, y)
    expected = torch.where(gain[:, None], moved, x)
    assert gain.sum() >= 15
    torch.testing.assert_close(fgsm(model, x, y, eps, norm=norm, loss=loss, box=box), expected, rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------------------------- start and momentum
@pytest.mark.parametrize("norm", NORMS)
def test_without_random_start_the_first_ascent_begins_at_x(norm):
    model = net(2)
    x, y = predicted(model, 8, 12)
    seen = []
    model.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].detach().clone()))
    more = dict(norm=norm, steps=1, step_size=0.01)
    once = lambda seed, **start: pgd(model, x, y, 0.05, generator=seeded(seed), **more, **start)
    first = once(0, random_start=False)
    assert all(torch.equal(at, x) for at in seen[4:-1])  # after the model's check
    assert not torch.equal(seen[-1], x)
    assert torch.equal(first, once(1, random_start=False)), "nothing was drawn"
    assert not torch.equal(first, once(0))
    again = [once(seed, random_start=False, restarts=2) for seed in (0, 1)]
    assert not torch.equal(*again), "the second ascent begins at random"
    assert all((margin_loss(model, at, y) >= margin_loss(model, first, y) - 1e-5).all() for at in again)


class Corner(nn.Module):
    """Logits (10, f) with ∇f = (1, 0) where x₀ < ½ and (0, 1) beyond."""

    def forward(self, x):
        f = torch.where(x[:, 0] < 0.5, x[:, 0], 0.5 + x[:, 1])
        return torch.stack([10 + 0 * f, f], 1)


@pytest.mark.parametrize(
    ("norm", "momentum", "ways"),  # of the second and third step, of length ½
    [
        ("l2", 0.0, [(0, 1), (0, 1)]),
        ("l2", 0.5, [(0.5, 1), (0.25, 1.5)]),
        ("l2", 0.75, [(0.75, 1), (0.5625, 1.75)]),
        ("linf", 0.0, [(0, 1), (0, 1)]),
        ("linf", 0.5, [(1, 1), (1, 1)]),
    ],
)
def test_momentum_by_hand(norm, momentum, ways):
    """Velocities μ·v + ∇f/‖∇f‖, of which only the direction counts; the first step leads to the corner, (½, 0)."""
    at = torch.tensor([0.5, 0.0], dtype=torch.float64)
    for steps, way in enumerate(ways, 2):
        way = torch.tensor(way, dtype=torch.float64)
        at = at + 0.5 * way / (1 if norm == "linf" else way.norm())
        y, more = torch.tensor([0]), dict(norm=norm, steps=steps, step_size=0.5, random_start=False, box=None)
        moved = pgd(Corner(), torch.zeros(1, 2, dtype=torch.float64), y, 10.0, momentum=momentum, **more)
        torch.testing.assert_close(moved[0], at, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", LOSSES)
def test_the_default_step_falls_from_twice_eps_along_a_cosine(norm, loss):
    """Against PGD written out: steps of ε(1 + cos πk/K), onto the ball, into the box; the best point until fooled."""
    model = net(3, torch.float64)
    x, y = predicted(model, 16, 12, dtype=torch.float64)
    eps, steps = {"l2": 0.2, "linf": 0.05}[norm], 6
    (step,) = _random_steps(x, x.new_full((16,), eps), norm, 1, seeded(7))
    best = x
    for k in range(steps + 1):
        at = (x + step).clamp(0, 1).requires_grad_()
        old, new = margin_loss(model, best, y), margin_loss(model, at, y)
        best = torch.where(((old < 0) & (new > old))[:, None], at.detach(), best)
        f = F.cross_entropy(model(at), y, reduction="sum") if loss == "ce" else -scalar_of(model(at), y, "margin").sum()
        g = torch.autograd.grad(f, at)[0]
        g = g.sign() if norm == "linf" else F.normalize(g, dim=1)
        step = at.detach() + eps * (1 + math.cos(math.pi * k / steps)) * g - x
        step = step.clamp(-eps, eps) if norm == "linf" else step * (eps / step.norm(dim=1, keepdim=True)).clamp(max=1)
    assert 3 <= (margin_loss(model, best, y) > 0).sum() <= 13, "some survive"
    found = pgd(model, x, y, eps, norm=norm, loss=loss, steps=steps, generator=seeded(7))
    torch.testing.assert_close(found, best, rtol=0, atol=1e-9)


# ------------------------------------------------------------------------------------------------- ball and box
@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(NORMS), st.sampled_from(DTYPES), st.sampled_from(LOSSES), st.integers(0, 999),
    st.lists(st.floats(1e-6, 3), min_size=3, max_size=3), st.sampled_from([None, 1e-3, 0.3, 50.0]), st.booleans(),
    st.floats(0, 0.999), st.integers(1, 2), st.sampled_from([(12,), (3, 2, 2)]),
)  # fmt: skip
def test_momentum_and_any_start_stay_in_the_ball_and_the_box(
    norm, dtype, loss, seed, eps, step_size, random_start, momentum, restarts, shape
):
    model = nn.Sequential(nn.Flatten(), net(seed, dtype))
    x, y = predicted(model, 3, *shape, dtype=dtype, seed=seed)
    x[0] = x[0].round()  # corners of the box
    y = model(x).argmax(1)
    eps = torch.tensor(eps, dtype=dtype)
    more = dict(norm=norm, loss=loss, steps=4, step_size=step_size, restarts=restarts)
    point = pgd(model, x, y, eps, random_start=random_start, momentum=momentum, **more)
    assert (point.dtype, point.shape, point.requires_grad) == (x.dtype, x.shape, False)
    assert (length(point - x, norm) <= eps * (1 + 1e-6)).all()
    assert ((point >= 0) & (point <= 1)).all()
    step = fgsm(model, x, y, eps, norm=norm, loss=loss)
    assert (length(step - x, norm) <= eps * (1 + 1e-6)).all()
    assert ((step >= 0) & (step <= 1)).all()


# ----------------------------------------------------------------------------------------------------- strength
@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(NORMS), st.sampled_from(LOSSES), st.integers(0, 999), st.integers(1, 5), st.integers(1, 5),
    st.floats(0.01, 0.5), st.sampled_from([0.0, 0.9]), st.booleans(),
)  # fmt: skip
def test_more_steps_of_the_same_length_never_help_the_defender(norm, loss, seed, k, more, size, momentum, start):
    """The longer ascent passes the points of the shorter one, and the best is kept."""
    model = net(seed, torch.float64)
    x, y = predicted(model, 4, 12, dtype=torch.float64, seed=seed)
    same = dict(norm=norm, loss=loss, step_size=size, momentum=momentum, random_start=start)
    short, long = (margin_loss(model, pgd(model, x, y, 0.3, steps=s, **same), y) for s in (k, k + more))
    assert (long >= short - 1e-9).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("random_start", [True, False])
def test_the_falling_step_ends_at_the_worst_point_of_a_linear_network(norm, loss, momentum, random_start):
    """Within ε the margin loss grows by ε‖w‖ at most, in the dual norm; no sample is fooled at 0.9 of its radius."""
    model, x, y, radius = linear((12,), torch.float64, norm)
    point = pgd(model, x, y, 0.9 * radius, norm=norm, loss=loss, momentum=momentum, random_start=random_start, box=None)
    before, after = (margin_loss(model, at, y) for at in (x, point))
    assert (after < 0).all()
    torch.testing.assert_close(after, before * (1 - 0.9), rtol=1e-6, atol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_worst_point_of_a_linear_network_where_the_box_is_in_the_way(loss):
    """In L∞ the coordinates are free of each other: each goes as far as ε and the box let it."""
    model, x, y, _ = linear((1, 5, 5), torch.float64, "linf")
    w = (model[1].weight[1] - model[1].weight[0]).detach().view(1, 5, 5) * (1 - 2 * y).view(-1, 1, 1, 1)
    worst = (x + 0.08 * w.sign()).clamp(0, 1)
    alive = margin_loss(model, worst, y) < 0
    assert alive.sum() >= 5
    assert ((worst[alive] == 0) | (worst[alive] == 1)).any()
    torch.testing.assert_close(pgd(model, x, y, 0.08, norm="linf", loss=loss)[alive], worst[alive], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("norm", "eps"), [("l2", 0.5), ("linf", 0.1)])
def test_the_falling_step_finds_as_much_as_a_constant_one(norm, eps, digits):
    model, x, y = digits
    left = lambda **more: (margin_loss(model, pgd(model, x, y, eps, norm=norm, **more), y) <= 0).double().mean().item()
    falling, constant = left(), left(step_size=2.5 * eps / 20)
    assert 0.3 < falling < 0.9, "nothing to compare"
    assert falling <= constant + 0.005


@pytest.mark.parametrize(("norm", "eps", "name"), [("l2", 0.5, "L2PGD"), ("linf", 0.1, "LinfPGD")])
def test_foolbox_finds_as_much_with_the_same_settings(norm, eps, name, digits):
    """What may differ: foolbox counts the last point of each ascent, we any point on the way (ours may leave fewer
    samples right); we want a wrong answer to stand out from rounding (ours may leave more, but hardly ever).
    """
    foolbox = pytest.importorskip("foolbox")
    model, x, y = digits
    attack = getattr(foolbox.attacks, name)(abs_stepsize=eps / 5, steps=10, random_start=False)
    theirs = ~attack(foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu"), x, y, epsilons=eps)[2]
    point = pgd(model, x, y, eps, norm=norm, loss="ce", steps=10, step_size=eps / 5, random_start=False)
    ours = margin_loss(model, point, y) < 0
    accuracy = lambda right: right.double().mean().item()
    assert 0.3 < accuracy(theirs) < 0.9, "nothing to compare"
    assert accuracy(ours) == pytest.approx(accuracy(theirs), abs=0.015)
    assert (ours & ~theirs).sum() <= 1


# ---------------------------------------------------------------------------------------------- the model as found
@pytest.mark.parametrize(
    "attack", [fgsm, lambda *a: pgd(*a, steps=3, momentum=0.9, random_start=False)], ids=["fgsm", "momentum"]
)
def test_a_model_in_training_is_attacked_in_eval_mode_and_left_as_found(attack):
    model = cnn().train()
    model[3].eval()
    model[0].requires_grad_(False)
    x, y = predicted(model, 6, 1, 8, 8)
    modes = [module.training for module in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    found = attack(model, x, y, 0.1)
    assert not torch.equal(found, x)
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert len(set(modes)) == len(set(flags)) == 2
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items()), "running statistics"
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match="eps is -1"):
        attack(model, x, y, -1.0)
    assert [module.training for module in model.modules()] == modes
    with torch.no_grad():
        assert torch.equal(attack(model.eval().requires_grad_(False), x, y, 0.1), found), "dropout was off"


# --------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize("momentum", [-0.1, 1.0, 1.5, math.nan, math.inf])
def test_a_momentum_that_does_not_decay_is_named(momentum):
    model = net()
    with pytest.raises(ValueError, match=rf"momentum is {momentum}: use a number from 0 .* below 1"):
        pgd(model, *predicted(model, 2, 12), 0.1, momentum=momentum)


def test_a_step_that_never_ends_is_named():
    model = net()
    with pytest.raises(ValueError, match="step_size is inf: use a positive number, or None"):
        pgd(model, *predicted(model, 2, 12), 0.1, step_size=math.inf)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(eps=-0.1), r"eps is -0\.1: .*0 or more"),
        (dict(eps=torch.tensor([0.1, math.nan])), "eps is nan"),
        (dict(eps=math.inf), "eps is inf"),
        (dict(eps=torch.ones(2, 1)), r"eps has shape \(2, 1\).*\(2,\)"),
        (dict(norm="l1"), "unknown norm 'l1'.*did you mean 'l2'"),
        (dict(loss="crossentropy"), "unknown loss 'crossentropy': known are margin, ce"),
        (dict(x=torch.full((2, 12), -0.5)), r"x lies in \[-0\.5, -0\.5\], outside the box.*box=None"),
        (dict(x=torch.full((2, 3, 2, 2), 1.5), model=nn.Sequential(nn.Flatten(), net())), r"outside \[0, 1\]"),
        (dict(x=torch.zeros(2, 3, 2, 2, dtype=torch.uint8), model=nn.Flatten()), "uint8: divide by 255"),
        (dict(y=torch.tensor([0, 1, 2])), r"labels have shape \(3,\): expected \(2,\)"),
        (dict(y=torch.tensor([0, -1])), "labels run from -1"),
    ],
)
def test_bad_input_of_fgsm_is_named(change, message):
    arguments = dict(model=net(), x=torch.rand(2, 12), y=torch.tensor([0, 1]), eps=0.1) | change
    with pytest.raises(ValueError, match=message):
        fgsm(**arguments)
