"""The worst step for the gradient: closed forms of quadratic networks, and the promises of the docstring."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lcnn_utils.curvature import SCALARS, evaluating, geometry, scalar_of
from lcnn_utils.nn import CenteredSoftplus, resnet
from lcnn_utils.saliency import curved_ways, worst_step

DTYPES = (torch.float32, torch.float64)


def net(seed: int = 0, dtype=torch.float64, d: int = 12) -> nn.Sequential:
    """A curved MLP on d numbers."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise((d, 24, 24, 4)):
        layers += [nn.Linear(a, b), CenteredSoftplus(8.0)]
    for layer in layers[::2]:
        layer.weight.data *= 2.0
    return nn.Sequential(*layers[:-1]).to(dtype)


def points(n: int, d: int = 12, dtype=torch.float64, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, d, generator=generator, dtype=dtype), torch.randint(0, 4, (n,), generator=generator)


class Quadratic(nn.Module):
    """Logits (½ xᵀAx, 0): the Hessian of logit 0, and of its margin, is A everywhere."""

    def __init__(self, matrix):
        super().__init__()
        self.matrix = matrix

    def forward(self, x):
        value = torch.einsum("ni,ij,nj->n", x, self.matrix, x) / 2
        return torch.stack([value, torch.zeros_like(value)], 1)


def change_of(model: nn.Module, x: torch.Tensor, y: torch.Tensor, eta: torch.Tensor, scalar: str) -> torch.Tensor:
    """‖∇f(x + η) − ∇f(x)‖."""
    gradients = []
    with evaluating(model):
        for at in (x, x + eta):
            at = at.detach().requires_grad_()
            gradients.append(torch.autograd.grad(scalar_of(model(at), y, scalar).sum(), at)[0])
    return (gradients[1] - gradients[0]).flatten(1).norm(dim=1)


def length(step: torch.Tensor) -> torch.Tensor:
    return step.flatten(1).norm(dim=1)


# ------------------------------------------------------------------------------------------------- closed forms
@settings(deadline=None, max_examples=20)
@given(
    st.sampled_from([9.0, -9.0]), st.lists(st.floats(-6, 6), max_size=9), st.integers(0, 999), st.floats(1e-6, 10),
    st.sampled_from(["logit", "margin"]),
)  # fmt: skip
def test_on_a_quadratic_network_the_worst_change_is_the_length_times_the_norm(top, rest, seed, eps, scalar):
    torch.manual_seed(seed)
    values = torch.tensor([top, *rest], dtype=torch.float64)
    q = torch.linalg.qr(torch.randn(len(values), len(values)).double())[0]
    x, y = torch.randn(3, len(values)).double(), torch.zeros(3).long()
    eta, change = worst_step(Quadratic(q @ torch.diag(values) @ q.T), x, y, eps, scalar=scalar, box=None)
    torch.testing.assert_close(change, torch.full((3,), 9 * eps).double(), rtol=1e-4, atol=0)
    torch.testing.assert_close((eta @ q[:, 0]).abs(), torch.full((3,), eps).double(), rtol=1e-3, atol=0)


def test_the_ascent_finds_the_curved_direction_from_any_start():
    torch.manual_seed(0)
    q = torch.linalg.qr(torch.randn(8, 8).double())[0]
    model, x = Quadratic(q @ torch.diag(torch.linspace(-3, 2, 8).double()) @ q.T), torch.randn(20, 8).double()
    starts = [torch.randn(20, 8).double()]
    first = change_of(model, x, torch.zeros(20).long(), 0.5 * starts[0] / length(starts[0])[:, None], "logit")
    _, change = worst_step(model, x, torch.zeros(20).long(), 0.5, scalar="logit", box=None, starts=starts, steps=60)
    assert (first < 0.9 * 1.5).all(), "the start is no solution"
    assert (change > 0.97 * 1.5).all()


def test_of_the_two_curved_ways_it_takes_the_one_that_the_box_leaves_open():
    """∇²f = diag(3, 1): along the first axis, to the side where there is room. Where neither is open in full, as far as
    the box lets it, and no further than its corner."""
    model, y = Quadratic(torch.diag(torch.tensor([3.0, 1.0]))), torch.zeros(3).long()
    x = torch.tensor([[0.0, 0.5], [0.9, 0.5], [0.5, 0.5]])
    eta, change = worst_step(model, x, y, 0.2, scalar="logit")
    torch.testing.assert_close(change, torch.full((3,), 0.6), rtol=1e-4, atol=0)
    torch.testing.assert_close(eta[:2], torch.tensor([[0.2, 0.0], [-0.2, 0.0]]), rtol=0, atol=1e-2)
    tight, less = worst_step(model, x[2:], y[2:], 0.2, scalar="logit", box=(0.45, 0.55))
    assert ((x[2:] + tight >= 0.45) & (x[2:] + tight <= 0.55)).all()
    assert 0.15 * (1 - 1e-5) <= less.item() <= math.hypot(0.15, 0.05) * (1 + 1e-5)


@pytest.mark.parametrize("scalar", SCALARS)
def test_a_tiny_step_changes_the_gradient_by_its_length_times_the_norm_of_the_hessian(scalar):
    model, (x, y) = net(), points(8)
    hessian = geometry(model, x, y, scalar=scalar, method="exact").hessian_norm
    for eps in (1e-6, 1e-4):
        _, change = worst_step(model, x, y, eps, scalar=scalar)
        torch.testing.assert_close(change / eps, hessian, rtol=1e-2, atol=0)


# ------------------------------------------------------------------------------------------------- ball and box
@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(DTYPES), st.sampled_from(SCALARS), st.integers(0, 999), st.booleans(),
    st.lists(st.floats(0, 2) | st.floats(0, 1e-4), min_size=3, max_size=3), st.integers(1, 4),
)  # fmt: skip
def test_inside_ball_and_box_as_good_as_it_says_and_never_below_a_start(dtype, scalar, seed, boxed, eps, steps):
    model, (x, y) = net(seed % 7, dtype), points(3, dtype=dtype, seed=seed)
    x[0] = x[0].round()  # corners of the box
    eps, box = torch.tensor(eps, dtype=dtype), (0.0, 1.0) if boxed else None
    starts = [torch.randn_like(x), torch.zeros_like(x), -torch.rand_like(x)]
    eta, change = worst_step(model, x, y, eps, scalar=scalar, steps=steps, box=box, starts=starts)
    assert (eta.dtype, eta.shape, eta.requires_grad, change.requires_grad) == (dtype, x.shape, False, False)
    assert (length(eta) <= eps * (1 + 1e-6)).all()
    assert not boxed or ((x + eta >= 0) & (x + eta <= 1)).all()
    scale = change_of(model, x, y, torch.full_like(x, 0.1), scalar).max()  # below which float32 sees only rounding
    noise = 1e-9 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(change, change_of(model, x, y, eta, scalar), rtol=noise, atol=noise * float(scale))
    for start in (starts[0], starts[2]):
        step = start * (eps / length(start))[:, None]
        allowed = ((x + step >= 0) & (x + step <= 1)).all(1) if boxed else torch.ones(3, dtype=torch.bool)
        assert (change >= change_of(model, x, y, step, scalar) - noise * scale)[allowed].all()


@pytest.mark.parametrize("eps", [1e-3, 0.1])
def test_rounding_of_large_images_does_not_leave_the_ball(eps):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 8), CenteredSoftplus(), nn.Linear(8, 2))
    x = torch.rand(4, 3, 32, 32)
    eta, _ = worst_step(model, x, None, eps, steps=2)
    assert (length(eta) <= eps * (1 + 1e-6)).all()
    assert (length(eta) >= eps * 0.98).all()


@pytest.mark.parametrize("scalar", ["loss", "logit"])
@pytest.mark.parametrize("eps", [1e-3, 0.01, 0.1, 0.3])
def test_beats_the_best_of_a_thousand_random_directions(eps, scalar):
    """Where the network is smooth over the length of the step: further out, and at kinks, luck may find more."""
    model, (x, y) = net(1), points(8, seed=1)
    _, change = worst_step(model, x, y, eps, scalar=scalar, box=None)
    xs, ys = x.repeat(1000, 1), y.repeat(1000)
    step = torch.randn_like(xs)
    best = change_of(model, xs, ys, eps * step / length(step)[:, None], scalar).view(1000, 8).amax(0)
    assert (change >= best).all(), change / best


def test_no_length_no_step_and_each_sample_its_own_length():
    model, (x, y) = net(), points(4)
    eta, change = worst_step(model, x, y, 0.0)
    assert torch.equal(eta, torch.zeros_like(x))
    assert torch.equal(change, torch.zeros(4).double())
    eps = torch.tensor([0.0, 1e-3, 0.01, 0.1], dtype=torch.float64)
    eta, change = worst_step(model, x, y, eps, box=None)
    torch.testing.assert_close(length(eta), eps, rtol=1e-2, atol=0)
    for i in range(4):
        alone = worst_step(model, x[i : i + 1], y[i : i + 1], eps[i].item(), box=None)[1]
        torch.testing.assert_close(alone, change[i : i + 1], rtol=1e-2, atol=0)


def test_a_step_in_a_flat_region_of_a_relu_network_goes_nowhere_bad():
    """The Hessian of a logit is 0, so no direction is worth following: the step stays in its ball."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.rand(3, 6)
    eta, change = worst_step(model, x, None, 1e-5, scalar="logit")
    assert eta.isfinite().all()
    assert (length(eta) <= 1e-5 * (1 + 1e-6)).all()
    assert (change < 1e-6).all()


# ------------------------------------------------------------------------------------------- what stays, what is named
def test_curved_ways_are_both_signs_of_unit_steps():
    model, (x, y) = net(), points(5)
    one, other = curved_ways(model, x, y, batch_size=2)
    assert torch.equal(one, -other)
    torch.testing.assert_close(length(one), torch.ones(5).double())
    want = geometry(model, x, y, method="exact").hessian_norm * 1e-6
    torch.testing.assert_close(change_of(model, x, y, 1e-6 * one, "loss"), want, rtol=1e-2, atol=0)


def test_batches_change_nothing_and_labels_default_to_the_prediction():
    model, (x, _) = net(2), points(7, seed=3)
    y, start = model(x).argmax(1), torch.randn(7, 12).double()
    eta, change = worst_step(model, x, y, 0.1, starts=[start])
    for batch_size in (1, 3):
        got = worst_step(model, x, None, 0.1, starts=iter([start]), batch_size=batch_size)
        torch.testing.assert_close(got[0], eta)
        torch.testing.assert_close(got[1], change)


def test_the_model_is_left_as_found():
    torch.manual_seed(0)
    model = resnet(10, num_classes=4, width=4, in_channels=1, image_size=8, lcnn=True)
    x = torch.rand(4, 1, 8, 8, requires_grad=True)
    for _ in range(10):
        model(torch.rand(64, 1, 8, 8))
    y = torch.arange(4)
    want = worst_step(copy.deepcopy(model).eval(), x, y, 0.1, steps=2)
    model.train()
    model[3].eval()
    modes = [module.training for module in model.modules()]
    before, pixels = {k: v.clone() for k, v in model.state_dict().items()}, x.detach().clone()
    got = worst_step(model, x, y, 0.1, steps=2)
    torch.testing.assert_close(got, want, msg="a network in training mode is measured in eval mode")
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(x, pixels)
    assert (x.requires_grad, x.grad) == (True, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(eps=-1.0), "eps is -1"),
        (dict(eps=math.nan), "eps is nan"),
        (dict(eps=math.inf), "eps is inf"),
        (dict(eps=torch.rand(3)), "eps has shape"),
        (dict(steps=0), "steps must be a whole number of at least 1, got 0"),
        (dict(batch_size=0), "batch_size must be"),
        (dict(scalar="margins"), "unknown scalar 'margins'.*did you mean 'margin'"),
        (dict(box=(0.3, 0.4)), r"outside the box \(0.3, 0.4\)"),
        (dict(x=torch.full((2, 12), math.nan).double()), "finite"),
        (dict(x=torch.rand(2, 12)), "float32.*float64"),
        (dict(y=torch.tensor([0, 4])), "4 classes"),
        (dict(y=torch.zeros(2)), "labels"),
    ],
)
def test_bad_input_is_named(change, message):
    x, y = points(2)
    with pytest.raises(ValueError, match=message):
        worst_step(net(), **(dict(x=x, y=y, eps=0.1) | change))
