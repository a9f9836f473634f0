"""PGD against closed forms of linear networks, against PGD written out and foolbox's; its ball, its box, its model."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import cnn, length, linear, margin_loss, net, predicted, seeded
from torch import nn

from lcnn_utils.attacks import Headed, direction, fgsm, first_success, minimal_radius, move, perturb, pgd, project
from lcnn_utils.attacks.pgd import LOSSES, NORMS, mirror, random_steps
from lcnn_utils.curvature import scalar_of

DTYPES = (torch.float32, torch.float64)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("random_start", [True, False])
def test_the_worst_point_of_a_linear_network(norm, loss, random_start):
    """Within ε the margin loss grows by ε‖w‖ at most, in the dual norm: no sample is fooled within its radius."""
    model, x, y, radius = linear((1, 5, 5), torch.float64, norm)
    more = dict(norm=norm, loss=loss, random_start=random_start, box=None)
    after = margin_loss(model, pgd(model, x, y, 0.9 * radius, **more), y)
    torch.testing.assert_close(after, margin_loss(model, x, y) * (1 - 0.9), rtol=1e-6, atol=0)
    one_step = margin_loss(model, fgsm(model, x, y, 0.9 * radius, norm=norm, loss=loss, box=None), y)
    torch.testing.assert_close(one_step, after, rtol=1e-6, atol=0)
    assert (margin_loss(model, pgd(model, x, y, 1.003 * radius, **more), y) > 0).all()
    assert (margin_loss(model, pgd(model, x, y, 0.999 * radius, restarts=3, **more), y) < 0).all()


@pytest.mark.parametrize("norm", NORMS)
def test_as_many_starts_as_classes_fool_a_linear_network_wherever_it_can_be(norm):
    """Its radius is min_j m_j/‖w_y − w_j‖, often that of another class than the one whose logit is next."""
    torch.manual_seed(0)
    model = nn.Linear(20, 6).double()
    x, y = predicted(model, 200, 20, dtype=torch.float64)
    margins, ways = model(x).gather(1, y[:, None]) - model(x), model.weight[y][:, None] - model.weight
    order = 2 if norm == "l2" else 1
    radius, nearest = (margins / ways.norm(order, dim=2)).nan_to_num(torch.inf).detach().min(1)
    assert (model(x).topk(2).indices[:, 1] != nearest).double().mean() > 0.1
    attack = lambda factor, n: pgd(model, x, y, factor * radius, norm=norm, box=None, restarts=n)
    left = lambda factor, n: margin_loss(model, attack(factor, n), y) < 0
    assert left(0.999, 6).all()
    assert left(1.01, 1).any(), "the class that leads on the way is the wrong one"
    assert not left(1.01, 6).any()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("step_size", [None, 0.03])
def test_pgd_written_out(norm, loss, step_size):
    """Steps of ε(1 + cos πk/K) or of one length, onto the ball, into the box; the best point until fooled."""
    model = net(3, torch.float64)
    x, y = predicted(model, 16, 12, dtype=torch.float64)
    eps, steps = {"l2": 0.2, "linf": 0.05}[norm], 6
    (step,) = random_steps(x, x.new_full((16,), eps), norm, 1, seeded(7))
    best = x
    for k in range(steps + 1):
        at = (x + step).clamp(0, 1).requires_grad_()
        old, new = margin_loss(model, best, y), margin_loss(model, at, y)
        best = torch.where(((old < 0) & (new > old))[:, None], at.detach(), best)
        f = F.cross_entropy(model(at), y, reduction="sum") if loss == "ce" else -scalar_of(model(at), y, "margin").sum()
        g = torch.autograd.grad(f, at)[0]
        g = g.sign() if norm == "linf" else F.normalize(g, dim=1)
        step = at.detach() + (step_size or eps * (1 + math.cos(math.pi * k / steps))) * g - x
        step = step.clamp(-eps, eps) if norm == "linf" else step * (eps / step.norm(dim=1, keepdim=True)).clamp(max=1)
    assert 1 <= (margin_loss(model, best, y) > 0).sum() <= 13, "some survive, some don't"
    more = dict(norm=norm, loss=loss, steps=steps, step_size=step_size)
    torch.testing.assert_close(pgd(model, x, y, eps, generator=seeded(7), **more), best, rtol=0, atol=1e-9)


@settings(deadline=None, max_examples=20)
@given(
    st.sampled_from(NORMS), st.sampled_from(DTYPES), st.sampled_from(tuple(LOSSES)), st.integers(0, 999),
    st.lists(st.floats(0, 2) | st.floats(0, 1e-4), min_size=3, max_size=3), st.sampled_from([None, 1e-3, 0.3, 50.0]),
    st.booleans(), st.booleans(), st.sampled_from([(12,), (3, 2, 2)]),
)  # fmt: skip
def test_inside_ball_and_box_never_worse_than_x_and_more_steps_find_more(
    norm, dtype, loss, seed, eps, step_size, boxed, random_start, shape
):
    """The longer ascent of steps of one size passes the points of the shorter one, and the best is kept."""
    model = nn.Sequential(nn.Flatten(), net(seed, dtype))
    x, y = predicted(model, 3, *shape, dtype=dtype, seed=seed)
    x[0] = x[0].round()  # corners of the box
    eps, box = torch.tensor(eps, dtype=dtype), (0.0, 1.0) if boxed else None
    more = dict(norm=norm, loss=loss, box=box, step_size=step_size, random_start=random_start)
    short, *longer = (pgd(model, x, y, eps, steps=k, restarts=n, **more) for k, n in ((3, 1), (5, 1), (3, 2)))
    for point in (short, *longer):
        assert (point.dtype, point.shape, point.requires_grad) == (x.dtype, x.shape, False)
        assert (length(point - x, norm) <= eps * (1 + 1e-6)).all()
        assert not boxed or ((point >= 0) & (point <= 1)).all()
        assert torch.equal(point[eps == 0], x[eps == 0])
        assert (margin_loss(model, point, y) >= margin_loss(model, x, y)).all()
    if dtype == torch.float64 and step_size:
        for point in longer:
            assert (margin_loss(model, point, y) >= margin_loss(model, short, y) - 1e-9).all()


@pytest.mark.parametrize("d", [1, 2, 5])
def test_starts_are_uniform_in_the_ball(d):
    """A share r^d of a uniform ball lies within r, in either norm; and directions average out."""
    x, eps = torch.zeros(20_000, d).double(), torch.full((20_000,), 0.5).double()
    for norm in NORMS:
        (step,) = random_steps(x, eps, norm, 1, None)
        for r in (0.5, 0.8, 0.95):
            assert (length(step, norm) <= r * 0.5).double().mean().item() == pytest.approx(r**d, abs=0.015)
        assert (step.mean(0).abs() < 0.01).all()


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(NORMS), st.integers(0, 999), st.floats(1e-3, 2), st.sampled_from([1e-36, 1e-20, 1.0, 1e20]))
def test_the_parts_of_a_step(norm, seed, eps, factor):
    """A direction has length 1 at any scale; a projection is the nearest point of the ball; a mirrored step as long."""
    x, step = (torch.rand(4, 6, generator=seeded(seed + k)) for k in (0, 1))
    step = step - 0.5
    torch.testing.assert_close(length(direction(factor * step, norm), norm), torch.ones(4))
    torch.testing.assert_close(direction(factor * step, norm), direction(step, norm))
    assert not direction(0 * step, norm).any()
    near, radius = project(step, torch.full((4,), eps), norm), length(step, norm)
    torch.testing.assert_close(length(near, norm), radius.clamp(max=eps))
    other = project(torch.randn(4, 6, generator=seeded(seed + 2)), torch.full((4,), eps), norm)
    assert (length(step - near, "l2") <= length(step - other, "l2") + 1e-6).all()
    folded = mirror(x, step, (0.0, 1.0))
    assert torch.equal(folded.abs(), step.abs())
    assert ((x + folded >= 0) & (x + folded <= 1)).all()
    inside = (x + step >= 0) & (x + step <= 1)
    assert torch.equal(folded[inside], step[inside])
    assert torch.equal(mirror(x, step, None), step)
    torch.testing.assert_close(move(x, step, (0.2, 0.8)), (x + step).clamp(0.2, 0.8))


def test_perturb_written_out():
    """Uniform start, unit gradient, projection on the ball, into the box; in the mode in which the network is."""
    model = net(3, torch.float64)
    x, y = predicted(model, 8, 12, dtype=torch.float64)
    eps, size, steps = 0.2, 0.15, 4
    (at,) = random_steps(x, x.new_full((8,), eps), "l2", 1, seeded(7))
    at = (x + at).clamp(0, 1)
    for _ in range(steps):
        at.requires_grad_()
        gradient = torch.autograd.grad(F.cross_entropy(model(at), y, reduction="sum"), at)[0]
        step = at.detach() + size * F.normalize(gradient, dim=1) - x
        at = (x + step * (eps / step.norm(dim=1, keepdim=True)).clamp(max=1)).clamp(0, 1)
    moved = perturb(model, x, y, eps, steps=steps, step_size=size, generator=seeded(7))
    torch.testing.assert_close(moved, at, rtol=1e-9, atol=1e-12)
    assert not moved.requires_grad
    model = cnn()
    x, y = predicted(model, 8, 1, 8, 8)
    statistics = model[1].running_mean.clone()
    perturb(model.eval(), x, y, 0.1, steps=2, step_size=0.1)
    assert torch.equal(model[1].running_mean, statistics)
    perturb(model.train(), x, y, 0.1, steps=2, step_size=0.1)
    assert not torch.equal(model[1].running_mean, statistics)
    assert all(p.grad is None for p in model.parameters())


def test_the_seed_alone_decides():
    model = net(6)
    x, y = predicted(model, 8, 12)
    attack = lambda seed, **more: pgd(model, x, y, 0.05, steps=2, generator=seeded(seed), **more)
    assert torch.equal(pgd(model, x, y, 0.05, steps=2), attack(0))
    assert not torch.equal(attack(0), attack(1))
    assert torch.equal(attack(0, random_start=False), attack(1, random_start=False)), "nothing is drawn"


@pytest.mark.parametrize("change", [lambda z: z + 1e6, lambda z: z.bfloat16(), lambda z: F.pad(z, (0, 1), value=-1e12)])
def test_neither_a_common_shift_nor_rounding_nor_a_class_ruled_out_hides_anything(change):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(20, 30), nn.Softplus(), nn.Linear(30, 5))
    x = torch.rand(200, 20, generator=seeded())
    with torch.no_grad():
        plain[2].bias -= plain(x).mean(0)
    y = plain(x).argmax(1)
    survive = lambda net: first_success(net, x, y, [0.2]).isinf().double().mean().item()
    assert 0.1 < survive(plain) < 0.9
    assert survive(Headed(plain, change)) <= survive(plain) + 0.02


@pytest.mark.parametrize("lowest", [1.0, 0.0, -10.0])
def test_an_exact_tie_counts_against_the_network(lowest):
    """[1, 1, lowest], whatever argmax makes of it; where another class leads, it is wrong at x without an attack."""
    tied, led = (
        Headed(nn.Linear(3, 3), lambda z, first=first: 0 * z + torch.tensor([1.0, first, lowest]))
        for first in (1.0, 1.0 + 1e-6)
    )
    x, y = torch.rand(5, 3), torch.tensor([0, 1, 0, 1, 0])
    assert torch.equal(minimal_radius(tied, x, y, restarts=1)[0], torch.zeros(5))
    assert torch.equal(minimal_radius(led, x, y, restarts=1)[0] == 0, y == 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(eps=-0.1), "eps"), (dict(eps=math.nan), "eps"), (dict(eps=torch.ones(3)), "eps"),
        (dict(norm="l3"), "norm"), (dict(loss="margins"), "loss"), (dict(steps=0), "steps"),
        (dict(restarts=0), "restarts"), (dict(step_size=0.0), "step_size"),
        (dict(x=torch.full((2, 12), 1.5)), "outside the box"),
    ],
)  # fmt: skip
def test_bad_input_is_named(change, message):
    arguments = dict(model=net(), x=torch.rand(2, 12), y=torch.tensor([0, 1]), eps=0.1) | change
    with pytest.raises(ValueError, match=message):
        pgd(**arguments)
