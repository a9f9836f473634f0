"""What each method minimises, against naive implementations by torch.func in float64, sample by sample."""

import copy
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import seeded
from torch import nn
from torch.func import functional_call, grad

from lcnn_utils.attacks import perturb
from lcnn_utils.nn import CenteredSoftplus, LipschitzBatchNorm2d, spectral_normalize
from lcnn_utils.training import OBJECTIVES, Recipe, Training, objectives
from lcnn_utils.training.objectives import gradient_change, squared_gradient

LAMBDAS = dict(lambda_beta=0.3, lambda_gamma=0.2, lambda_grad=0.7, lambda_cure=0.4, h=0.6)
PENALISED = {
    "lcnn": Recipe(method="lcnn", **LAMBDAS),
    "gradreg": Recipe(method="gradreg", **LAMBDAS),
    "lcnn_gradreg": Recipe(method="lcnn_gradreg", **LAMBDAS),
    "cure": Recipe(method="cure", **LAMBDAS),
}
each_method = pytest.mark.parametrize("recipe", PENALISED.values(), ids=PENALISED)
each_penalty = pytest.mark.parametrize("recipe", [*PENALISED.values()][1:], ids=[*PENALISED][1:])
each_derivative = pytest.mark.parametrize("derivative", ["exact", "difference"])


@pytest.fixture
def cnn():
    """Smooth, in float64, with both kinds of BatchNorm (one γ < 1); its statistics are not those of the batch below."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), LipschitzBatchNorm2d(3, 0.5), nn.BatchNorm2d(3), nn.Softplus(5.0),
        nn.Conv2d(3, 4, 3, stride=2), LipschitzBatchNorm2d(4, 50.0), CenteredSoftplus(5.0),
        nn.Flatten(), nn.Linear(16, 4),
    ).double()  # fmt: skip
    for _ in range(5):
        net(0.5 + 0.5 * torch.rand(20, 1, 5, 5, dtype=torch.float64))
    return net


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(6, 1, 5, 5, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 1, 2])


@pytest.fixture
def points():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, 4, generator=generator).double(), torch.randint(0, 3, (16,), generator=generator)


def objective(net, batch, recipe, **more):
    return OBJECTIVES[recipe.method](net, *batch, **recipe.objective(), **more)


def naive(net, weights: dict, x, y, recipe) -> tuple[torch.Tensor, dict]:
    """The objective as a function of the weights, differentiable in them. All passes with the batch's statistics."""
    for m in (net[1], net[2], net[5]):  # torch.func cannot differentiate what moves statistics of its own
        m.momentum, m.track_running_stats = 0.0, False
    buffers = lambda x: {name: value + 0 * x.sum() for name, value in net.named_buffers() if value.is_floating_point()}
    total = lambda x: F.cross_entropy(functional_call(net, weights | buffers(x), (x,)), y, reduction="sum")
    length = lambda v: v.flatten(1).square().sum(1)
    loss = total(x) / len(x)
    terms, value = {"loss": loss}, loss
    if "lcnn" in recipe.method:
        terms["sum_beta"] = sum(w.exp() for name, w in weights.items() if name.endswith("log_beta"))
        terms["sum_abs_log_gamma"] = sum(w.abs() for name, w in weights.items() if name.endswith("log_gamma"))
        value = value + recipe.lambda_beta * terms["sum_beta"] + recipe.lambda_gamma * terms["sum_abs_log_gamma"]
    if "gradreg" in recipe.method:
        terms["squared_gradient"] = length(grad(total)(x)).mean()
        value = value + recipe.lambda_grad * terms["squared_gradient"]
    if recipe.method == "cure":
        sign = grad(total)(x).detach().sign()
        z = sign / length(sign).sqrt().view(-1, 1, 1, 1)
        terms["gradient_change"] = length(grad(total)(x + recipe.h * z) - grad(total)(x)).mean()
        value = value + recipe.lambda_cure * terms["gradient_change"]
    return value, terms


@each_method
def test_objectives_and_their_gradients_are_the_naive_ones(recipe, cnn, images):
    x, y = images
    weights = dict(cnn.named_parameters())
    expected, expected_terms = naive(copy.deepcopy(cnn), weights, x, y, recipe)
    slopes = torch.autograd.grad(expected, list(weights.values()))
    loss, terms = objective(cnn, images, recipe)
    accuracy = (copy.deepcopy(cnn)(x).argmax(1) == y).double().mean().item()
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(
        {name: term.item() for name, term in expected_terms.items()} | {"accuracy": accuracy}, rel=1e-6
    )
    assert not any(term.requires_grad for term in terms.values())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-7)
    for name, slope, found in zip(weights, slopes, torch.autograd.grad(loss, list(weights.values())), strict=True):
        torch.testing.assert_close(found, slope, rtol=1e-6, atol=1e-9, msg=name)


def penalty(cnn, images, recipe, step=objectives.STEP) -> tuple[float, torch.Tensor]:
    """A penalty alone and its gradient in all weights, where differences are taken over ``step``."""
    net, x, y = copy.deepcopy(cnn), images[0].clone().requires_grad_(), images[1]
    given = net, x, y, F.cross_entropy(net(x), y)
    if recipe.method == "cure":
        _, value = gradient_change(*given, recipe.h, recipe.derivative, step=step)
    else:
        _, value = squared_gradient(*given, recipe.derivative, step=step)
    gradients = torch.autograd.grad(value, list(net.parameters()), materialize_grads=True)
    return value.item(), torch.cat([g.flatten() for g in gradients])


@pytest.mark.parametrize(("name", "order", "off_by"), [("gradreg", 1, 0.05), ("cure", 2, 5e-3)])
def test_differences_come_near_the_exact_form(name, order, off_by, cnn, images):
    """Value and gradient: near at the step in use, and off by O(step) or, where they are central, by O(step²)."""
    cnn[1].gamma = 5.0  # nothing is clipped at the edge
    recipe, step = PENALISED[name], objectives.STEP
    value, gradient = penalty(cnn, images, recipe, step)
    off = []
    for part in (1, 2, 4):
        near, slope = penalty(cnn, images, replace(recipe, derivative="difference"), step / part)
        off.append([abs(near / value - 1), ((slope - gradient).norm() / gradient.norm()).item()])
    assert max(off[0]) < off_by
    for before, after in itertools.pairwise(off):
        assert np.divide(before, after) == pytest.approx(2**order, rel=0.3)


@each_penalty
@each_derivative
def test_a_penalty_leaves_the_net_as_the_first_pass_does(recipe, derivative, cnn, images):
    """Statistics, modes and momenta."""
    cnn[5].eval()  # whoever froze a layer finds it frozen
    expected, x = copy.deepcopy(cnn), images[0]
    settings = lambda net: [(m.training, getattr(m, "momentum", None)) for m in net.modules()]
    expected(x)
    loss, _ = objective(cnn, images, replace(recipe, derivative=derivative))
    assert settings(cnn) == settings(expected)
    assert all(torch.equal(p, w) for p, w in zip(cnn.parameters(), expected.parameters(), strict=True))
    assert all(p.grad is None for p in cnn.parameters())
    assert not x.requires_grad
    assert loss.requires_grad
    for name, value in expected.named_buffers():
        assert torch.equal(cnn.get_buffer(name), value), name


@pytest.mark.parametrize("norm", [lambda: nn.BatchNorm1d(8), lambda: spectral_normalize(nn.Linear(8, 8))])
@pytest.mark.parametrize("method", ["gradreg", "cure"])
@each_derivative
def test_statistics_and_spectral_norms_move_once_a_step(derivative, method, norm, points):
    """And the penalty by differences is near the exact one, as it is one function's."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), norm(), nn.Softplus(), nn.Linear(8, 3)).double()
    once, recipe = copy.deepcopy(net), Recipe(method=method, derivative=derivative)
    for _ in range(2):
        exact = list(objective(copy.deepcopy(net), points, replace(recipe, derivative="exact"))[1].values())[-1]
        value = list(objective(net, points, recipe)[1].values())[-1]
        once(points[0])
        assert value.item() == pytest.approx(exact.item(), rel=0.02)
        for name, statistic in once.named_buffers():
            assert torch.equal(net.get_buffer(name), statistic), name


@pytest.mark.parametrize(("progress", "part"), [(0.0, 0.1), (0.25, 0.55), (0.9, 1.0)])
def test_cures_step_grows_in_the_first_half(progress, part, cnn, images):
    recipe = Recipe(method="cure", h=0.8)
    value = objective(copy.deepcopy(cnn), images, recipe, progress=progress)[1]["gradient_change"].item()
    assert value == pytest.approx(penalty(cnn, images, replace(recipe, h=0.8 * part))[0], rel=1e-9)


@each_penalty
@each_derivative
def test_no_slope_no_penalty(recipe, derivative, cnn, images):
    """Constant logits: no direction to follow, and no division by zero on the way."""
    cnn[-1].weight.data.zero_()
    loss, terms = objective(cnn, images, replace(recipe, derivative=derivative, lambda_beta=0.0, lambda_gamma=0.0))
    assert terms.get("squared_gradient", terms.get("gradient_change")).item() == 0
    assert loss.item() == terms["loss"].item()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, list(cnn.parameters())))


def test_adversarial_trains_on_what_the_attack_found(cnn, images):
    """PGD in eval mode on the true labels."""
    x, y = images
    recipe = Recipe(method="adversarial", eps=0.5, attack_steps=4)
    attacked, inputs = copy.deepcopy(cnn), []
    hook = cnn.register_forward_pre_hook(lambda m, given: inputs.append((m.training, given[0].detach().clone())))
    loss, _ = objective(cnn, images, recipe, generator=seeded(3))
    hook.remove()
    assert (attacked.eval()(x).argmax(1) != y).any(), "the test needs labels that aren't the predicted"
    moved = perturb(attacked, x, y, 0.5, steps=4, step_size=2.5 * 0.5 / 4, generator=seeded(3))
    assert [training for training, _ in inputs] == [False] * 4 + [True]
    assert torch.equal(inputs[-1][1], moved)
    assert ((moved - x).flatten(1).norm(dim=1) <= 0.5 * (1 + 1e-6)).all()
    assert loss.item() == pytest.approx(F.cross_entropy(attacked.train()(moved), y).item(), rel=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(attacked.buffers(), cnn.buffers(), strict=True))
    assert all(m.training for m in cnn.modules())
    assert all(p.grad is None for p in cnn.parameters())


def test_images_of_an_attack_lie_in_the_box_and_points_anywhere(cnn, images, points):
    with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
        objective(cnn, (2 * images[0] - 1, images[1]), Recipe(method="adversarial"))
    x, final, net = 3 * points[0], [], nn.Linear(4, 3).double()
    net.register_forward_pre_hook(lambda _, given: final.append(given[0].detach()))
    objective(net, (x, points[1]), Training(method="adversarial", eps=0.2))
    lengths = (final[-1] - x).norm(dim=1)
    assert ((lengths > 0.1) & (lengths <= 0.2 * (1 + 1e-6))).all(), "none was cut by a box of [0, 1]"


class OneMask(nn.Module):
    """The net under one mask: that of a seed, in every pass."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        torch.manual_seed(7)
        return self.net(x)


@each_derivative
@pytest.mark.parametrize("method", ["gradreg", "cure"])
def test_all_passes_of_a_step_draw_one_mask(method, derivative):
    torch.manual_seed(0)
    dropout, x, y = nn.Dropout(0.5), torch.randn(8, 4).double(), torch.arange(8) % 3
    net = nn.Sequential(nn.Linear(4, 16), nn.Softplus(), dropout, nn.Linear(16, 3)).double()
    recipe = Recipe(dataset="moons", method=method, model="mlp", derivative=derivative)
    expected = list(
        OBJECTIVES[method](OneMask(net), x, y, **replace(recipe, derivative="exact").objective())[1].values()
    )
    torch.manual_seed(7)
    terms = list(OBJECTIVES[method](net, x, y, **recipe.objective())[1].values())
    assert [term.item() for term in terms] == pytest.approx([term.item() for term in expected], rel=0.03)
