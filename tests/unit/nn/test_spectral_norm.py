"""Norms of real convolutions against dense matrices; layers of norm 1, pass by pass and step by step."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import LinearOperator, svds
from torch import nn
from torch.nn.utils import parametrizations

from lcnn_utils.nn import (
    LipschitzBatchNorm2d,
    conv_norm,
    norms_once_a_step,
    refresh_norms,
    spectral_normalize,
)

GEOMETRIES = [
    (1, 2, 0, 1, 1, (5, 4)),
    (1, 3, 2, 1, 1, (4, 5)),  # padding beyond the kernel: outputs that are all padding
    (3, 1, 1, 1, 1, (6, 5)),
    (3, 3, 2, 1, 1, (4, 7)),
    (3, (2, 1), (0, 1), (1, 2), 2, (5, 7)),
    (3, 2, 1, 1, 4, (5, 4)),
    (7, 2, 3, 1, 1, (2, 3)),  # kernel larger than the image, and than the torus
    ((2, 3), 1, (1, 1), (2, 1), 1, (4, 5)),
    (3, 1, "same", 2, 1, (4, 5)),
]


def make(kernel, stride, padding, dilation, groups, size, channels=(4, 8), seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    conv = nn.Conv2d(*channels, kernel, stride, padding, dilation, groups, dtype=dtype)
    return conv, (channels[0], *size)


@torch.no_grad()
def true_norm(conv, shape):
    """By the operator's matrix, through the layer itself."""
    basis = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
    return torch.linalg.matrix_norm((conv(basis) - conv(0 * basis[:1])).flatten(1), 2).item()


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


sides, signs = st.integers(1, 3), st.sampled_from(["random", "positive", "sum 0"])


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)), stride=st.tuples(sides, sides),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)), dilation=st.tuples(sides, sides),
    groups=st.integers(1, 2), channels=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)), seed=st.integers(0, 1000), sign=signs,
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_bound_is_a_bound(kernel, stride, padding, dilation, groups, channels, size, seed, sign, dtype):
    spans = [n + 2 * p - d * (k - 1) for n, p, d, k in zip(size, padding, dilation, kernel, strict=True)]
    size = tuple(n + max(0, 1 - s) for n, s in zip(size, spans, strict=True))  # room for one output at least
    channels = (channels[0] * groups, channels[1] * groups)
    conv, shape = make(kernel, stride, padding, dilation, groups, size, channels, seed, dtype)
    if sign == "positive":  # a positive kernel reaches the bound's worst frequency, 0
        conv.weight.data.abs_()
    elif sign == "sum 0":
        conv.weight.data -= conv.weight.data.mean((2, 3), keepdim=True)
    bound = conv_norm(conv, shape, "bound")
    assert bound.dtype == dtype
    truth = true_norm(conv.double(), shape)
    assert truth <= float(bound)
    assert float(conv_norm(conv, shape, "power", iterations=3).detach()) <= truth * (1 + 1e-12)


@pytest.mark.parametrize("padding", [1, 2, 3])
def test_the_bounds_torus_has_room_for_the_padding(padding):
    """On one pixel only the middle of the kernel counts; a torus a point too short adds its ends to it: 1 − ½ − ½."""
    conv = nn.Conv2d(1, 1, (2 * padding + 1, 1), padding=(padding, 0)).double()
    conv.weight.data.zero_()[0, 0, [0, padding, -1], 0] = torch.tensor([-0.5, 1.0, -0.5], dtype=torch.float64)
    assert true_norm(conv, (1, 1, 1)) == 1 <= conv_norm(conv, (1, 1, 1), "bound").item()


def test_norms_at_full_size_against_a_sparse_svd():
    """CIFAR's 32 × 32 pixels, where the dense matrix no longer fits: the layer and its transpose in scipy's svds."""
    conv, shape = make(3, 2, 1, 1, 1, (32, 32), (8, 8))
    transposed = nn.ConvTranspose2d(8, 8, 3, 2, 1, output_padding=1, bias=False)
    transposed.weight.data = conv.weight.data
    image = lambda v, side: torch.from_numpy(v.reshape(1, 8, side, side).copy())
    with torch.no_grad():
        conv.bias.zero_()
        matrix = LinearOperator(
            (8 * 16**2, 8 * 32**2), dtype="float64", matvec=lambda v: conv(image(v, 32)).numpy().ravel(),
            rmatvec=lambda v: transposed(image(v, 16)).numpy().ravel(),
        )  # fmt: skip
        truth = svds(matrix, 1, return_singular_vectors=False, random_state=0)[0]
        assert conv_norm(conv, shape, iterations=1000).item() == pytest.approx(truth, rel=1e-4)
        assert truth <= conv_norm(conv, shape, "bound").item() < 1.05 * truth


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


@pytest.mark.slow
@pytest.mark.usefixtures("needs_compiler")
def test_compiled_as_eager():
    torch._dynamo.reset()
    eager, x = small_net(), torch.randn(4, 2, 6, 6)
    other = copy.deepcopy(eager)
    compiled = torch.compile(other, fullgraph=True)
    for _ in range(2):
        outputs = eager(x), compiled(x)
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
        for output in outputs:
            output.pow(2).sum().backward()
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)
    for one, two in zip(eager.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-3, atol=1e-4)


LAYERS = {
    "linear": lambda: spectral_normalize(nn.Linear(7, 5).double()),
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


def norm_of(layer) -> float:
    """The operator norm of the weight that the layer uses, by SVD."""
    if isinstance(layer, nn.Linear):
        return torch.linalg.svdvals(layer.weight.detach())[0].item()
    return conv_norm(layer, layer.parametrizations.weight[0].input_shape, "exact").item()


def plain(layer, weight, v):
    """The layer without its bias, with this weight."""
    if isinstance(layer, nn.Linear):
        return F.linear(v, weight)
    return F.conv2d(v, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)


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


@pytest.mark.parametrize("name", ["linear", "stride"])
def test_a_zero_weight_leaves_the_direction_as_it_was(name):
    layer, weight, norm = disturbed(name)
    v = norm.v.clone()
    with norms_once_a_step(layer) as advance:
        weight.data.zero_()
        advance()
        torch.testing.assert_close(norm.v, v, rtol=1e-12, atol=0)
        layer.weight.sum().backward()
        assert layer.weight.abs().max() == 0
        assert weight.grad.isfinite().all()


@each_layer
def test_converged_weights_have_norm_one_and_the_gradient_of_the_norm(name):
    """Inside norms_once_a_step and outside; for a linear layer as torch's own spectral norm has them."""
    layer, weight, norm = disturbed(name)
    target = torch.randn_like(weight)
    found = []
    with norms_once_a_step(layer) as advance:
        for _ in range(800):
            advance()
        found.append((layer.weight, torch.autograd.grad((layer.weight * target).sum(), weight)[0]))
    assert norm.now is None
    assert norm_of(layer.eval()) == pytest.approx(1, abs=1e-9)
    found.append((layer.weight, torch.autograd.grad((layer.weight * target).sum(), weight)[0]))
    if name == "linear":
        torchs = nn.Linear(7, 5).double()
        torchs.weight.data.copy_(weight.detach())
        parametrizations.spectral_norm(torchs, n_power_iterations=800)
        original = torchs.eval().parametrizations.weight.original
        found.append((torchs.weight, torch.autograd.grad((torchs.weight * target).sum(), original)[0]))
    for normalised, gradient in found[1:]:
        torch.testing.assert_close(normalised, found[0][0], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-6, atol=1e-8)


def test_training_follows_the_weight_and_eval_leaves_the_direction():
    conv, shape = make(3, 1, 1, 1, 1, (6, 6), dtype=torch.float32)
    spectral_normalize(conv, shape)
    optimizer = torch.optim.SGD(conv.parameters(), 0.5)
    x = torch.randn(8, *shape, generator=torch.Generator().manual_seed(0))
    for _ in range(60):
        optimizer.zero_grad()
        (conv(x) - x.repeat(1, 2, 1, 1)).pow(2).mean().backward()
        optimizer.step()
    assert norm_of(conv.eval()) == pytest.approx(1, abs=2e-2)
    conv.parametrizations.weight.original.data *= 7  # a change that no training pass has seen
    before = conv.parametrizations.weight[0].v.clone()
    conv(x)
    assert torch.equal(before, conv.parametrizations.weight[0].v)
    assert norm_of(conv) == pytest.approx(1, abs=2e-2)


def test_hessians_and_half_precision():
    net = small_net(torch.float64).eval()
    x = torch.randn(1, 2, 6, 6, dtype=torch.float64)
    f = lambda z: torch.logsumexp(net(z), -1).sum()
    torch.testing.assert_close(torch.func.hessian(f)(x), torch.autograd.functional.hessian(f, x))
    half = small_net(torch.bfloat16)
    assert half(x.bfloat16()).dtype == half[0].weight.dtype == torch.bfloat16
    refresh_norms(half)
    assert float(conv_norm(half.eval()[0].float(), (2, 6, 6), "exact")) == pytest.approx(1, abs=2e-2)
