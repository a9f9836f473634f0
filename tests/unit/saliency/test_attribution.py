"""Saliency maps against autograd, closed forms of small networks, and the promises of the docstring."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import KINDS, Quadratic, case
from torch import nn

from lcnn_utils.curvature import SCALARS
from lcnn_utils.nn import CenteredSoftplus, centered_softplus
from lcnn_utils.saliency import MAPS, explain

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Functional(nn.Module):
    """An activation that is a function."""

    def __init__(self, act):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.act = nn.Linear(6, 12), nn.Linear(12, 3), act

    def forward(self, x):
        return self.b(self.act(self.a(x - 0.5)))


@pytest.mark.parametrize("scalar", SCALARS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_autograd_signs_included(kind, scalar):
    model, x, y = case(kind)
    at = x.clone().requires_grad_()
    logits = model(at)
    own = logits.gather(1, y[:, None])[:, 0]
    rivals = torch.stack([torch.cat([z[:i], z[i + 1 :]]).max() for z, i in zip(logits, y.tolist(), strict=True)])
    f = {"loss": F.cross_entropy(logits, y, reduction="sum"), "margin": (own - rivals).sum(), "logit": own.sum()}
    want = torch.autograd.grad(f[scalar], at)[0]
    assert (want < 0).any(), "nothing negative to lose its sign"
    torch.testing.assert_close(explain(model, x, y, scalar=scalar), want)
    torch.testing.assert_close(explain(model, x, y, "input_x_gradient", scalar=scalar), x * want)


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 999), st.integers(1, 7), st.integers(1, 4), st.sampled_from([0.0, -1.0, 0.3]), st.booleans())
def test_on_a_linear_network_every_method_gives_its_closed_form(seed, d, n, baseline, predicted):
    torch.manual_seed(seed)
    model = nn.Linear(d, 3).double()
    x = torch.randn(n, d).double()
    y = model(x).argmax(1) if predicted else torch.randint(0, 3, (n,))
    w = model.weight.detach()[y]
    forms = {"gradient": w, "smoothgrad": w, "input_x_gradient": w * x}
    forms |= dict.fromkeys(("integrated_gradients", "deeplift"), w * (x - baseline))
    for method, want in forms.items():
        got = explain(model, x, None if predicted else y, method, baseline=baseline, samples=3, steps=2)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("baseline", [0.0, 0.7])
def test_integrated_gradients_of_a_quadratic_network(baseline):
    """The mean gradient on the way from b to x is A(x + b)/2."""
    half, x = torch.randn(6, 6).double(), torch.randn(4, 6).double()
    matrix = half + half.T
    got = explain(Quadratic(matrix), x, torch.zeros(4).long(), "integrated_gradients", baseline=baseline, steps=3)
    torch.testing.assert_close(got, (x - baseline) * ((x + baseline) @ matrix) / 2)


@pytest.mark.parametrize(("samples", "noise", "batch_size"), [(1, 0.2, 256), (16, 3.0, 5)])
def test_smoothgrad_is_the_mean_gradient_over_gaussian_copies(samples, noise, batch_size):
    """∇(½‖x‖²) = x: the map is x plus the mean of the noise, of standard deviation noise/√samples."""
    x, y = torch.rand(40, 500).double(), torch.zeros(40).long()
    model, options = Quadratic(torch.eye(500).double()), dict(samples=samples, noise=noise, batch_size=batch_size)
    map_ = explain(model, x, y, "smoothgrad", seed=1, **options)
    mean = (map_ - x) * math.sqrt(samples) / noise
    assert mean.std().item() == pytest.approx(1, abs=0.06)
    assert torch.corrcoef(mean[:5]).fill_diagonal_(0).abs().max() < 0.2, "samples of a batch share their noise"
    assert torch.equal(explain(model, x, y, "smoothgrad", seed=1, **options), map_)
    assert not torch.allclose(explain(model, x, y, "smoothgrad", seed=2, **options), map_)


@pytest.mark.parametrize("family", ["resnet", "mlp"])
@pytest.mark.parametrize("kind", KINDS)
def test_deeplift_sums_up_to_the_change_of_the_logit_in_every_net_of_the_lab(kind, family):
    model, x, y = case(kind, family, n=8)
    for baseline in (0.0, 0.5):
        with torch.no_grad():
            change = (model(x) - model(torch.full_like(x, baseline))).gather(1, y[:, None])[:, 0]
        total = explain(model, x, y, "deeplift", baseline=baseline).flatten(1).sum(1)
        torch.testing.assert_close(total, change, rtol=1e-8, atol=1e-9)


def test_deeplift_gives_a_softplus_unit_the_slope_of_its_chord():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), CenteredSoftplus(3.0), nn.Linear(7, 2)).double()
    x, y, b = torch.randn(6, 5).double(), torch.arange(6) % 2, 0.2
    with torch.no_grad():
        z, z0 = model[0](x), model[0](torch.full_like(x, b))
        chord = (centered_softplus(z, 3.0) - centered_softplus(z0, 3.0)) / (z - z0)
        want = (x - b) * ((model[2].weight[y] * chord) @ model[0].weight)
    torch.testing.assert_close(explain(model, x, y, "deeplift", baseline=b), want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("act", [F.relu, lambda z: centered_softplus(z, 5.0), torch.tanh])
def test_deeplift_refuses_what_it_cannot_see(act):
    with pytest.raises(ValueError, match=r"functional.*Use integrated_gradients"):
        explain(Functional(act), torch.rand(8, 6), None, "deeplift")
    with pytest.raises(ValueError, match="logits here: scalar='loss'"):
        explain(Functional(act), torch.rand(8, 6), None, "deeplift", scalar="loss")


@pytest.mark.parametrize(("window", "baseline"), [(2, 0.0), (3, 0.5)])
def test_occlusion_gives_a_pixel_the_mean_change_of_the_windows_over_it(window, baseline):
    """All channels are covered at once: each shows the change of all of them."""
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Flatten(), nn.Linear(128, 3)), torch.rand(3, 2, 8, 8), torch.arange(3)
    share = (model[1].weight.detach()[y].view_as(x) * (x - baseline)).sum(1, keepdim=True)
    total, count, stride = torch.zeros_like(share), torch.zeros_like(share), max(1, window // 2)
    for top in range(0, 8 - window + stride, stride):  # the last window may hang over the border
        for left in range(0, 8 - window + stride, stride):
            at = (..., slice(top, top + window), slice(left, left + window))
            total[at] += share[at].sum((2, 3), keepdim=True)
            count[at] += 1
    got = explain(model, x, y, "occlusion", window=window, baseline=baseline)
    torch.testing.assert_close(got, (total / count).expand_as(x), rtol=0, atol=1e-5)
    if window == 2:  # a quarter of the side
        assert torch.equal(explain(model, x, y, "occlusion"), got)


@pytest.mark.parametrize(("chosen", "at"), [(None, 4), (3, 3)])
def test_grad_cam_weighs_the_maps_of_a_layer_by_their_mean_gradient(chosen, at):
    """ResNet-10 on 8 × 8: maps of 8, 8, 4, 2, 1 pixels a side after modules 2 to 6; by default the last with 4."""
    model, x, y = case("lcnn")
    maps = model[: at + 1](x).detach().requires_grad_()
    gradient = torch.autograd.grad(model[at + 1 :](maps).gather(1, y[:, None]).sum(), maps)[0]
    small = (gradient.mean((2, 3), keepdim=True) * maps).sum(1, keepdim=True).detach()
    got = explain(model, x, y, "gradcam", layer=None if chosen is None else model[chosen])
    assert (small < 0).any(), "nothing negative to lose its sign"
    torch.testing.assert_close(got, F.interpolate(small, (8, 8), mode="bilinear"))


def state(model: nn.Module) -> list:
    """What an explanation might leave behind, module by module."""
    hooks = lambda module: [tuple(getattr(module, kind)) for kind in HOOKS]
    flags = [(p.requires_grad, p.grad is None) for p in model.parameters()]
    return [flags, *((name, m.training, sorted(vars(m)), hooks(m)) for name, m in model.named_modules())]


@pytest.mark.parametrize("method", MAPS)
def test_network_and_images_are_left_as_found_and_batches_change_nothing(method):
    model, x, y = case("lcnn")
    want = explain(model, x, y, method)
    assert want.shape == x.shape
    if method != "smoothgrad":  # whose noise depends on the place in the batch
        torch.testing.assert_close(explain(model, x, y, method, batch_size=2), want)
    model.train()
    model[3].eval()
    next(model.parameters()).requires_grad_(False)
    before, weights, generator = state(model), copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        got = explain(model, x.clone().requires_grad_(), y, method)
    assert not got.requires_grad
    torch.testing.assert_close(got, want, msg="a network in training mode is explained in eval mode")
    assert state(model) == before
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
