"""The norms are checked against matrices built another way: one unit input at a time, or SciPy's Lanczos SVD."""

from __future__ import annotations

import copy
import math
import unittest.mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import LinearOperator, svds
from torch import nn
from torch.nn.utils import parametrizations

from lcnn_utils.nn import LipschitzBatchNorm2d, conv_norm
from lcnn_utils.nn.spectral_norm import _geometry, _gradients

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
    back = _gradients(conv.weight, x, y, _geometry(conv, shape), (True, False))[0]
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


@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1e-30, 1e30, 1e170, 1e290])
@pytest.mark.parametrize("method", ["power", "exact", "bound"])
def test_norms_of_any_scale(scale, method):
    conv, shape = make(3, 1, 1, 1, 1, (4, 4))
    one, scaled = conv_norm(conv, shape, method).detach(), copy.deepcopy(conv)
    scaled.weight.data *= -scale
    norm = conv_norm(scaled, shape, method)
    torch.testing.assert_close(norm.detach(), one * scale, rtol=1e-9, atol=0)
    if method == "power":
        (slope,) = torch.autograd.grad(norm, scaled.weight)
        (expected,) = torch.autograd.grad(conv_norm(conv, shape), conv.weight)
        torch.testing.assert_close(slope, -expected, rtol=1e-9, atol=1e-12)


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
            x = _gradients(conv.weight, x, conv(x), _geometry(conv, (3, 16, 16)), (True, False))[0]
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


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    log10_gamma=st.floats(-3, 3),
    affine=st.booleans(),
    shape=st.sampled_from([(6, 4, 5, 3), (9, 4), (2, 4, 1, 1), (64, 4, 8, 8)]),
    scale=st.floats(-3, 3),
    offset=st.sampled_from([0.0, 1.0, 10.0]),
    last=st.tuples(st.booleans(), st.booleans()),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_fast_training_is_the_written_out_one(log10_gamma, affine, shape, scale, offset, last, dtype, seed):
    """torch's BatchNorm kernels, told what is clipped, against every operation written out in float64."""
    torch.manual_seed(seed)
    widths = 10 ** (scale * torch.linspace(-1, 1, 4)).view(1, 4, *[1] * (len(shape) - 2))
    x, g = ((torch.randn(shape) + offset) * widths).to(dtype), torch.randn(shape, dtype=dtype)
    if len(shape) == 4:
        x, g = (t.contiguous(memory_format=torch.channels_last) if l else t for t, l in zip((x, g), last, strict=True))
    layer = LipschitzBatchNorm2d(4, 10**log10_gamma, affine=affine).to(dtype)
    if affine:
        nn.init.normal_(layer.weight, std=2)
        nn.init.normal_(layer.bias)
    other = copy.deepcopy(layer).double()

    def run(layer, x, g):
        x = x.clone().requires_grad_()
        y = layer(x)
        return y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], g), *layer.buffers()

    found = run(layer, x, g)
    with unittest.mock.patch("lcnn_utils.nn.batchnorm.eager_cpu", return_value=False):
        truth = run(other, x.double(), g.double())
    by_channel = lambda t: t.detach().double().transpose(0, 1).flatten(1)
    rtol = 1e-9 if dtype == torch.float64 else 1e-4 * (1 + offset)
    slopes = by_channel(truth[0]).std(1) / by_channel(x).std(1)
    sizes = (
        by_channel(truth[0]).abs().amax(1),
        slopes * by_channel(g).abs().amax(1),
    )  # each channel's, before it cancels
    for fast, exact, size in zip(found[:2], truth[:2], sizes, strict=True):
        assert ((by_channel(fast) - by_channel(exact)).abs() <= rtol * size[:, None]).all()
    for fast, exact in zip(found[2:], truth[2:], strict=True):
        parts = (g.double().abs() * truth[0].abs()).sum().item() if exact.dim() == 0 else exact.abs().max().item()
        torch.testing.assert_close(fast.to(exact), exact, rtol=rtol, atol=rtol * parts)


@pytest.mark.parametrize("gamma", [0.5, 10.0])
def test_training_and_eval_are_one_function(gamma):
    torch.manual_seed(0)
    layer = LipschitzBatchNorm2d(3, gamma, affine=True, momentum=1.0)
    x = torch.randn(6, 3, 4, 4) * torch.tensor([0.05, 1.0, 3.0]).view(3, 1, 1)
    trained = layer(x)
    layer.running_var *= (6 * 16 - 1) / (6 * 16)  # the batch divides by n, the running variance by n − 1
    torch.testing.assert_close(layer.eval()(x), trained, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fast", [True, False], ids=["torch's kernel", "written out"])
@pytest.mark.parametrize("momentum", [0.3, 1.0, None])
def test_statistics_are_those_of_torchs_batchnorm(momentum, fast):
    layer, torchs = LipschitzBatchNorm2d(3, momentum=momentum), nn.BatchNorm2d(3, momentum=momentum)
    if not fast:
        layer.log_gamma.data = layer.log_gamma.data.double()
    for seed in range(4):
        x = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * (seed + 1)
        layer(x)
        torchs(x)
        for name, statistic in torchs.named_buffers():
            torch.testing.assert_close(layer.get_buffer(name), statistic, msg=name)


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
