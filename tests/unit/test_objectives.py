"""What each method minimises, against its formula: gradients by finite differences, one input or weight at a time."""

import contextlib
import copy
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lcnn_utils.attacks import perturb
from lcnn_utils.nn import CenteredSoftplus, LipschitzBatchNorm2d, norms_once_a_step
from lcnn_utils.training import OBJECTIVES, Recipe, build, objectives
from lcnn_utils.training.objectives import gradient_change, lcnn, squared_gradient, standard

BETAS, GAMMAS = (0.5, 3.0, 40.0), (0.25, 8.0)  # one γ below 1, where log γ < 0


@pytest.fixture
def net():
    torch.manual_seed(0)
    (b0, b1, b2), (g0, g1) = BETAS, GAMMAS
    return nn.Sequential(
        nn.Linear(4, 8), LipschitzBatchNorm2d(8, g0), CenteredSoftplus(b0),
        nn.Linear(8, 8), LipschitzBatchNorm2d(8, g1), CenteredSoftplus(b1),
        nn.Linear(8, 8), CenteredSoftplus(b2), nn.Linear(8, 3),
    ).double()  # fmt: skip


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, 4, generator=generator).double(), torch.randint(0, 3, (16,), generator=generator)


def cross_entropy(logits: torch.Tensor, y: torch.Tensor) -> float:
    z = logits.detach().numpy()
    return float(np.mean(np.log(np.exp(z).sum(1)) - z[np.arange(len(z)), y.numpy()]))


def test_standard_is_cross_entropy(net, batch):
    x, y = batch
    loss, terms = standard(net, x, y, Recipe())
    logits = net(x)
    assert loss.item() == pytest.approx(cross_entropy(logits, y), rel=1e-12)
    assert loss.requires_grad
    assert set(terms) == {"loss", "accuracy"}
    assert not any(term.requires_grad for term in terms.values())
    assert terms["loss"].item() == loss.item()
    assert terms["accuracy"].item() == pytest.approx(np.mean(logits.detach().numpy().argmax(1) == y.numpy()))


@pytest.mark.parametrize(("lambda_beta", "lambda_gamma"), [(0.0, 0.0), (1e-3, 1e-3), (0.3, 0.0), (0.0, 0.7)])
def test_lcnn_is_the_formula_by_hand(net, batch, lambda_beta, lambda_gamma):
    x, y = batch
    loss, terms = lcnn(net, x, y, Recipe(method="lcnn", lambda_beta=lambda_beta, lambda_gamma=lambda_gamma))
    sum_beta, sum_gamma = sum(BETAS), sum(abs(math.log(gamma)) for gamma in GAMMAS)
    expected = cross_entropy(net(x), y) + lambda_beta * sum_beta + lambda_gamma * sum_gamma
    assert loss.item() == pytest.approx(expected, rel=1e-7)  # log β is set in float32
    assert terms["sum_beta"].item() == pytest.approx(sum_beta, rel=1e-6)
    assert terms["sum_abs_log_gamma"].item() == pytest.approx(sum_gamma, rel=1e-6)
    assert terms["loss"].item() == pytest.approx(cross_entropy(net(x), y), rel=1e-12), "logged: cross-entropy alone"
    assert not any(term.requires_grad for term in terms.values())


def test_gradients_of_the_penalties(net, batch):
    """∂(λβ Σβ)/∂log β = λβ·β and ∂(λγ Σ|log γ|)/∂log γ = λγ·sign(log γ), on top of cross-entropy's."""
    recipe = Recipe(method="lcnn", lambda_beta=0.3, lambda_gamma=0.7)
    named = dict(net.named_parameters())
    with_penalty = torch.autograd.grad(lcnn(net, *batch, recipe)[0], list(named.values()))
    without = torch.autograd.grad(standard(net, *batch, recipe)[0], list(named.values()))
    extra = {name: (a - b) for name, a, b in zip(named, with_penalty, without, strict=True)}
    betas = [value.item() for name, value in extra.items() if name.endswith("log_beta")]
    gammas = [value.item() for name, value in extra.items() if name.endswith("log_gamma")]
    assert betas == pytest.approx([0.3 * beta for beta in BETAS], rel=1e-6)
    assert gammas == pytest.approx([0.7 * math.copysign(1, math.log(gamma)) for gamma in GAMMAS])
    rest = [value for name, value in extra.items() if not name.endswith(("log_beta", "log_gamma"))]
    assert all(torch.equal(value, torch.zeros_like(value)) for value in rest)


def test_a_net_without_our_layers_has_no_penalty(batch):
    net = nn.Linear(4, 3).double()
    loss, terms = lcnn(net, *batch, Recipe(method="lcnn", lambda_beta=1.0, lambda_gamma=1.0))
    assert loss.item() == standard(net, *batch, Recipe())[0].item()
    assert terms["sum_beta"].item() == terms["sum_abs_log_gamma"].item() == 0


# ---- penalties on gradients --------------------------------------------------------------------------------------


@pytest.fixture
def cnn():
    """Smooth, in float64, with both kinds of BatchNorm; its statistics are not those of the batch below."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Softplus(5.0),
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


def input_gradient(net, x, y, h=1e-5) -> torch.Tensor:
    """∂Σℓ/∂x by central differences, pixel by pixel, in the mode that the net is in."""
    net, slopes = copy.deepcopy(net), torch.empty(x.numel(), dtype=x.dtype)
    with torch.no_grad():
        for i in range(x.numel()):
            move = h * F.one_hot(torch.tensor(i), x.numel()).view_as(x)
            up, down = (F.cross_entropy(net(x + sign * move), y, reduction="sum") for sign in (1, -1))
            slopes[i] = (up - down) / (2 * h)
    return slopes.view_as(x)


def mean_square(v: torch.Tensor) -> float:
    return v.square().sum().item() / len(v)


def cure_by_hand(net, x, y, h) -> float:
    here = input_gradient(net, x, y)
    z = here.sign().flatten(1) / here.sign().flatten(1).norm(dim=1, keepdim=True)
    return mean_square(input_gradient(net, x + h * z.view_as(x), y) - here)


LAMBDAS = dict(lambda_beta=0.3, lambda_gamma=0.2, lambda_grad=0.7, lambda_cure=0.4, h=0.6)
REGULARISED = {
    "gradreg": Recipe(method="gradreg", **LAMBDAS),
    "lcnn_gradreg": Recipe(method="lcnn_gradreg", **LAMBDAS),
    "cure": Recipe(method="cure", **LAMBDAS),
    "cure in eval mode": Recipe(method="cure", penalty_eval=True, **LAMBDAS),
    "cure published": Recipe(method="cure", published=True, **LAMBDAS),
}
each_penalty = pytest.mark.parametrize("recipe", REGULARISED.values(), ids=REGULARISED)


def objective(net, batch, recipe, **more):
    return OBJECTIVES[recipe.method](net, *batch, recipe, **more)


@each_penalty
def test_penalties_are_their_formulas(recipe, cnn, images):
    net = copy.deepcopy(cnn)
    expected = {"loss": cross_entropy(net(images[0]), images[1])}  # and the statistics move, as in the first pass
    net.train(not recipe.penalty_eval)
    if recipe.method == "cure":
        expected["gradient_change"] = cure_by_hand(net, *images, recipe.h)
        total = expected["loss"] + 0.4 * expected["gradient_change"]
    else:
        expected["squared_gradient"] = mean_square(input_gradient(net, *images))
        total = expected["loss"] + 0.7 * expected["squared_gradient"]
    if recipe.method == "lcnn_gradreg":
        expected |= {"sum_beta": 5.0, "sum_abs_log_gamma": math.log(50)}
        total += 0.3 * 5.0 + 0.2 * math.log(50)
    loss, terms = objective(cnn, images, recipe)
    assert loss.item() == pytest.approx(total, rel=1e-6)
    assert set(terms) == {*expected, "accuracy"}
    assert {name: terms[name].item() for name in expected} == pytest.approx(expected, rel=1e-6)
    assert not any(term.requires_grad for term in terms.values())


@each_penalty
def test_gradients_of_penalties_in_the_weights(recipe, cnn, images):
    """Against differences of the objective along random directions in the space of all weights. Statistics at rest:
    what they owe to the weights is not followed."""
    cnn[1].momentum = cnn[4].momentum = 0.0
    net = copy.deepcopy(cnn)
    gradients = torch.autograd.grad(objective(net, images, recipe)[0], list(net.parameters()))
    torch.manual_seed(2)
    for _ in range(3):
        directions = [torch.randn_like(p) for p in net.parameters()]
        values = []
        for h in (1e-6, -1e-6):
            moved = copy.deepcopy(cnn)
            for p, direction in zip(moved.parameters(), directions, strict=True):
                p.data += h * direction
            values.append(objective(moved, images, recipe)[0].item())
        slope = sum((g * direction).sum().item() for g, direction in zip(gradients, directions, strict=True))
        assert slope == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5)


def penalty(cnn, images, recipe, step) -> tuple[float, torch.Tensor]:
    """A penalty alone and its gradient in all weights, where differences are taken over ``step``."""
    net, (x, y) = copy.deepcopy(cnn), images
    if recipe.method == "cure":
        value = gradient_change(net, x, y, recipe, recipe.h, step=step)
    else:
        x = x.clone().requires_grad_()
        _, value = squared_gradient(net, x, y, F.cross_entropy(net(x), y), recipe, step=step)
    return value.item(), torch.cat([g.flatten() for g in torch.autograd.grad(value, list(net.parameters()))])


@pytest.mark.parametrize(
    ("name", "order", "off_by"), [("gradreg", 1, 0.05), ("cure", 2, 5e-3), ("cure in eval mode", 2, 5e-3)]
)
def test_differences_come_near_the_exact_form(name, order, off_by, cnn, images):
    """Value and gradient: near at the step in use, and off by O(step) or, where they are central, by O(step²)."""
    recipe, step = REGULARISED[name], objectives.STEP
    value, gradient = penalty(cnn, images, recipe, step)
    off = []
    for part in (1, 2, 4):
        near, slope = penalty(cnn, images, replace(recipe, derivative="difference"), step / part)
        off.append([abs(near / value - 1), ((slope - gradient).norm() / gradient.norm()).item()])
    assert max(off[0]) < off_by
    for before, after in itertools.pairwise(off):
        assert np.divide(before, after) == pytest.approx(2**order, rel=0.3)


@each_penalty
@pytest.mark.parametrize("derivative", ["exact", "difference"])
def test_a_penalty_leaves_the_net_as_the_first_pass_does(recipe, derivative, cnn, images):
    """Statistics, modes and momenta; but the published CURE moves the statistics by its own passes, too."""
    x, _ = images
    cnn[4].eval()  # whoever froze a layer finds it frozen
    expected, modes = copy.deepcopy(cnn), [m.training for m in cnn.modules()]
    momenta = [m.momentum for m in cnn.modules() if hasattr(m, "momentum")]
    expected(x)
    weights = [p.detach().clone() for p in cnn.parameters()]
    loss, _ = objective(cnn, images, replace(recipe, derivative=derivative))
    assert [m.training for m in cnn.modules()] == modes
    assert [m.momentum for m in cnn.modules() if hasattr(m, "momentum")] == momenta == [0.1, 0.1]
    assert all(torch.equal(p, w) for p, w in zip(cnn.parameters(), weights, strict=True))
    assert all(p.grad is None for p in cnn.parameters())
    assert not x.requires_grad
    assert loss.requires_grad
    for name, value in expected.named_buffers():
        moved = recipe.published and name.startswith("1.")
        assert torch.equal(dict(cnn.named_buffers())[name], value) != moved, name


class Shaped(nn.Sequential):
    """A norm of samples of some shape, as a layer from (N, 8) to (N, 8)."""

    def __init__(self, norm, *shape):
        super().__init__(nn.Unflatten(1, shape), norm, nn.Flatten())


NORMS = {
    "BatchNorm1d": lambda m: nn.BatchNorm1d(8, momentum=m),
    "BatchNorm2d": lambda m: Shaped(nn.BatchNorm2d(2, momentum=m), 2, 2, 2),
    "BatchNorm3d": lambda m: Shaped(nn.BatchNorm3d(1, momentum=m), 1, 2, 2, 2),
    "SyncBatchNorm": lambda m: nn.SyncBatchNorm(8, momentum=m),
    "no statistics": lambda m: nn.BatchNorm1d(8, momentum=m, track_running_stats=False),
    "frozen": lambda m: nn.BatchNorm1d(8, momentum=m).eval(),
    "InstanceNorm1d": lambda m: Shaped(nn.InstanceNorm1d(2, momentum=m, track_running_stats=True), 2, 4),
    "InstanceNorm2d": lambda m: Shaped(nn.InstanceNorm2d(2, momentum=m, track_running_stats=True), 2, 2, 2),
    "LipschitzBatchNorm2d": lambda m: LipschitzBatchNorm2d(8, momentum=m),
    "spectral_norm": lambda m: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)),
}


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("method", ["gradreg", "cure"])
@pytest.mark.parametrize("derivative", ["exact", "difference"])
def test_the_statistics_of_every_norm_move_once_a_step(derivative, method, norm, momentum, batch):
    """And the penalty by differences is near the exact one, as it is one function's."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), NORMS[norm](momentum), nn.Softplus(), nn.Linear(8, 3)).double()
    once, recipe = copy.deepcopy(net), Recipe(method=method, derivative=derivative)
    for _ in range(3):
        expected = copy.deepcopy(net)
        value, exact = (
            list(objective(model, batch, chosen)[1].values())[-1].item()
            for model, chosen in ((net, recipe), (expected, replace(recipe, derivative="exact")))
        )
        once(batch[0])
        assert value == pytest.approx(exact, rel=0.02)
        for name, statistic in once.named_buffers():
            assert torch.equal(net.get_buffer(name), statistic), name
    settings = lambda net: [
        [getattr(m, name, None) for name in ("training", "momentum", "track_running_stats")] for m in net.modules()
    ]
    assert settings(net) == settings(once)


class AlwaysDropout(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5, training=True)


class OneMask(nn.Module):
    """The net under one mask: that of a seed, in every pass."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        torch.manual_seed(7)
        return self.net(x)


@each_penalty
@pytest.mark.parametrize("derivative", ["exact", "difference"])
@pytest.mark.parametrize(
    "dropout", [nn.Dropout(0.5), AlwaysDropout(), nn.RReLU(0.1, 0.9)], ids=lambda d: type(d).__name__
)
def test_all_passes_of_a_step_draw_one_mask(dropout, derivative, recipe, batch):
    torch.manual_seed(0)
    layers = [nn.Linear(4, 16), nn.Softplus(), dropout, nn.Linear(16, 16), nn.Softplus(), dropout, nn.Linear(16, 3)]
    net = nn.Sequential(*layers).double()
    expected = list(objective(OneMask(net), batch, recipe)[1].values())
    torch.manual_seed(7)
    terms = list(objective(net, batch, replace(recipe, derivative=derivative))[1].values())
    state = torch.get_rng_state()
    assert [term.item() for term in terms] == pytest.approx([term.item() for term in expected], rel=0.03)
    torch.manual_seed(7)
    net(batch[0])
    assert torch.equal(torch.get_rng_state(), state), "as after one pass: the next step's mask is another one"


@pytest.mark.parametrize("once", [True, False])
def test_a_difference_is_of_one_function(once):
    """In a loop of one's own too, where each training pass would move the directions of the spectral norms on: a change
    of σ between two passes would be divided by the step."""
    recipe = Recipe("digits", "lcnn_gradreg", width=4, derivative="difference")
    x = torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y, found = torch.arange(32) % 10, {}
    for derivative in ("exact", "difference"):
        model, generator = build(recipe).train(), torch.Generator().manual_seed(1)
        for p in model.parameters():  # after a step as large as that, no σ has converged
            p.data += 0.1 * torch.randn(p.shape, generator=generator) * (p.ndim > 1)
        with norms_once_a_step(model) if once else contextlib.nullcontext(lambda: None) as advance:
            advance()
            chosen = replace(recipe, derivative=derivative)
            found[derivative] = OBJECTIVES["lcnn_gradreg"](model, x, y, chosen)[1]["squared_gradient"].item()
    assert found["difference"] == pytest.approx(found["exact"], rel=0.1)


def test_the_published_cures_passes_are_two_more_in_training(cnn, images):
    inputs = []
    net = copy.deepcopy(cnn)
    hook = cnn.register_forward_pre_hook(lambda m, given: inputs.append((m.training, given[0].detach())))
    objective(cnn, images, REGULARISED["cure published"])
    hook.remove()
    assert [training for training, _ in inputs] == [True] * 3
    assert torch.equal(inputs[1][1], images[0])
    assert (inputs[2][1] - images[0]).flatten(1).norm(dim=1).tolist() == pytest.approx([0.6] * 6)
    for _, x in inputs:
        net(x)
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), cnn.buffers(), strict=True))


@pytest.mark.parametrize(
    ("published", "progress", "part"),
    [(False, 0.0, 0.1), (False, 0.25, 0.55), (False, 0.5, 1.0), (False, 0.9, 1.0), (True, 0.0, 1.0), (True, 0.7, 1.0)],
)
def test_cures_step_grows_in_the_first_half(published, progress, part, cnn, images, monkeypatch):
    seen, real = [], objectives.gradient_change
    watched = lambda *args, **more: (seen.append(args[-1]), real(*args, **more))[1]
    monkeypatch.setattr(objectives, "gradient_change", watched)
    recipe = Recipe(method="cure", h=0.8, published=published)
    objective(cnn, images, recipe, progress=progress)
    objective(cnn, images, recipe)
    assert seen == pytest.approx([0.8 * part, 0.8])


@each_penalty
@pytest.mark.parametrize("derivative", ["exact", "difference"])
def test_no_slope_no_penalty(recipe, derivative, cnn, images):
    """Constant logits: no direction to follow, and no division by zero on the way."""
    cnn[-1].weight.data.zero_()
    loss, terms = objective(cnn, images, replace(recipe, derivative=derivative, lambda_beta=0.0, lambda_gamma=0.0))
    assert terms.get("squared_gradient", terms.get("gradient_change")).item() == 0
    assert loss.item() == terms["loss"].item()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, list(cnn.parameters())))


@pytest.mark.parametrize("method", ["gradreg", "lcnn_gradreg", "minimal", "cure", "lcnn"])
def test_without_its_λ_a_method_is_the_standard_one(method, cnn, images):
    recipe = Recipe(method=method, lambda_beta=0, lambda_gamma=0, lambda_grad=0, lambda_cure=0)
    plain = standard(cnn, *images, recipe)[0].item()
    assert objective(cnn, images, recipe)[0].item() == pytest.approx(plain, rel=1e-12)


def test_which_objective_is_whose():
    assert OBJECTIVES["standard"] is OBJECTIVES["softplus_wd"] is OBJECTIVES["relu"] is standard
    assert OBJECTIVES["minimal"] is OBJECTIVES["lcnn_gradreg"]
    assert all(OBJECTIVES[name].__name__ == name for name in ("lcnn", "gradreg", "lcnn_gradreg", "cure", "adversarial"))


# ---- adversarial -------------------------------------------------------------------------------------------------


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("published", [False, True])
def test_adversarial_trains_on_what_the_attack_found(published, cnn, images):
    """PGD in eval mode on the true labels; published: short steps, predicted labels, in training mode throughout."""
    x, y = images
    recipe = Recipe(method="adversarial", eps=0.5, attack_steps=4, published=published)
    attacked, inputs = copy.deepcopy(cnn), []
    hook = cnn.register_forward_pre_hook(lambda m, given: inputs.append((m.training, given[0].detach().clone())))
    loss, terms = objective(cnn, images, recipe, generator=seeded())
    hook.remove()
    labels = attacked(x).argmax(1) if published else y
    assert published or (attacked.eval()(x).argmax(1) != y).any(), "the test needs labels that aren't the predicted"
    size = 0.01 if published else 2.5 * 0.5 / 4
    moved = perturb(attacked, x, labels, 0.5, steps=4, step_size=size, generator=seeded())
    assert [training for training, _ in inputs] == [published] * (5 if published else 4) + [True]
    assert torch.equal(inputs[-1][1], moved)
    assert loss.item() == pytest.approx(cross_entropy(attacked.train()(moved), y), rel=1e-12)
    assert set(terms) == {"loss", "accuracy"}
    assert all(torch.equal(a, b) for a, b in zip(attacked.buffers(), cnn.buffers(), strict=True))
    assert all(m.training for m in cnn.modules())
    assert all(p.grad is None for p in cnn.parameters())


def test_statistics_are_those_of_the_final_pass_alone_unless_published(cnn, images):
    for published in (False, True):
        net, final = copy.deepcopy(cnn), []
        net.register_forward_pre_hook(lambda _, given, final=final: final.append(given[0].detach()))
        objective(net, images, Recipe(method="adversarial", published=published), generator=seeded())
        once = copy.deepcopy(cnn)
        once(final[-1])
        pairs = zip(once.buffers(), net.buffers(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs) != published


def test_the_attack_stays_inside_and_is_felt(cnn, images):
    x, y = images
    cnn.eval()  # so that all losses are of one function
    losses = []
    for eps in (1e-6, 0.3, 1.0):
        final = []
        hook = cnn.register_forward_pre_hook(lambda _, given, final=final: final.append(given[0].detach()))
        loss, _ = objective(cnn, images, Recipe(method="adversarial", eps=eps, attack_steps=5), generator=seeded())
        hook.remove()
        losses.append(loss.item())
        assert ((final[-1] - x).flatten(1).norm(dim=1) <= eps * (1 + 1e-6)).all()
        assert ((final[-1] >= 0) & (final[-1] <= 1)).all()
    assert losses[0] == pytest.approx(F.cross_entropy(cnn(x), y).item(), rel=1e-4)
    assert losses == sorted(losses)
    assert losses[2] > losses[0] + 0.01


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda x: x * 255, "255"), (lambda x: 2 * x - 1, "-1"), (lambda x: x / 0, "NaN|inf"),
        (lambda x: (x * 255).byte(), "uint8"), (lambda x: 255 * x[:, 0], r"\(6, 5, 5\)"),
    ],
)  # fmt: skip
def test_images_that_no_attack_takes_are_refused(change, named, published, cnn, images):
    x, y = images
    x[0, 0, 0, :2] = torch.tensor([0.0, 1.0])
    with pytest.raises(ValueError, match=named):
        objective(cnn, (change(x), y), Recipe(method="adversarial", published=published))


def test_points_have_no_box(net, batch):
    x, y = 3 * batch[0], batch[1]
    final = []
    net.register_forward_pre_hook(lambda _, given: final.append(given[0].detach()))
    objective(net, (x, y), Recipe("moons", "adversarial", "mlp", eps=0.2))
    lengths = (final[-1] - x).norm(dim=1)
    assert ((lengths > 0.1) & (lengths <= 0.2 * (1 + 1e-6))).all(), "none was cut by a box of [0, 1]"


def test_random_starts_come_from_the_generator(cnn, images):
    recipe, generator = Recipe(method="adversarial", eps=0.3, attack_steps=1), seeded()
    value = lambda generator: objective(copy.deepcopy(cnn), images, recipe, generator=generator)[0].item()
    first, second = value(generator), value(generator)
    assert first == value(seeded()) != second
    state = torch.get_rng_state()
    assert value(None) == value(None)
    assert torch.equal(torch.get_rng_state(), state)
