"""The norms are checked against matrices built another way: one unit input at a time, or SciPy's Lanczos SVD."""

from __future__ import annotations

import copy
import math
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from scipy.sparse.linalg import LinearOperator, svds
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from lcnn_utils.lipschitz import (
    LipschitzBatchNorm2d,
    SpectralNorm,
    _adjoint,
    _geometry,
    conv_norm,
    refresh_norms,
    spectral_normalize,
)

# kernel, stride, padding, dilation, groups, (H, W): every feature at least once, alone and mixed
GEOMETRIES = [
    (1, 1, 0, 1, 1, (5, 4)),
    (1, 2, 0, 1, 1, (5, 4)),
    (1, 1, 2, 1, 1, (3, 4)),  # padding beyond the kernel: outputs that are all padding
    (1, 3, 2, 1, 1, (4, 5)),
    (3, 1, 1, 1, 1, (6, 5)),
    (3, 1, 0, 1, 1, (6, 5)),
    (3, 2, 1, 1, 1, (6, 5)),
    (3, 2, 1, 1, 1, (5, 7)),
    (3, 3, 2, 1, 1, (4, 7)),
    (3, 1, (2, 0), 1, 1, (4, 6)),
    (3, (2, 1), (0, 1), (1, 2), 1, (5, 7)),
    (3, 1, 2, 2, 1, (6, 5)),
    (3, 1, 1, 1, 2, (4, 5)),
    (3, 2, 1, 1, 4, (5, 4)),
    (5, 1, 2, 1, 1, (6, 4)),
    (5, 2, 2, 1, 1, (6, 4)),
    (7, 1, 3, 1, 1, (3, 2)),  # kernel larger than the image, and than the torus
    (7, 2, 3, 1, 1, (2, 3)),
    ((3, 5), 1, (1, 2), 1, 2, (4, 3)),
    (2, 1, 0, 1, 1, (5, 4)),  # even kernels
    (2, 2, 0, 1, 1, (6, 5)),
    (4, 2, 1, 1, 1, (6, 5)),
    ((2, 3), 1, (1, 1), (2, 1), 1, (4, 5)),
    (3, 1, "same", 2, 1, (4, 5)),
    (3, 1, "valid", 1, 1, (4, 5)),
]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """The tensors are tiny: a second thread only waits, and long where the cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(kernel, stride, padding, dilation, groups, size, channels=(4, 8), seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    conv = nn.Conv2d(*channels, kernel, stride, padding, dilation, groups, dtype=dtype)
    return conv, (channels[0], *size)


def dense(conv, shape):
    """The operator's matrix, column by column, through the layer itself."""
    columns = []
    with torch.no_grad():
        zero = conv(torch.zeros(1, *shape, dtype=conv.weight.dtype))  # the bias
        for i in range(math.prod(shape)):
            unit = torch.zeros(math.prod(shape), dtype=conv.weight.dtype)
            unit[i] = 1
            columns.append((conv(unit.view(1, *shape)) - zero).flatten().numpy())
    return np.stack(columns, axis=1)


def true_norm(conv, shape):
    return float(np.linalg.norm(dense(conv, shape), 2))


def sparse_norm(conv, shape):
    """The same for large images: SciPy's svds, the adjoint by autograd."""

    def forward(x):
        with torch.no_grad():
            return nn.functional.conv2d(torch.tensor(x).view(1, *shape), weight, None, **rest).flatten().numpy()

    def backward(y):
        x = torch.zeros(1, *shape, dtype=torch.float64, requires_grad=True)
        out = nn.functional.conv2d(x, weight, None, **rest)
        return torch.autograd.grad(out, x, torch.tensor(y).view_as(out))[0].flatten().numpy()

    weight = conv.weight.detach().double()
    rest = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation, "groups": conv.groups}
    outputs = forward(np.zeros(math.prod(shape))).size
    operator = LinearOperator((outputs, math.prod(shape)), matvec=forward, rmatvec=backward, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(min(operator.shape))
    return float(svds(operator, k=1, return_singular_vectors=False, v0=start)[0])


# --- conv_norm ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_three_methods_against_the_dense_matrix(geometry):
    conv, shape = make(*geometry)
    truth = true_norm(conv, shape)
    assert float(conv_norm(conv, shape, "exact")) == pytest.approx(truth, rel=1e-12)
    power = float(conv_norm(conv, shape, "power", iterations=500).detach())
    assert truth * (1 - 1e-3) < power <= truth * (1 + 1e-12)
    bound = float(conv_norm(conv, shape, "bound"))
    assert truth <= bound
    if geometry[0] == 1:
        assert bound == pytest.approx(truth, rel=1e-9)  # a 1×1 convolution is the same map at each pixel


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_adjoint(geometry):
    conv, shape = make(*geometry)
    conv.bias.data.zero_()
    x = torch.randn(1, *shape, dtype=torch.float64)
    ax = conv(x)
    y = torch.randn_like(ax)
    back = _adjoint(conv.weight, y, x.shape, _geometry(conv, shape))
    torch.testing.assert_close((ax * y).sum(), (x * back).sum(), rtol=1e-12, atol=1e-12)


sides = st.integers(1, 3)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(sides, sides),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    dilation=st.tuples(sides, sides),
    groups=st.integers(1, 2),
    channels=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    seed=st.integers(0, 1000),
    flat=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_bound_is_a_bound(kernel, stride, padding, dilation, groups, channels, size, seed, flat, dtype):
    spans = [n + 2 * p - d * (k - 1) for n, p, d, k in zip(size, padding, dilation, kernel, strict=True)]
    size = tuple(n + max(0, 1 - s) for n, s in zip(size, spans, strict=True))  # room for one output at least
    channels = (channels[0] * groups, channels[1] * groups)
    conv, shape = make(kernel, stride, padding, dilation, groups, size, channels, seed, dtype)
    if flat:  # a positive kernel reaches the bound's worst frequency, 0
        conv.weight.data.abs_()
    bound = conv_norm(conv, shape, "bound")
    assert bound.dtype == dtype
    truth = true_norm(conv.double(), shape)
    assert truth <= float(bound)
    assert float(conv_norm(conv, shape, "power", iterations=3).detach()) <= truth * (1 + 1e-12)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bound_is_tight_at_32(stride, seed):
    conv, shape = make(3, stride, 1, 1, 1, (32, 32), (3, 4), seed, torch.float32)
    truth = sparse_norm(conv, shape)
    assert truth <= float(conv_norm(conv, shape, "bound")) < 1.01 * truth
    assert 0.97 * truth < float(conv_norm(conv, shape, "power", iterations=200).detach()) <= truth * (1 + 1e-6)


def test_bound_of_extreme_weights():
    conv, shape = make(3, 1, 1, 1, 1, (4, 4))
    one = conv_norm(conv, shape, "bound")
    for scale in (1e-200, 1e200):
        scaled = copy.deepcopy(conv)
        scaled.weight.data *= scale
        torch.testing.assert_close(conv_norm(scaled, shape, "bound"), one * scale, rtol=1e-9, atol=0)
    conv.weight.data.zero_()
    assert [float(conv_norm(conv, shape, m).detach()) for m in ("power", "exact", "bound")] == [0, 0, 0]


def test_power_gradient_is_that_of_the_norm():
    conv, shape = make(3, 2, 1, 1, 1, (5, 6), (2, 3))
    conv_norm(conv, shape, "power", iterations=2000).backward()
    got, direction, h = conv.weight.grad.clone(), torch.randn_like(conv.weight), 1e-5
    values = []
    for sign in (1, -1):
        moved = copy.deepcopy(conv)
        moved.weight.data += sign * h * direction
        values.append(true_norm(moved, shape))
    assert float((got * direction).sum()) == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-5)


def test_power_is_reproducible_and_follows_its_generator():
    conv, shape = make(3, 1, 1, 1, 1, (6, 6))
    state = torch.get_rng_state()
    assert conv_norm(conv, shape, iterations=1) == conv_norm(conv, shape, iterations=1)
    assert torch.equal(state, torch.get_rng_state())
    other = conv_norm(conv, shape, iterations=1, generator=torch.Generator().manual_seed(7))
    assert other != conv_norm(conv, shape, iterations=1)


def test_torchs_spectral_norm_is_not_a_bound():
    torch.manual_seed(0)
    conv = parametrizations.spectral_norm(nn.Conv2d(3, 4, 3, padding=1, bias=False), n_power_iterations=50).eval()
    assert float(torch.linalg.matrix_norm(conv.weight.flatten(1).detach(), 2)) == pytest.approx(1, rel=1e-3)
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        for _ in range(100):  # climb ‖Ax‖/‖x‖ by hand
            x = _adjoint(conv.weight, conv(x), x.shape, _geometry(conv, (3, 16, 16)))
            x /= x.norm()
        assert float(conv(x).norm()) > 1.25
    assert float(conv_norm(conv, (3, 16, 16), "bound")) > 1.25


@pytest.mark.parametrize(
    ("layer", "shape", "options", "message"),
    [
        (nn.Linear(2, 2), (2, 4, 4), {}, "matrix_norm"),
        (nn.ConvTranspose2d(2, 2, 3), (2, 4, 4), {}, "ConvTranspose2d"),
        (nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), (2, 4, 4), {}, "padding_mode='zeros'"),
        (nn.Conv2d(2, 2, 2, padding="same"), (2, 4, 4), {}, "ZeroPad2d"),
        (nn.Conv2d(2, 2, 3), (4, 4), {}, "C = 2"),
        (nn.Conv2d(2, 2, 3), (3, 4, 4), {}, "C = 2"),
        (nn.Conv2d(2, 2, 3), (2, 0, 4), {}, "C = 2"),
        (nn.Conv2d(2, 2, 3), None, {}, "C = 2"),
        (nn.Conv2d(2, 2, 5), (2, 4, 4), {}, r"spans \[5, 5\]"),
        (nn.Conv2d(2, 2, 3), (2, 4, 4), {"method": "bond"}, "did you mean 'bound'"),
        (nn.Conv2d(2, 2, 3), (2, 4, 4), {"iterations": 0}, "at least 1"),
        (nn.Conv2d(16, 16, 3), (16, 64, 64), {"method": "exact"}, "method='bound'"),
    ],
)
def test_conv_norm_errors(layer, shape, options, message):
    with pytest.raises(ValueError, match=message):
        conv_norm(layer, shape, **options)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_weights_are_refused(bad):
    conv, shape = make(3, 1, 1, 1, 1, (4, 4))
    conv.weight.data[0, 0, 0, 0] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        conv_norm(conv, shape, "bound")


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
        return float((weight * target).sum()) / true_norm(plain, shape)

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


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
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


# --- LipschitzBatchNorm2d ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 3, 4, 5), (16, 3)])
@pytest.mark.parametrize("affine", [False, True])
def test_unclipped_is_batchnorm(shape, affine):
    torch.manual_seed(0)
    ours = LipschitzBatchNorm2d(3, 1e4, affine=affine)
    theirs = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(3, affine=affine)
    if affine:
        nn.init.normal_(theirs.weight)
        nn.init.normal_(theirs.bias)
    ours.load_state_dict(theirs.state_dict() | {"log_gamma": ours.log_gamma.detach()})
    for _ in range(3):
        x = torch.randn(shape) * 3 + 1
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        torch.testing.assert_close(ours(a), theirs(b), rtol=1e-5, atol=1e-5)
        weights = torch.randn(shape)
        (ours(a) * weights).sum().backward()
        (theirs(b) * weights).sum().backward()
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(dict(ours.named_buffers())[name], buffer, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    gamma=st.floats(1e-3, 1e3),
    affine=st.booleans(),
    seed=st.integers(0, 1000),
    spread=st.floats(-4, 4),
    four=st.booleans(),
)
def test_lipschitz_constant_is_the_jacobians_norm(gamma, affine, seed, spread, four):
    torch.manual_seed(seed)
    layer = LipschitzBatchNorm2d(3, gamma, affine=affine).double().eval()
    layer.running_var.copy_(10 ** (spread * torch.randn(3)))
    layer.running_mean.normal_()
    if affine:
        nn.init.normal_(layer.weight, std=5)
    x = torch.randn((2, 3, 2, 1) if four else (2, 3), dtype=torch.float64)
    jacobian = torch.func.jacrev(layer)(x).reshape(x.numel(), x.numel())
    truth = float(torch.linalg.matrix_norm(jacobian.detach(), 2))
    assert float(layer.lipschitz_constant().detach()) == pytest.approx(truth, rel=1e-9)
    assert truth <= gamma * (1 + 1e-6)


def test_a_dead_channel_hurts_only_itself():
    x = torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    x[:, 1] *= 1e-6
    layer, plain = LipschitzBatchNorm2d(3, 2.0, eps=1e-12), nn.BatchNorm2d(3, eps=1e-12, affine=False)
    y, reference = layer(x), plain(x)
    torch.testing.assert_close(y[:, [0, 2]], reference[:, [0, 2]])
    centred = x[:, 1] - x[:, 1].mean()
    torch.testing.assert_close(y[:, 1], 2 * centred, rtol=1e-4, atol=1e-9)
    published = reference * min(1.0, 2.0 * float(x.std((0, 2, 3)).min()))
    assert published[:, 0].std() < 1e-5  # what the published rule would have left of a healthy channel


@pytest.mark.parametrize("gamma", [0.3, 1.0, 50.0])  # all, some, none clipped
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("shape", [(4, 3, 2, 2), (5, 3)])
def test_gradcheck_in_training(gamma, affine, shape):
    torch.manual_seed(0)
    layer = LipschitzBatchNorm2d(3, gamma, affine=affine).double()
    x = torch.randn(shape, dtype=torch.float64) * torch.tensor([0.3, 1.0, 2.0]).view(1, 3, *[1] * (len(shape) - 2))
    if affine:
        layer.weight.data = torch.tensor([-1.5, 0.7, 1.2], dtype=torch.float64)
    names = [name for name, _ in layer.named_parameters()]

    def run(z, *parameters):
        state = dict(zip(names, parameters, strict=True)) | {k: b.clone() for k, b in layer.named_buffers()}
        return torch.func.functional_call(layer, state, (z,))

    inputs = [x.requires_grad_(), *layer.parameters()]
    assert torch.autograd.gradcheck(run, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("gamma", [0.5, 10.0])
def test_training_and_eval_are_one_function(gamma):
    torch.manual_seed(0)
    layer = LipschitzBatchNorm2d(3, gamma, affine=True, momentum=1.0)
    x = torch.randn(6, 3, 4, 4) * torch.tensor([0.05, 1.0, 3.0]).view(3, 1, 1)
    trained = layer(x)
    layer.running_var *= (6 * 16 - 1) / (6 * 16)  # the batch divides by n, the running variance by n − 1
    torch.testing.assert_close(layer.eval()(x), trained, rtol=1e-5, atol=1e-5)


def test_gamma_is_a_slider():
    layer = LipschitzBatchNorm2d(2)
    assert float(layer.gamma) == pytest.approx(10)
    assert [name for name, _ in layer.named_parameters()] == ["log_gamma"]
    parameter = layer.log_gamma
    layer.gamma = 0.25
    assert float(layer.gamma) == pytest.approx(0.25)
    assert layer.log_gamma is parameter  # the optimiser keeps its parameter
    assert float(layer.lipschitz_constant()) == pytest.approx(0.25)
    for bad in (0, -1, math.inf, math.nan):
        with pytest.raises(ValueError, match="positive finite"):
            layer.gamma = bad
        with pytest.raises(ValueError, match="positive finite"):
            LipschitzBatchNorm2d(2, bad)
    assert "gamma=0.25" in repr(layer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_statistics_are_float32(dtype):
    x = (torch.randn(64, 2, 8, 8, generator=torch.Generator().manual_seed(0)) * 100 + 300).to(dtype)
    layer, reference = LipschitzBatchNorm2d(2), LipschitzBatchNorm2d(2)
    y = layer(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), reference(x.float()), rtol=1e-2, atol=1e-2)
    assert layer.running_var.dtype == torch.float32
    torch.testing.assert_close(layer.running_var, reference.running_var)


def test_batchnorm_errors():
    layer = LipschitzBatchNorm2d(3)
    for shape in [(3, 4, 4), (2, 4, 3, 3), (2, 4), (3,)]:
        with pytest.raises(ValueError, match="C = 3"):
            layer(torch.zeros(shape))
    for shape in [(1, 3, 1, 1), (1, 3), (0, 3)]:
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            layer(torch.zeros(shape))
    layer.eval()(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="num_features=0"):
        LipschitzBatchNorm2d(0)
