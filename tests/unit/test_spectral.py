"""Layers of norm 1: ``spectral_normalize`` pass by pass, and ``norms_once_a_step`` against uᵀAv with u and v held."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.utils import parametrize

from lcnn_utils.nn import (
    LipschitzBatchNorm2d,
    SpectralNorm,
    conv_norm,
    norms_once_a_step,
    refresh_norms,
    sigma_error,
    spectral_normalize,
)
from lcnn_utils.training import Recipe, build


def make(kernel, stride, padding, dilation, groups, size, channels=(4, 8), seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    conv = nn.Conv2d(*channels, kernel, stride, padding, dilation, groups, dtype=dtype)
    return conv, (channels[0], *size)


# --- spectral_normalize ------------------------------------------------------------------------------------------


def small_net(dtype=torch.float32):
    torch.manual_seed(0)
    net = nn.Sequential(
        spectral_normalize(nn.Conv2d(2, 4, 3, 2, 1), (2, 6, 6)),
        nn.Softplus(),
        LipschitzBatchNorm2d(4),
        nn.Flatten(),
        spectral_normalize(nn.Linear(36, 3)),
    )
    return net.to(dtype)


@pytest.mark.parametrize("geometry", [(3, 1, 1, 1, 1, (6, 5)), (3, 2, 1, 1, 2, (6, 5)), (1, 2, 0, 1, 1, (6, 5))])
@pytest.mark.parametrize("mode", [True, False])
def test_normalised_convolution_has_norm_one(geometry, mode):
    conv, shape = make(*geometry, dtype=torch.float32)
    spectral_normalize(conv, shape).train(mode)
    refresh_norms(conv, 500)
    assert float(conv_norm(conv, shape, "exact")) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e-30), (torch.float32, 1e30), (torch.float64, 1e-250),
                                              (torch.float64, 1e250), (torch.bfloat16, 1e-30)])  # fmt: skip
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_a_weight_of_any_scale_is_normalised(dtype, scale, kind):
    """In a training pass, in eval, inside ``norms_once_a_step``, with its gradient: W/σ doesn't know the scale of W."""
    found = []
    for by in (1.0, scale):
        conv, shape = make(3, 2, 1, 1, 1, (6, 5), dtype=torch.float64)
        layer = conv if kind == "conv" else nn.Linear(7, 5, dtype=torch.float64)
        torch.nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(0))
        layer.weight.data *= by
        spectral_normalize(layer.to(dtype), shape if kind == "conv" else None)
        weight, used = layer.parametrizations.weight.original, []
        used += [layer.train().weight, layer.eval().weight]
        with norms_once_a_step(layer.train()) as advance:
            advance()
            used.append(layer.weight)
        slopes = [torch.autograd.grad(w.float().square().sum() + w.sum(), weight)[0].double() * by for w in used]
        found.append([w.detach().double() for w in used] + slopes)
        assert not any(w.requires_grad for w in found[-1])
    rtol = 0.05 if dtype == torch.bfloat16 else 1e-4
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(two, one, rtol=rtol, atol=rtol * one.abs().max().item())


def test_normalised_linear_has_norm_one():
    layer = spectral_normalize(nn.Linear(7, 5)).eval()
    refresh_norms(layer, 500)
    assert float(torch.linalg.matrix_norm(layer.weight.detach(), 2)) == pytest.approx(1, abs=1e-5)


def test_construction_is_deterministic():
    state = torch.get_rng_state()
    one, two = (spectral_normalize(make(3, 1, 1, 1, 1, (6, 5))[0], (4, 6, 5)) for _ in range(2))
    assert torch.equal(one.parametrizations.weight[0].v, two.parametrizations.weight[0].v)
    torch.set_rng_state(state)
    spectral_normalize(nn.Linear(2, 2, bias=False))
    expected = torch.get_rng_state()
    torch.set_rng_state(state)
    nn.Linear(2, 2, bias=False)
    assert torch.equal(expected, torch.get_rng_state())


def test_training_follows_the_weight_and_eval_is_right_after_a_step():
    conv, shape = make(3, 1, 1, 1, 1, (6, 6), dtype=torch.float32)
    spectral_normalize(conv, shape)
    optimizer = torch.optim.SGD(conv.parameters(), 0.5)
    x = torch.randn(8, *shape, generator=torch.Generator().manual_seed(0))
    for _ in range(60):
        optimizer.zero_grad()
        (conv(x) - x.repeat(1, 2, 1, 1)).pow(2).mean().backward()
        optimizer.step()
    assert float(conv_norm(conv.eval(), shape, "exact")) == pytest.approx(1, abs=2e-2)
    conv.parametrizations.weight.original.data *= 7  # a change that no training pass has seen
    assert float(conv_norm(conv, shape, "exact")) == pytest.approx(1, abs=2e-2)
    before = conv.parametrizations.weight[0].v.clone()
    conv(x)
    assert torch.equal(before, conv.parametrizations.weight[0].v)  # eval leaves the buffer alone


def test_one_step_a_training_pass():
    conv, shape = make(3, 1, 1, 1, 1, (6, 6), dtype=torch.float32)
    long = copy.deepcopy(conv)
    spectral_normalize(conv, shape, iterations=1)
    start = conv.parametrizations.weight[0].v.clone()
    conv(torch.zeros(1, *shape))
    after = conv.parametrizations.weight[0].v
    assert not torch.equal(start, after)
    spectral_normalize(long, shape, iterations=300)
    for _ in range(300):
        conv(torch.zeros(1, *shape))
    torch.testing.assert_close(conv.eval().weight, long.eval().weight, rtol=1e-3, atol=1e-4)


def test_two_training_passes_before_backward():
    net = small_net()
    x = torch.randn(4, 2, 6, 6)
    (net(x).sum() + net.eval()(x).sum() + net.train()(x).sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_state_dict_and_deepcopy_round_trip():
    net = small_net().eval()
    x = torch.randn(4, 2, 6, 6)
    torch.testing.assert_close(copy.deepcopy(net)(x), net(x), rtol=0, atol=0)
    other = small_net().eval()
    for p in other.parameters():
        nn.init.normal_(p)
    other.load_state_dict(load(save(net.state_dict())))
    torch.testing.assert_close(other(x), net(x), rtol=0, atol=0)


def test_gradient_with_converged_direction():
    """‖W/σ(W)‖ = 1 whatever W: the gradient of a function of W/σ has no part along W, and matches differences."""
    conv, shape = make(3, 2, 1, 1, 1, (5, 5), (2, 3))
    raw = conv.weight.detach().clone()
    spectral_normalize(conv, shape, iterations=3000).eval()
    target = torch.randn_like(raw)
    loss = (conv.weight * target).sum()
    (gradient,) = torch.autograd.grad(loss, conv.parametrizations.weight.original)
    assert abs(float((gradient * raw).sum())) < 1e-12

    def exact(weight):
        plain = make(3, 2, 1, 1, 1, (5, 5), (2, 3))[0]
        plain.weight.data = weight
        return float((weight * target).sum() / conv_norm(plain, shape, "exact"))

    direction, h = torch.randn_like(raw), 1e-5
    difference = (exact(raw + h * direction) - exact(raw - h * direction)) / (2 * h)
    assert float((gradient * direction).sum()) == pytest.approx(difference, rel=1e-5)


def test_zero_weight_stays_zero_and_recovers():
    conv, shape = make(3, 1, 1, 1, 1, (6, 5), dtype=torch.float32)
    raw = conv.weight.detach().clone()
    conv.weight.data.zero_()
    spectral_normalize(conv, shape)
    out = conv(torch.ones(1, *shape))
    out.sum().backward()
    assert conv.weight.abs().max() == 0
    assert out.isfinite().all()
    assert conv.parametrizations.weight.original.grad.isfinite().all()
    conv.parametrizations.weight.original.data = raw
    refresh_norms(conv, 500)
    assert float(conv_norm(conv.eval(), shape, "exact")) == pytest.approx(1, abs=1e-4)


def test_functional_transforms_and_double_backward():
    net = small_net(torch.float64).eval()
    x = torch.randn(1, 2, 6, 6, dtype=torch.float64)
    f = lambda z: torch.logsumexp(net(z), -1).sum()
    hessian = torch.func.hessian(f)(x).view(72, 72)
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(f, x).view(72, 72))
    _, vjp = torch.func.vjp(torch.func.grad(f), x)
    v = torch.randn_like(x)
    torch.testing.assert_close(vjp(v)[0].flatten(), hessian @ v.flatten())
    state = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    gradients = torch.func.grad(lambda p: torch.func.functional_call(net, p, (x,)).pow(2).sum())(
        {k: t for k, t in state.items() if t.is_floating_point()}
    )
    assert gradients["0.parametrizations.weight.original"].abs().max() > 0


def test_training_in_a_functional_gradient():
    net = small_net()
    x = torch.randn(4, 2, 6, 6)
    buffers = lambda: {k: b.clone() for k, b in net.named_buffers()}  # made inside, as nn.BatchNorm2d needs it too
    loss = lambda p: torch.func.functional_call(net, (p, buffers()), (x,)).pow(2).sum()
    got = torch.func.grad(loss)({k: p.detach() for k, p in net.named_parameters()})
    net(x).pow(2).sum().backward()
    for name, p in net.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-4, atol=1e-5)


def test_autocast_and_half_precision():
    net = small_net()
    x = torch.randn(4, 2, 6, 6)
    reference = copy.deepcopy(net)(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x)
        refresh_norms(net)
        assert net[0].weight.dtype == torch.float32
    torch.testing.assert_close(out.float(), reference, rtol=0.1, atol=0.1)
    out.float().sum().backward()
    half = small_net(torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert half[0].weight.dtype == torch.bfloat16
    refresh_norms(half)
    assert float(conv_norm(half.eval()[0].float(), (2, 6, 6), "exact")) == pytest.approx(1, abs=2e-2)


@pytest.mark.usefixtures("needs_compiler")
def test_compiled_as_eager():
    torch._dynamo.reset()
    x = torch.randn(4, 2, 6, 6)
    for mode in (False, True):
        eager = small_net().train(mode)
        other = copy.deepcopy(eager)
        compiled = torch.compile(other, fullgraph=True)
        for _ in range(2):
            a, b = eager(x), compiled(x)
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
            a.pow(2).sum().backward()
            b.pow(2).sum().backward()
        for (name, one), two in zip(eager.state_dict().items(), other.state_dict().values(), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        for one, two in zip(eager.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-3, atol=1e-4)


def test_spectral_normalize_errors():
    with pytest.raises(ValueError, match="BatchNorm2d"):
        spectral_normalize(nn.BatchNorm2d(3), (3, 4, 4))
    with pytest.raises(ValueError, match="C = 3"):
        spectral_normalize(nn.Conv2d(3, 3, 3))
    with pytest.raises(ValueError, match="at least 1"):
        spectral_normalize(nn.Linear(3, 3), iterations=0)
    layer = spectral_normalize(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="already"):
        spectral_normalize(layer)
    assert isinstance(layer.parametrizations.weight[0], SpectralNorm)
    parametrize.remove_parametrizations(layer, "weight")
    assert float(torch.linalg.matrix_norm(layer.weight.detach(), 2)) == pytest.approx(1, abs=0.05)


# --- norms_once_a_step -------------------------------------------------------------------------------------------

LAYERS = {
    "linear": lambda: spectral_normalize(nn.Linear(7, 5).double()),
    "conv": lambda: spectral_normalize(*make(3, 1, 1, 1, 1, (6, 5))),
    "stride": lambda: spectral_normalize(*make(3, 2, 1, 1, 1, (5, 7))),
    "groups": lambda: spectral_normalize(*make(3, (2, 1), (0, 1), (1, 2), 2, (5, 7))),
    "pointwise": lambda: spectral_normalize(*make(1, 2, 0, 1, 1, (5, 4))),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


def disturbed(name):
    """A normalised layer in float64 whose weight has changed since its direction was found."""
    torch.manual_seed(1)
    layer = LAYERS[name]()
    layer.parametrizations.weight.original.data.normal_(std=2.0)
    return layer, layer.parametrizations.weight.original, layer.parametrizations.weight[0]


def plain(layer, weight, v):
    """The layer without its bias, with this weight."""
    if isinstance(layer, nn.Linear):
        return F.linear(v, weight)
    return F.conv2d(v, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)


def true_norm(layer) -> float:
    """The operator norm of the weight that the layer uses, by SVD."""
    if isinstance(layer, nn.Linear):
        return torch.linalg.svdvals(layer.weight.detach())[0].item()
    return conv_norm(layer, layer.parametrizations.weight[0].input_shape, "exact").item()


@each_layer
def test_weights_and_their_gradient_are_those_of_uAv(name):
    """u = Av/‖Av‖, v ← Aᵀu/‖Aᵀu‖, σ = uᵀAv, here with Aᵀ by autograd; then ∂(W/σ)/∂W with u and v held."""
    layer, weight, norm = disturbed(name)
    old = norm.v.clone().requires_grad_()
    out = plain(layer, weight.detach(), old)
    u = (out / out.norm()).detach()
    (back,) = torch.autograd.grad((out * u).sum(), old)
    v = back / back.norm()
    target = torch.randn_like(weight)
    with norms_once_a_step(layer) as advance:
        advance()
        used = layer.weight
        (gradient,) = torch.autograd.grad((used * target).sum(), weight)
    torch.testing.assert_close(norm.v, v, rtol=1e-10, atol=1e-12)
    w = weight.detach().clone().requires_grad_()
    expected = w / (u * plain(layer, w, v)).sum()
    (expected_gradient,) = torch.autograd.grad((expected * target).sum(), w)
    torch.testing.assert_close(used, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-11)


def test_a_copy_made_inside_a_step_follows_its_own_weight():
    """An average of a net's weights is kept so."""
    layer, *_ = disturbed("conv")
    with norms_once_a_step(layer) as advance:
        advance()
        other = copy.deepcopy(layer)
        other.parametrizations.weight.original.data.normal_()
        refresh_norms(other)
        assert true_norm(other.eval()) == pytest.approx(1, abs=1e-2)


def test_a_step_lets_go_of_the_last_one_s_graph():
    """What accumulates a weight's gradient belongs to the stream it was made on: one of an earlier step, which ran on
    another, can't be recorded in a CUDA graph."""
    layer, weight, _ = disturbed("conv")
    with norms_once_a_step(layer) as advance:
        advance()
        get_gradient_edge(weight).node.metadata["step"] = 1
        advance()
        assert not get_gradient_edge(weight).node.metadata


@each_layer
def test_at_convergence_inside_and_outside_agree_and_the_norm_is_one(name):
    layer, weight, norm = disturbed(name)
    target = torch.randn_like(weight)
    with norms_once_a_step(layer) as advance:
        for _ in range(1500):
            advance()
        inside = layer.weight
        (inner,) = torch.autograd.grad((inside * target).sum(), weight)
        assert true_norm(layer) == pytest.approx(1, abs=1e-9)
    outside = layer.eval().weight
    (outer,) = torch.autograd.grad((outside * target).sum(), weight)
    torch.testing.assert_close(inside, outside, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(inner, outer, rtol=1e-6, atol=1e-8)
    assert abs((outer * weight).sum().item()) < 1e-9, "W/σ doesn't change when W grows"
    assert norm.now == []


@each_layer
def test_an_advance_moves_the_direction_as_a_training_pass_does(name):
    layer, _, norm = disturbed(name)
    other = copy.deepcopy(layer)
    with norms_once_a_step(layer) as advance:
        for _ in range(4):
            advance()
            _ = other.weight  # in training mode: one iteration
    torch.testing.assert_close(norm.v, other.parametrizations.weight[0].v, rtol=1e-9, atol=1e-11)


def test_inside_only_advance_moves_the_directions_and_weights():
    net = small_net()
    x = torch.randn(4, 2, 6, 6)
    norm, weight = net[0].parametrizations.weight[0], net[0].parametrizations.weight.original
    with norms_once_a_step(net) as advance:
        advance()
        v, used = norm.v.clone(), net[0].weight.detach().clone()
        for mode in (True, False, True):
            net.train(mode)(x)
            assert torch.equal(net[0].weight, used)
        assert torch.equal(norm.v, v)
        weight.data.normal_()
        advance()
        assert not torch.equal(norm.v, v)
        assert not torch.equal(net[0].weight, used)
        other = {name: p.detach() * 2 for name, p in net.named_parameters()}  # weights that advance hasn't seen
        _ = torch.func.functional_call(net, other, (x,))
        assert not torch.equal(norm.v, v), "they are normalised by themselves"


def test_several_backward_passes_before_the_next_advance():
    """As when gradients of small batches are added up: each pass through the weights as they are."""
    net, parts = small_net(), torch.randn(3, 4, 2, 6, 6)
    with norms_once_a_step(net) as advance:
        advance()
        for part in parts:
            net(part).square().sum().backward()
        added = [p.grad.clone() for p in net.parameters()]
        together = sum(net(part).square().sum() for part in parts)
        for one, two in zip(added, torch.autograd.grad(together, list(net.parameters())), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_outside_all_is_as_before():
    net, other = small_net(), small_net()
    x = torch.randn(4, 2, 6, 6)
    with norms_once_a_step(net) as advance:
        torch.testing.assert_close(net(x), other(x), rtol=0, atol=0)  # not advanced yet: as outside
        advance()
        net(x)
        state = net.state_dict()
    assert state.keys() == other.state_dict().keys()
    other.load_state_dict(state)
    for mode in (False, True, True):
        torch.testing.assert_close(net.train(mode)(x), other.train(mode)(x), rtol=0, atol=0)
    assert not torch.equal(net[0].parametrizations.weight[0].v, small_net()[0].parametrizations.weight[0].v)

    def stopped():
        with norms_once_a_step(net) as advance:
            advance()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert [m.now for m in net.modules() if isinstance(m, SpectralNorm)] == [[], []]


def test_a_net_without_such_layers_has_nothing_to_advance():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    before = copy.deepcopy(net.state_dict())
    with norms_once_a_step(net) as advance:
        advance()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("name", ["linear", "stride"])
@pytest.mark.parametrize("bad", [0.0, math.inf, math.nan])
def test_a_zero_or_broken_weight_leaves_the_direction_as_it_was(name, bad):
    layer, weight, norm = disturbed(name)
    good, v = weight.detach().clone(), norm.v.clone()
    with norms_once_a_step(layer) as advance:
        weight.data.fill_(bad)
        advance()
        torch.testing.assert_close(norm.v, v, rtol=1e-12, atol=0)
        if bad == 0:
            layer.weight.sum().backward()
            assert layer.weight.abs().max() == 0
            assert weight.grad.isfinite().all()
        weight.data.copy_(good)
        for _ in range(500):
            advance()
        assert true_norm(layer) == pytest.approx(1, abs=1e-3), "and it recovers"


def test_half_precision_inside():
    net = small_net(torch.bfloat16)
    with norms_once_a_step(net) as advance:
        advance()
        assert net[0].weight.dtype == net[4].weight.dtype == torch.bfloat16
        net(torch.randn(4, 2, 6, 6).bfloat16()).float().sum().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_second_derivatives_inside():
    """In the input, as the history's curvature takes them: σ is a constant there, whichever formula it comes from."""
    net = small_net(torch.float64).eval()
    refresh_norms(net, 3000)
    x = torch.randn(1, 2, 6, 6, dtype=torch.float64)
    f = lambda z: torch.logsumexp(net(z), -1).sum()
    outside = torch.func.hessian(f)(x)
    with norms_once_a_step(net) as advance:
        advance()
        torch.testing.assert_close(torch.func.hessian(f)(x), outside, rtol=1e-6, atol=1e-9)


# --- sigma_error -------------------------------------------------------------------------------------------------


def shortfalls(net) -> list[float]:
    """1 − σ/‖A‖ of each normalised layer, with ‖A‖ by SVD: σ‖W/σ‖ = ‖W‖."""
    layers = [m for m in net.eval().modules() if parametrize.is_parametrized(m, "weight")]
    return [1 - 1 / true_norm(layer) for layer in layers]


def test_sigma_error_is_the_worst_layers_against_its_svd():
    net = build(Recipe("digits", "lcnn", "resnet10", width=2))
    torch.manual_seed(0)
    originals = [p for name, p in net.named_parameters() if name.endswith("weight.original")]
    for weight in originals:
        weight.data += 0.1 * weight.std() * torch.randn_like(weight)
    state = copy.deepcopy(net.state_dict())
    expected = shortfalls(net)
    assert len(expected) == len(originals) == 13
    assert max(expected) > 0.01, "the test needs something to find"
    assert sigma_error(net, 1000) == pytest.approx(max(expected), abs=1e-4)
    assert 0.5 * max(expected) < sigma_error(net) <= max(expected) + 1e-5
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    refresh_norms(net, 1000)
    assert sigma_error(net) == pytest.approx(max(shortfalls(net)), abs=1e-4)
    assert sigma_error(net) < 1e-3


def test_sigma_error_where_there_is_nothing_to_err():
    assert sigma_error(nn.Linear(2, 2)) == 0
    layer = spectral_normalize(nn.Linear(3, 3))
    layer.parametrizations.weight.original.data.zero_()
    assert sigma_error(layer) == 0, "the norm of 0 is 0"
