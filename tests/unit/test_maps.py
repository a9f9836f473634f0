"""Saliency maps against autograd, closed forms of small networks, and the promises of the docstrings."""

import copy
import functools
import itertools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from captum.attr._core import deep_lift
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lcnn_utils.curvature import SCALARS
from lcnn_utils.nn import CenteredSoftplus, centered_softplus, mlp, resnet
from lcnn_utils.saliency import MAPS, explain

KINDS = {"lcnn": dict(lcnn=True), "standard": {}, "relu": dict(activation=nn.ReLU)}
EXACT = [method for method in MAPS if method != "smoothgrad"]  # without noise
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@functools.cache
def _trained_like(kind: str, family: str) -> nn.Module:
    """Random weights, but running statistics that fit: without them the logits hardly depend on the image."""
    torch.manual_seed(0)
    if family == "mlp":
        net = mlp([64, 16, 16, 4], **KINDS[kind])
    else:
        net = resnet(10, num_classes=4, width=4, in_channels=1, image_size=8, ordinary=kind == "relu", **KINDS[kind])
    net = net.double().train()
    for _ in range(40):
        net(torch.rand(64, 1, 8, 8).double())
    return net.eval()


def case(kind: str = "lcnn", family: str = "resnet", n: int = 5) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A network of the lab, images, and labels of which most are not what the network says."""
    x = torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    return copy.deepcopy(_trained_like(kind, family)), x, torch.arange(n) % 4


def linear(seed: int, d: int, classes: int = 3) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(d, classes).double()


class Quadratic(nn.Module):
    """Logits (½ xᵀAx, 0), with A symmetric."""

    def __init__(self, matrix):
        super().__init__()
        self.matrix = matrix

    def forward(self, x):
        value = torch.einsum("ni,ij,nj->n", x, self.matrix, x) / 2
        return torch.stack([value, torch.zeros_like(value)], 1)


def symmetric(d: int, seed: int = 0) -> torch.Tensor:
    half = torch.randn(d, d, generator=torch.Generator().manual_seed(seed)).double()
    return half + half.T


def logit_change(model: nn.Module, x: torch.Tensor, y: torch.Tensor, baseline: float) -> torch.Tensor:
    with torch.no_grad():
        return (model(x) - model(torch.full_like(x, baseline))).gather(1, y[:, None])[:, 0]


# ----------------------------------------------------------------------------------------------------- gradients
@pytest.mark.parametrize("scalar", SCALARS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_autograd_signs_included(kind, scalar):
    model, x, y = case(kind)
    at = x.clone().requires_grad_()
    logits = model(at)
    if scalar == "loss":
        f = F.cross_entropy(logits, y, reduction="sum")
    else:
        rivals = [torch.cat([row[:i], row[i + 1 :]]).max() for row, i in zip(logits, y.tolist(), strict=True)]
        own = logits.gather(1, y[:, None])[:, 0]
        f = (own - torch.stack(rivals)).sum() if scalar == "margin" else own.sum()
    want = torch.autograd.grad(f, at)[0]
    assert (want < 0).any(), "nothing negative to lose its sign"
    torch.testing.assert_close(explain(model, x, y, scalar=scalar), want)
    torch.testing.assert_close(explain(model, x, y, "input_x_gradient", scalar=scalar), x * want)


def test_a_falling_logit_has_a_negative_map_and_the_prediction_is_explained_by_default():
    model = nn.Linear(3, 2)
    model.weight.data, model.bias.data = torch.tensor([[-1.0, -2.0, 3.0], [0.0, 0.0, 0.0]]), torch.tensor([9.0, 0.0])
    for method in ("gradient", "input_x_gradient", "smoothgrad", "integrated_gradients", "deeplift"):
        torch.testing.assert_close(explain(model, torch.ones(2, 3), None, method), model.weight[[0, 0]].detach())
        assert (explain(model, torch.ones(2, 3), torch.ones(2).long(), method) == 0).all()


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 999), st.integers(1, 7), st.integers(1, 4), st.sampled_from([0.0, -1.0, 0.3]))
def test_on_a_linear_network_every_method_gives_its_closed_form(seed, d, n, baseline):
    model = linear(seed, d)
    x, y = torch.randn(n, d).double(), torch.randint(0, 3, (n,))
    w = model.weight.detach()[y]
    forms = {"gradient": w, "smoothgrad": w, "input_x_gradient": w * x}
    forms |= dict.fromkeys(("integrated_gradients", "deeplift"), w * (x - baseline))
    for method, want in forms.items():
        torch.testing.assert_close(explain(model, x, y, method, baseline=baseline, samples=3, steps=2), want)


# ------------------------------------------------------------------------------------------ integrated gradients
@pytest.mark.parametrize("baseline", [0.0, 0.7])
def test_integrated_gradients_of_a_quadratic_network(baseline):
    """The mean gradient on the way from b to x is A(x + b)/2."""
    matrix, x = symmetric(6), torch.randn(4, 6).double()
    got = explain(Quadratic(matrix), x, torch.zeros(4).long(), "integrated_gradients", baseline=baseline, steps=3)
    torch.testing.assert_close(got, (x - baseline) * ((x + baseline) @ matrix) / 2)


@pytest.mark.parametrize("scalar", ["logit", "loss"])
def test_integrated_gradients_sum_up_to_the_change_of_a_smooth_network(scalar):
    model, x, y = case("lcnn")
    maps = explain(model, x, y, "integrated_gradients", scalar=scalar, steps=64)
    with torch.no_grad():
        there, here = (model(at) for at in (x, torch.zeros_like(x)))
    f = (
        (lambda z: z.gather(1, y[:, None])[:, 0])
        if scalar == "logit"
        else functools.partial(F.cross_entropy, target=y, reduction="none")
    )
    torch.testing.assert_close(maps.flatten(1).sum(1), f(there) - f(here), rtol=1e-6, atol=1e-9)


# --------------------------------------------------------------------------------------------------- SmoothGrad
def test_smoothgrad_is_drawn_from_its_seed_and_leaves_the_global_generator_alone():
    model, x, y = case()
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = explain(model, x, y, "smoothgrad", seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(explain(model, x, y, "smoothgrad", seed=1), first)
    assert not torch.allclose(explain(model, x, y, "smoothgrad", seed=2), first)
    assert not torch.allclose(explain(model, x, y), first, rtol=1e-3)


@pytest.mark.parametrize("batch_size", [256, 5])
def test_smoothgrad_is_the_mean_gradient_over_gaussian_copies(batch_size):
    """∇(½‖x‖²) = x: the map is x plus the mean of the noise, of standard deviation noise/√samples."""
    x = torch.rand(40, 500).double()
    for samples, noise in ((1, 0.2), (16, 0.2), (16, 3.0)):
        map_ = explain(Quadratic(torch.eye(500).double()), x, torch.zeros(40).long(), "smoothgrad", samples=samples,
                       noise=noise, batch_size=batch_size)  # fmt: skip
        mean = (map_ - x) * math.sqrt(samples) / noise
        assert mean.std().item() == pytest.approx(1, abs=0.03), (samples, noise)
        assert mean[0].mean().abs() < 0.2
        assert torch.corrcoef(mean[:5]).fill_diagonal_(0).abs().max() < 0.2, "samples of a batch share their noise"


def test_smoothgrad_tends_to_the_gradient_when_its_noise_goes():
    model, x, y = case()
    plain = explain(model, x, y)
    far, near = ((explain(model, x, y, "smoothgrad", noise=s, samples=4) - plain).norm() for s in (1e-3, 1e-5))
    assert near < 0.02 * far < 0.02 * plain.norm()


# ----------------------------------------------------------------------------------------------------- DeepLift
@pytest.mark.parametrize("family", ["resnet", "mlp"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_deeplift_sums_up_to_the_change_of_the_logit_in_every_net_of_the_lab(kind, family, dtype):
    model, x, y = case(kind, family, n=16)
    model, x = model.to(dtype), x.to(dtype)
    for baseline in (0.0, 0.5):
        maps, change = explain(model, x, y, "deeplift", baseline=baseline), logit_change(model, x, y, baseline)
        gap = (maps.flatten(1).sum(1) - change).abs()
        assert (gap <= 1e-4 * change.abs().mean()).all(), gap / change
        assert dtype == torch.float32 or (gap <= 1e-8 * change.abs()).all()


def test_deeplift_gives_a_softplus_unit_the_slope_of_its_chord():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), CenteredSoftplus(3.0), nn.Linear(7, 2)).double()
    x, y, b = torch.randn(6, 5).double(), torch.arange(6) % 2, 0.2
    with torch.no_grad():
        z, z0 = model[0](x), model[0](torch.full_like(x, b))
        chord = (centered_softplus(z, 3.0) - centered_softplus(z0, 3.0)) / (z - z0)
        want = (x - b) * ((model[2].weight[y] * chord) @ model[0].weight)
    torch.testing.assert_close(explain(model, x, y, "deeplift", baseline=b), want, rtol=1e-6, atol=1e-9)


def test_captum_s_rules_are_put_back_even_after_an_error(monkeypatch):
    model, x, y = case()
    before = dict(deep_lift.SUPPORTED_NON_LINEAR)
    assert CenteredSoftplus not in before
    explain(model, x, y, "deeplift")
    assert before == deep_lift.SUPPORTED_NON_LINEAR
    with pytest.raises(ValueError, match="miss the change"):
        explain(Functional(), torch.rand(4, 6), None, "deeplift")
    assert before == deep_lift.SUPPORTED_NON_LINEAR
    own = lambda *_: None
    monkeypatch.setitem(deep_lift.SUPPORTED_NON_LINEAR, CenteredSoftplus, own)
    explain(model, x, y, "deeplift")
    assert deep_lift.SUPPORTED_NON_LINEAR[CenteredSoftplus] is own, "a rule that somebody else had set"


class Functional(nn.Module):
    def __init__(self, act=F.relu):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.act = nn.Linear(6, 12), nn.Linear(12, 3), act

    def forward(self, x):
        return self.b(self.act(self.a(x - 0.5)))


@pytest.mark.parametrize("act", [F.relu, lambda z: centered_softplus(z, 5.0), torch.tanh])
def test_deeplift_refuses_a_functional_layer_that_it_cannot_see(act):
    with pytest.raises(ValueError, match=r"functional.*Use integrated_gradients"):
        explain(Functional(act), torch.rand(8, 6), None, "deeplift")


@pytest.mark.parametrize("scalar", ["loss", "margin"])
def test_deeplift_explains_logits_only(scalar):
    model, x, y = case()
    with pytest.raises(ValueError, match=f"logits here: scalar='{scalar}'"):
        explain(model, x, y, "deeplift", scalar=scalar)


# ------------------------------------------------------------------------------------------- guided backpropagation
def test_guided_backprop_lets_only_positive_signals_through_relus():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 2)).double()
    x, y = torch.randn(6, 5).double(), torch.arange(6) % 2
    with torch.no_grad():
        want = ((model[0](x) > 0) * model[2].weight[y].clamp(min=0)) @ model[0].weight
    torch.testing.assert_close(explain(model, x, y, "guided_backprop"), want)


def test_guided_backprop_differs_from_the_gradient_of_a_relu_net():
    model, x, y = case("relu")
    guided, plain = explain(model, x, y, "guided_backprop"), explain(model, x, y)
    assert guided.isfinite().all()
    assert ((guided - plain).flatten(1).norm(dim=1) > 0.1 * plain.flatten(1).norm(dim=1)).all()
    torch.testing.assert_close(explain(model, x, y), plain, msg="hooks are left behind")


class Beside(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.relu = model, nn.ReLU()

    def forward(self, x):
        self.relu(x)
        return self.model(x)


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (case("lcnn")[0], "CenteredSoftplus"),
        (case("standard")[0], "CenteredSoftplus"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 4).double()), "none"),
        (Beside(nn.Sequential(nn.Flatten(), nn.Linear(64, 4).double())), "none"),
        (nn.Sequential(nn.Flatten(), nn.Softplus(), nn.ReLU(), nn.Linear(64, 4).double()), "Softplus"),
        (nn.Sequential(nn.Flatten(), nn.LeakyReLU(), nn.ReLU(), nn.Linear(64, 4).double()), "LeakyRelu"),
    ],
    ids=["lcnn", "standard", "linear", "unused", "mixed", "leaky"],
)
def test_guided_backprop_refuses_nets_where_it_would_be_the_gradient(model, named):
    with pytest.raises(ValueError, match=rf"nn.ReLU only.* has .*{named}"):
        explain(model, case()[1], None, "guided_backprop")


FUNCTIONS = {
    "Relu": (F.relu, torch.relu, torch.Tensor.relu, torch.Tensor.relu_, functools.partial(F.relu, inplace=True)),
    "Clamp": (lambda z: z.clamp(min=0), lambda z: z.clamp_(min=0), lambda z: torch.clamp_min(z, 0)),
    "Softplus": (F.softplus,), "CenteredSoftplus": (lambda z: centered_softplus(z, 5.0),),
    "Silu": (F.silu,), "Gelu": (F.gelu,), "LeakyRelu": (F.leaky_relu,), "Tanh": (torch.tanh,),
    "Hardtanh": (F.relu6,), "Threshold": (lambda z: F.threshold(z, 0.0, 0.0),),
}  # fmt: skip


@pytest.mark.parametrize(("named", "act"), [(name, act) for name, acts in FUNCTIONS.items() for act in acts])
@pytest.mark.parametrize("module", ["none", "before", "unused"])
def test_guided_backprop_refuses_activations_that_are_functions(named, act, module):
    model = Functional(act)
    if module == "before":
        model.a = nn.Sequential(model.a, nn.ReLU(), nn.Linear(12, 12))
    elif module == "unused":  # it runs as often as the function does, but the logits don't depend on it
        model = Beside(model)
    with pytest.raises(ValueError, match=rf"nn.ReLU only.* has {named}"):
        explain(model, torch.rand(4, 6), None, "guided_backprop")


class Twice(nn.Module):
    def __init__(self, inplace):
        super().__init__()
        self.a, self.b, self.c, self.relu = nn.Linear(5, 9), nn.Linear(9, 9), nn.Linear(9, 2), nn.ReLU(inplace)

    def forward(self, x):
        return self.c(self.relu(self.b(self.relu(self.a(x)))))


@pytest.mark.parametrize("inplace", [False, True])
def test_guided_backprop_of_one_relu_used_twice(inplace):
    torch.manual_seed(0)
    model, x, y = Twice(inplace).double(), torch.randn(6, 5).double(), torch.arange(6) % 2
    with torch.no_grad():
        first = model.a(x)
        signal = (model.b(first.relu()) > 0) * model.c.weight[y].clamp(min=0) @ model.b.weight
        want = (first > 0) * signal.clamp(min=0) @ model.a.weight
    torch.testing.assert_close(explain(model, x, y, "guided_backprop"), want)


def test_guided_backprop_takes_relu_nets_whose_layers_are_those_of_an_lcnn():
    """Spectral norms and the slopes of their BatchNorms cut weights off, which is no activation."""
    net = resnet(10, num_classes=4, width=4, in_channels=1, image_size=8, lcnn=True, activation=nn.ReLU)
    assert explain(net, torch.rand(2, 1, 8, 8), None, "guided_backprop").any()


def test_a_compiled_network_is_explained_like_the_network():
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
    model = nn.Sequential(*model, nn.Flatten(), nn.Linear(256, 3))
    compiled, x = torch.compile(model, backend="eager"), torch.rand(2, 1, 8, 8)
    for method in ("gradient", "guided_backprop", "gradcam"):  # the first runs it, so that it is compiled
        torch.testing.assert_close(explain(compiled, x, None, method), explain(model, x, None, method))


# ---------------------------------------------------------------------------------------------------- occlusion
@settings(deadline=None, max_examples=15)
@given(st.integers(0, 999), st.integers(1, 3), st.sampled_from([(4, 4), (5, 7)]), st.sampled_from([0.0, 0.5, -1.0]))
def test_occlusion_by_one_pixel_on_a_linear_network(seed, channels, size, baseline):
    """All channels are covered at once: each shows the change of all of them."""
    model = nn.Sequential(nn.Flatten(), linear(seed, channels * math.prod(size)).float())
    x, y = torch.rand(2, channels, *size), torch.tensor([2, 0])
    want = (model[1].weight.detach()[y].view_as(x) * (x - baseline)).sum(1, keepdim=True).expand_as(x)
    torch.testing.assert_close(explain(model, x, y, "occlusion", window=1, baseline=baseline), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [2, 3, 5, 8])
def test_occlusion_gives_a_pixel_the_mean_change_of_the_windows_over_it(window):
    model = nn.Sequential(nn.Flatten(), linear(0, 64).float())
    x, y, stride = torch.rand(3, 1, 8, 8), torch.arange(3), window // 2
    share = model[1].weight.detach()[y].view_as(x) * x
    total, count = torch.zeros_like(x), torch.zeros_like(x)
    starts = range(0, 8 - window + stride, stride)  # the last window may hang over the border
    for top, left in itertools.product(starts, starts):
        at = (..., slice(top, top + window), slice(left, left + window))
        total[at] += share[at].sum((2, 3), keepdim=True)
        count[at] += 1
    got = explain(model, x, y, "occlusion", window=window)
    torch.testing.assert_close(got, total / count, rtol=0, atol=1e-5)
    if window == 2:  # a quarter of the side
        assert torch.equal(explain(model, x, y, "occlusion"), got)


@pytest.mark.parametrize("window", [-1, 9])
def test_occlusion_names_a_window_that_does_not_fit(window):
    model, x, y = case()
    with pytest.raises(ValueError, match=f"window is {window}: use 1 to 8"):
        explain(model, x, y, "occlusion", window=window)


# ---------------------------------------------------------------------------------------------------- Grad-CAM
@pytest.mark.parametrize(("chosen", "at"), [(None, 4), (3, 3), (0, 0), (5, 5)])
def test_grad_cam_weighs_the_maps_of_a_layer_by_their_mean_gradient(chosen, at):
    """ResNet-10 on 8 × 8: maps of 8, 8, 4, 2, 1 pixels a side after modules 2 to 6; by default the last with 4."""
    model, x, y = case("lcnn")
    maps = model[: at + 1](x).detach().requires_grad_()
    gradient = torch.autograd.grad(model[at + 1 :](maps).gather(1, y[:, None]).sum(), maps)[0]
    small = (gradient.mean((2, 3), keepdim=True) * maps).sum(1, keepdim=True).detach()
    got = explain(model, x, y, "gradcam", layer=None if chosen is None else model[chosen])
    assert got.shape == (5, 1, 8, 8)
    assert (small < 0).any(), "nothing negative to lose its sign"
    torch.testing.assert_close(got, F.interpolate(small, (8, 8), mode="bilinear"))


def test_grad_cam_and_occlusion_need_images():
    model, x, y = case("lcnn", "mlp")
    with pytest.raises(ValueError, match="Grad-CAM needs a layer with maps of at least 4 × 4"):
        explain(model, x, y, "gradcam")
    for method in ("gradcam", "occlusion"):
        with pytest.raises(ValueError, match=r"needs images .* shape \(5, 64\)"):
            explain(model, x.flatten(1), y, method)


# ------------------------------------------------------------------------------- what must not change, nor be changed
@pytest.mark.parametrize("method", EXACT)
def test_batch_size_changes_nothing(method):
    model, x, y = case("relu" if method == "guided_backprop" else "lcnn", n=7)
    whole = explain(model, x, y, method)
    for batch_size in (1, 3, 7):
        torch.testing.assert_close(explain(model, x, y, method, batch_size=batch_size), whole)


def state(model: nn.Module) -> list:
    """What an explanation might leave behind, module by module."""
    found = []
    for name, module in model.named_modules():
        hooks = [tuple(getattr(module, kind)) for kind in HOOKS]
        flags = [(p.requires_grad, p.grad is None) for p in module.parameters(recurse=False)]
        found.append((name, module.training, sorted(vars(module)), hooks, flags))
    return found


@pytest.mark.parametrize("method", MAPS)
def test_network_and_images_are_left_as_found_and_nothing_warns(method):
    model, x, y = case("relu" if method == "guided_backprop" else "lcnn")
    want = explain(model, x, y, method)
    model.train()
    model[3].eval()
    next(model.parameters()).requires_grad_(False)
    seen = []
    model[2].register_forward_hook(lambda *_: seen.append(1))
    before, weights = state(model), {k: v.clone() for k, v in model.state_dict().items()}
    for wants_gradient in (False, True):
        given_x = x.clone().requires_grad_(wants_gradient)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got = explain(model, given_x, y, method)
        assert not got.requires_grad
        assert got.shape == x.shape
        assert torch.equal(given_x, x)
        assert (given_x.requires_grad, given_x.grad) == (wants_gradient, None)
        torch.testing.assert_close(got, want, msg="a network in training mode is explained in eval mode")
    assert state(model) == before
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert seen, "hooks of others go on working"


@pytest.mark.parametrize("method", MAPS)
def test_maps_can_be_made_where_gradients_are_switched_off(method):
    model, x, y = case("relu" if method == "guided_backprop" else "lcnn")
    want = explain(model, x, y, method)
    model.requires_grad_(False)
    with torch.no_grad():
        torch.testing.assert_close(explain(model, x, y, method), want)


@pytest.mark.parametrize("method", [method for method in EXACT if method != "guided_backprop"])
def test_one_image_alone_is_explained_as_among_others(method):
    model, x, y = case()
    torch.testing.assert_close(explain(model, x[3:4], y[3:4], method), explain(model, x, y, method)[3:4])


# ---------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.full((5, 1, 8, 8), 1.5).double()), r"\[0, 1\]"),
        (dict(x=torch.full((5, 1, 8, 8), math.nan).double()), "NaN"),
        (dict(x=torch.zeros(5, 1, 8, 8, dtype=torch.uint8)), "uint8"),
        (dict(x=torch.rand(5, 1, 8, 8)), "float32.*float64"),
        (dict(x=torch.rand(0, 1, 8, 8).double()), "at least one sample"),
        (dict(x=torch.rand(5, 2, 8, 8).double()), "does not take inputs"),
        (dict(y=torch.full((5,), 4)), "4 classes"),
        (dict(y=torch.arange(4)), "labels have shape"),
        (dict(y=torch.zeros(5)), "long"),
        (dict(method="gradcan"), "unknown method 'gradcan'.*did you mean 'gradcam'"),
        (dict(scalar="logits"), "unknown scalar 'logits'.*did you mean 'logit'"),
        (dict(samples=0), "samples must be a whole number of at least 1, got 0"),
        (dict(samples=1.5), "samples"),
        (dict(steps=0), "steps must be"),
        (dict(batch_size=0), "batch_size must be"),
        (dict(noise=0.0), "noise is 0.0"),
        (dict(noise=-1.0), "noise is -1.0"),
        (dict(noise=math.nan), "noise is nan"),
    ],
)
def test_bad_input_is_named(change, message):
    model, x, y = case()
    with pytest.raises(ValueError, match=message):
        explain(model, **(dict(x=x, y=y) | change))
