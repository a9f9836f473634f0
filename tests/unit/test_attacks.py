"""Attacks against closed forms of linear networks, and the promises of the docstrings."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lcnn_utils.attacks import minimal_radius, perturb, pgd
from lcnn_utils.attacks.balls import _random_steps
from lcnn_utils.curvature import evaluating, scalar_of
from lcnn_utils.nn import mlp

NORMS = ("l2", "linf")
DTYPES = (torch.float32, torch.float64)


class Scale(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


def length(step: torch.Tensor, norm: str) -> torch.Tensor:
    return torch.linalg.vector_norm(step.flatten(1), 2 if norm == "l2" else math.inf, dim=1)


def margin_loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    with evaluating(model), torch.no_grad():
        return -scalar_of(model(x), y, "margin")


def net(seed: int = 0, dtype=torch.float32) -> nn.Sequential:
    """An MLP on 12 numbers with enough slope that the samples below can be fooled."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise((12, 24, 24, 4)):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1], Scale(5.0)).to(dtype)


def cnn(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Softplus(10), nn.Dropout(0.5),
        nn.Conv2d(8, 8, 3, stride=2), nn.Softplus(10), nn.Flatten(), nn.Linear(72, 4),
    )  # fmt: skip
    model(torch.rand(64, 1, 8, 8))  # fills the running statistics
    return model


def predicted(model: nn.Module, *shape: int, dtype=torch.float32, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples in [0, 1] and what the network says of them, taken for true."""
    x = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    with evaluating(model), torch.no_grad():
        return x, model(x).argmax(1)


def linear(shape: tuple[int, ...], dtype, norm: str):
    """A linear two-class network on images, samples, their labels and their exact distances from the boundary."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 2)).to(dtype)
    x, y = predicted(model, 12, *shape, dtype=dtype)
    w = (model[1].weight[0] - model[1].weight[1]).detach()
    return model, x, y, -margin_loss(model, x, y) / (w.norm() if norm == "l2" else w.abs().sum())


# ------------------------------------------------------------------------------------------------- closed forms
@pytest.mark.parametrize("shape", [(12,), (1, 5, 5)])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_linear_network_falls_at_its_margin_over_the_dual_norm(shape, norm, dtype):
    model, x, y, radius = linear(shape, dtype, norm)
    fooled = lambda eps, **more: margin_loss(model, pgd(model, x, y, eps, norm=norm, box=None, **more), y) > 0
    for loss in ("margin", "ce"):
        assert fooled(1.05 * radius, loss=loss).all()  # 20 steps of 2.5 ε/20 still point up to 10° aside in L2
        assert fooled(1.003 * radius, loss=loss, step_size=float(radius.max())).all()
        assert not fooled(0.999 * radius, loss=loss, restarts=3, step_size=float(radius.max())).any()
    found, point = minimal_radius(model, x, y, norm=norm, box=None)
    torch.testing.assert_close(found, radius, rtol=2e-3, atol=0)
    assert (found >= radius * (1 - 1e-5)).all()
    assert (margin_loss(model, point, y) > 0).all()


def test_minimal_radius_obeys_the_box_and_says_where_nothing_is_found():
    """Logits (x₁ − ½, 0): class 0 above ½, at distance x₁ − ½; and a threshold outside the box cannot be reached."""
    model = nn.Linear(2, 2)
    model.weight.data = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    x, y = torch.tensor([[0.9, 0.5], [0.6, 0.5], [0.2, 0.5]]), torch.zeros(3, dtype=torch.long)
    model.bias.data = torch.tensor([-0.5, 0.0])
    radius, point = minimal_radius(model, x, y)
    torch.testing.assert_close(radius, torch.tensor([0.4, 0.1, 0.0]), rtol=2e-3, atol=0)
    assert torch.equal(point[2], x[2])
    model.bias.data = torch.tensor([0.1, 0.0])
    radius, point = minimal_radius(model, x, y)
    assert radius.isinf().all()
    assert torch.equal(point, x)
    radius, _ = minimal_radius(model, x, y, box=None)
    torch.testing.assert_close(radius, x[:, 0] + 0.1, rtol=2e-3, atol=0)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("start", [1e-3, 0.05, 10.0])
def test_minimal_radius_is_a_real_step_that_pgd_confirms(norm, start):
    model = net()
    x, y = predicted(model, 24, 12)
    y[0] = (y[0] + 1) % 4
    radius, point = minimal_radius(model, x, y, norm=norm, start=start)
    assert radius[0] == 0
    assert torch.equal(point[0], x[0])
    assert (radius[1:].isfinite() & (radius[1:] > 0)).all()
    torch.testing.assert_close(radius, length(point - x, norm))
    assert ((point >= 0) & (point <= 1)).all()
    for i in range(24):  # alone, where products round differently
        assert model(point[i : i + 1]).argmax(1) != y[i]
    shorter = pgd(model, x, y, 0.9 * radius, norm=norm, restarts=5, steps=50)
    assert (margin_loss(model, shorter, y)[1:] > 0).sum() <= 3
    halfway = x + (point - x) * 0.99
    assert (margin_loss(model, halfway, y)[1:] < 0).all(), "not cut to its shortest wrong part"


# ------------------------------------------------------------------------------------------------- ball and box
@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(NORMS), st.sampled_from(DTYPES), st.sampled_from(["margin", "ce"]), st.integers(0, 999),
    st.lists(st.floats(0, 2) | st.floats(0, 1e-4), min_size=3, max_size=3), st.sampled_from([None, 1e-3, 0.3, 50.0]),
    st.booleans(),
)  # fmt: skip
def test_inside_the_ball_and_the_box_and_never_worse_than_x(norm, dtype, loss, seed, eps, step_size, boxed):
    model = net(seed, dtype)
    x, y = predicted(model, 3, 12, dtype=dtype, seed=seed)
    x[0] = x[0].round()  # corners of the box
    eps = torch.tensor(eps, dtype=dtype)
    box = (0.0, 1.0) if boxed else None
    point = pgd(model, x, y, eps, norm=norm, loss=loss, steps=4, restarts=2, step_size=step_size, box=box)
    assert (point.dtype, point.shape) == (x.dtype, x.shape)
    assert (length(point - x, norm) <= eps * (1 + 1e-6)).all()
    assert not boxed or ((point >= 0) & (point <= 1)).all()
    assert torch.equal(point[eps == 0], x[eps == 0])
    assert (margin_loss(model, point, y) >= margin_loss(model, x, y)).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("eps", [1e-3, 8 / 255])
def test_rounding_of_large_images_does_not_leave_the_ball(norm, eps):
    """Without care a float32 step of 1e-3 in 3,072 pixels is a few 1e-5 too long in L2, and 6e-5 in L∞."""
    torch.manual_seed(0)
    x = torch.rand(8, 3, 32, 32)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 2))
    y = model(x).argmax(1)
    moved = pgd(model, x, y, eps, norm=norm, steps=3)
    assert (length(moved - x, norm) <= eps * (1 + 1e-6)).all()
    assert (length(moved - x, norm) >= eps * 0.99).all()


@pytest.mark.parametrize("d", [1, 2, 5])
def test_starts_are_uniform_in_the_ball(d):
    """A share r^d of a uniform ball lies within r, in either norm; and directions average out."""
    x, eps = torch.zeros(20_000, d).double(), torch.full((20_000,), 0.5).double()
    for norm in NORMS:
        (step,) = _random_steps(x, eps, norm, 1, None)
        for r in (0.5, 0.8, 0.95):
            assert (length(step, norm) <= r * 0.5).double().mean().item() == pytest.approx(r**d, abs=0.015)
        assert (step.mean(0).abs() < 0.01).all()


# -------------------------------------------------------------------------------------- perturb: PGD for training
@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(DTYPES), st.integers(0, 999), st.floats(1e-4, 3), st.integers(1, 4), st.floats(1e-4, 50),
    st.sampled_from([None, (0.0, 1.0), (0.2, 0.8)]), st.sampled_from([(3, 12), (2, 3, 2, 2)]),
)  # fmt: skip
def test_perturb_stays_in_the_ball_and_the_box(dtype, seed, eps, steps, step_size, box, shape):
    model = nn.Sequential(nn.Flatten(), net(seed, dtype))
    x, y = predicted(model, *shape, dtype=dtype, seed=seed)
    x = x if box is None else x.clamp(*box)  # edges of the box
    moved = perturb(model, x, y, eps, steps=steps, step_size=step_size, box=box)
    assert (moved.dtype, moved.shape, moved.requires_grad) == (x.dtype, x.shape, False)
    assert (length(moved - x, "l2") <= eps * (1 + 1e-6)).all()
    assert box is None or ((moved >= box[0]) & (moved <= box[1])).all()


def test_perturb_climbs_a_linear_network_to_its_worst_point():
    """ℓ of two classes grows with (w₁ − w₀)·x: the worst point of the ball is x ± ε·w/‖w‖, whatever the start."""
    model, x, y, _ = linear((1, 5, 5), torch.float64, "l2")
    w = F.normalize((model[1].weight[1] - model[1].weight[0]).detach(), dim=0).view(1, 5, 5)
    worst = x + 0.3 * w * (1 - 2 * y).view(-1, 1, 1, 1)
    moved = perturb(model, x, y, 0.3, steps=300, step_size=0.03, box=None)
    torch.testing.assert_close(moved, worst, rtol=0, atol=1e-3)
    generator = torch.Generator().manual_seed(5)
    elsewhere = perturb(model, x, y, 0.3, steps=1, step_size=1e-3, box=None, generator=generator)
    assert (length(elsewhere - worst, "l2") > 0.05).any(), "one short step doesn't leave the random start"


def test_perturb_takes_its_steps_from_a_random_start():
    """Against PGD written out: uniform start, unit gradient, projection on the ball, in this order."""
    model = net(3, torch.float64)
    x, y = predicted(model, 8, 12, dtype=torch.float64)
    eps, size, steps = 0.2, 0.15, 4
    (at,) = _random_steps(x, x.new_full((8,), eps), "l2", 1, torch.Generator().manual_seed(7))
    for _ in range(steps):
        at = (x + at).requires_grad_()
        gradient = torch.autograd.grad(F.cross_entropy(model(at), y, reduction="sum"), at)[0]
        at = at.detach() + size * gradient / gradient.norm(dim=1, keepdim=True) - x
        at = at * (eps / at.norm(dim=1, keepdim=True)).clamp(max=1)
    generator = torch.Generator().manual_seed(7)
    moved = perturb(model, x, y, eps, steps=steps, step_size=size, box=None, generator=generator)
    torch.testing.assert_close(moved, x + at, rtol=1e-9, atol=1e-12)
    assert not torch.equal(moved, perturb(model, x, y, eps, steps=steps, step_size=size, box=None, generator=generator))


def test_perturb_uses_the_network_in_the_mode_it_is_in():
    model = cnn()
    x, y = predicted(model, 8, 1, 8, 8)
    statistics = model[1].running_mean.clone()
    perturb(model.eval(), x, y, 0.1, steps=2, step_size=0.1)
    assert torch.equal(model[1].running_mean, statistics)
    perturb(model.train(), x, y, 0.1, steps=2, step_size=0.1)
    assert not torch.equal(model[1].running_mean, statistics)
    assert all(p.grad is None for p in model.parameters()), "gradients of the weights aren't touched"


# ----------------------------------------------------------------------------------------------------- strength
@pytest.mark.parametrize("norm", NORMS)
def test_more_steps_and_more_restarts_never_help_the_defender(norm):
    model = net(1)
    x, y = predicted(model, 64, 12)
    eps = 0.4 if norm == "l2" else 0.12
    losses = lambda **more: margin_loss(model, pgd(model, x, y, eps, norm=norm, **more), y)
    gradient = torch.autograd.grad(-scalar_of(model(x.requires_grad_()), y, "margin").sum(), x)[0]
    x = x.detach()
    fgsm = gradient.sign() if norm == "linf" else F.normalize(gradient, dim=1)
    by_fgsm = margin_loss(model, (x + eps * fgsm).clamp(0, 1), y)
    one, ten, thrice = losses(steps=1, step_size=0.05), losses(steps=10, step_size=0.05), losses(steps=10, restarts=3)
    assert (ten >= one).all()  # same start, same step size: the first step is the same
    assert (ten > one).any()
    assert (thrice >= losses(steps=10)).all()
    assert (losses() > 0).sum() >= (by_fgsm > 0).sum() > 5
    assert (losses()[by_fgsm <= 0] >= by_fgsm[by_fgsm <= 0] - 0.02).double().mean() > 0.9
    counts = [int((margin_loss(model, pgd(model, x, y, e * eps, norm=norm), y) > 0).sum()) for e in (0.25, 0.5, 1, 2)]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


def test_confident_logits_hide_from_cross_entropy_but_not_from_the_margin():
    model = net(2)
    x, y = predicted(model, 64, 12)
    confident = nn.Sequential(model, Scale(1000.0))
    plain = pgd(model, x, y, 0.4, loss="margin")
    shouted = pgd(confident, x, y, 0.4, loss="margin")
    torch.testing.assert_close(shouted, plain, atol=1e-4, rtol=0)
    by_margin = (margin_loss(model, shouted, y) > 0).sum()
    saturated = pgd(confident, x, y, 0.4, loss="ce")
    assert saturated.isfinite().all()
    assert (margin_loss(model, saturated, y) > 0).sum() < by_margin / 2
    assert (margin_loss(model, pgd(model, x, y, 0.4, loss="ce"), y) > 0).sum() > by_margin / 2  # not a broken ce


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("factor", [0.0, 1e-36])
def test_gradients_that_are_zero_or_nearly_so(norm, factor):
    """0: nothing to follow, a point of the ball or x. 1e-36: its square is 0 in float32, its direction is not."""
    model = nn.Linear(6, 2)
    x = torch.rand(4, 6)
    y = model(x).argmax(1)
    w = (model.weight[1] - model.weight[0]).detach() * (1 - 2 * y[:, None])
    tiny = nn.Sequential(model, Scale(factor))
    point = pgd(tiny, x, y, 1e-2, norm=norm, box=None, step_size=1e-2)
    assert point.isfinite().all()
    assert (length(point - x, norm) <= 1e-2 * (1 + 1e-6)).all()
    if factor:
        steepest = F.normalize(w, dim=1) if norm == "l2" else w.sign()
        torch.testing.assert_close(point, x + 1e-2 * steepest, atol=2e-4, rtol=0)


# ------------------------------------------------------------------------------- what must not change the result
@pytest.mark.parametrize("norm", NORMS)
def test_a_sample_does_not_notice_its_neighbours(norm):
    """Other neighbours, of which more or fewer are fooled early: the same points, from the same starts."""
    model = net(4)
    x, y = predicted(model, 16, 12)
    eps = torch.linspace(0.05, 0.5, 16) * (1 if norm == "l2" else 0.4)
    other, others = x.clone(), y.clone()
    other[8:] = predicted(model, 8, 12, seed=9)[0]
    others[8:12] = (model(other[8:12]).argmax(1) + 1) % 4  # fooled from the beginning
    for attack in (
        lambda x, y: pgd(model, x, y, eps, norm=norm, restarts=3),
        lambda x, y: minimal_radius(model, x, y, norm=norm, steps=10)[1],
    ):
        a, b = attack(x, y), attack(other, others)
        torch.testing.assert_close(a[:8], b[:8], atol=1e-4, rtol=0)
        assert not torch.equal(a[8:], b[8:])


def test_a_wrong_sample_costs_nothing():
    seen = []
    model = net(5)
    x, y = predicted(model, 8, 12)
    y[:5] = (y[:5] + 1) % 4
    model.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    point = pgd(model, x, y, 1e-4, steps=3, restarts=2)
    assert torch.equal(point[:5], x[:5])
    assert set(seen[4:]) == {8, 3}  # after the model's check
    assert seen.count(3) == 2 * 4


def test_the_seed_alone_decides():
    model = net(6)
    x, y = predicted(model, 8, 12)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    seeded = lambda seed: pgd(model, x, y, 0.05, steps=2, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(pgd(model, x, y, 0.05, steps=2), pgd(model, x, y, 0.05, steps=2))
    assert torch.equal(pgd(model, x, y, 0.05, steps=2), seeded(0))
    assert not torch.equal(seeded(0), seeded(1))
    first, second = (minimal_radius(model, x, y, steps=5)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("attack", [lambda *a: pgd(*a, 0.2, steps=3), lambda *a: minimal_radius(*a, steps=3)[1]])
def test_the_model_is_left_as_found_even_in_training_and_without_gradients(attack):
    model = cnn().train()
    model[1].eval()
    x, y = predicted(model, 6, 1, 8, 8)
    modes = [module.training for module in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    copy = x.clone().requires_grad_()
    with torch.no_grad():
        quiet = attack(model, copy, y)
    assert torch.equal(quiet, attack(model, x, y))
    assert not quiet.requires_grad
    assert not torch.equal(quiet, x)
    assert copy.grad is None
    assert torch.equal(copy, x)
    assert [module.training for module in model.modules()] == modes
    assert len(set(modes)) == 2
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="eps is -1"):
        pgd(model, x, y, -1.0)
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("lcnn", [False, True])
def test_the_networks_of_the_lab_fall(lcnn):
    torch.manual_seed(0)
    model = mlp([64, 32, 4], lcnn=lcnn)
    model(torch.rand(64, 1, 8, 8))
    for network in (model, cnn()):
        x, y = predicted(network, 8, 1, 8, 8)
        radius, point = minimal_radius(network, x, y, steps=10)
        assert radius.isfinite().all()
        assert (margin_loss(network, point, y) > 0).all()
        assert (margin_loss(network, pgd(network, x, y, 1.5 * radius), y) > 0).all()


# --------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(eps=-0.1), r"eps is -0\.1: .*0 or more"),
        (dict(eps=math.nan), "eps is nan"),
        (dict(eps=torch.tensor([0.1, math.inf])), "eps is inf"),
        (dict(eps=torch.ones(3)), r"eps has shape \(3,\).*\(2,\)"),
        (dict(norm="l3"), "unknown norm 'l3'.*did you mean 'l2'"),
        (dict(loss="margins"), "unknown loss.*did you mean 'margin'"),
        (dict(steps=0), "steps must be a whole number of at least 1, got 0"),
        (dict(steps=2.5), "steps must be .* got 2.5"),
        (dict(restarts=0), "restarts must be"),
        (dict(step_size=0.0), r"step_size is 0\.0"),
        (dict(step_size=math.nan), "step_size is nan"),
        (dict(x=torch.full((2, 12), 1.5)), r"x lies in \[1\.5, 1\.5\], outside the box \(0\.0, 1\.0\).*box=None"),
        (dict(x=torch.rand(2, 12), box=(0.4, 0.6)), "outside the box"),
        (dict(x=torch.full((2, 12), math.nan)), "NaN"),
        (dict(x=torch.zeros(0, 12)), "at least one sample"),
        (dict(x=torch.rand(2, 12).double()), "float64.*float32"),
        (dict(y=torch.tensor([0, 4])), "4 classes"),
        (dict(y=torch.tensor([0])), "labels have shape"),
        (dict(y=torch.tensor([0.0, 1.0])), "labels are torch.float32"),
        (dict(model=nn.Unflatten(1, (3, 4))), r"logits of shape \(N, K\).*\(2, 3, 4\)"),
        (dict(model=nn.Sequential(net(), Scale(math.inf))), "not finite"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = dict(model=net(), x=torch.rand(2, 12), y=torch.tensor([0, 1]), eps=0.1) | change
    with pytest.raises(ValueError, match=message):
        pgd(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [(dict(start=0.0), r"start is 0\.0"), (dict(bisections=0), "bisections"), (dict(restarts=0), "restarts"),
     (dict(norm="linff"), "did you mean 'linf'"), (dict(box=(0.5, 0.6)), "outside the box")],
)  # fmt: skip
def test_bad_input_of_minimal_radius_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        minimal_radius(net(), torch.rand(2, 12), torch.tensor([0, 1]), **change)
