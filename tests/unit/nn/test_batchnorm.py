"""γ-Lipschitz BatchNorm against torch's own, the Jacobian's norm, gradcheck, and every operation written out."""

import copy
import math
import unittest.mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lcnn_utils.nn import LipschitzBatchNorm2d, refresh_statistics


@pytest.mark.parametrize(("shape", "affine", "momentum"), [((8, 3, 4, 5), True, 0.1), ((16, 3), False, None)])
def test_unclipped_is_batchnorm(shape, affine, momentum):
    """Outputs, gradients and statistics, in training and after it."""
    torch.manual_seed(0)
    ours = LipschitzBatchNorm2d(3, 1e4, affine=affine, momentum=momentum)
    theirs = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(3, affine=affine, momentum=momentum)
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


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.floats(1e-3, 1e3), st.booleans(), st.integers(0, 1000), st.floats(-4, 4), st.booleans())
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


@pytest.mark.parametrize("gamma", [0.3, 1.0, 50.0])  # all, some, none clipped
@pytest.mark.parametrize(("affine", "shape"), [(False, (5, 3)), (True, (4, 3, 2, 2))])
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


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    log10_gamma=st.floats(-3, 3), affine=st.booleans(), scale=st.floats(-3, 3), seed=st.integers(0, 1000),
    shape=st.sampled_from([(6, 4, 5, 3), (9, 4), (2, 4, 1, 1), (64, 4, 8, 8)]),
    offset=st.sampled_from([0.0, 1.0, 10.0]), last=st.tuples(st.booleans(), st.booleans()),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
)  # fmt: skip
def test_fast_training_is_the_written_out_one(log10_gamma, affine, shape, scale, offset, last, dtype, seed):
    """torch's BatchNorm kernels, told what is clipped, against every operation written out in float64."""
    torch.manual_seed(seed)
    widths = 10 ** (scale * torch.linspace(-1, 1, 4)).view(1, 4, *[1] * (len(shape) - 2))
    x, g = ((torch.randn(shape) + offset) * widths).to(dtype), torch.randn(shape).to(dtype)
    if len(shape) == 4:
        x, g = (t.contiguous(memory_format=torch.channels_last) if l else t for t, l in zip((x, g), last, strict=True))
    layer = LipschitzBatchNorm2d(4, 10**log10_gamma, affine=affine).to(torch.promote_types(dtype, torch.float32))
    if affine:
        nn.init.normal_(layer.weight, std=2)
        nn.init.normal_(layer.bias)
    other = copy.deepcopy(layer).double()

    def run(layer, x, g):
        x = x.clone().requires_grad_()
        y = layer(x)
        return y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], g), *layer.buffers()

    found = run(layer, x, g)
    with unittest.mock.patch("lcnn_utils.nn.batchnorm.eager", return_value=False):
        truth = run(other, x.double(), g.double())
    by_channel = lambda t: t.detach().double().transpose(0, 1).flatten(1)
    rtol = {torch.bfloat16: 1e-2, torch.float32: 1e-4 * (1 + offset), torch.float64: 1e-9}[dtype]
    slopes = by_channel(truth[0]).std(1) / by_channel(x).std(1)
    sizes = by_channel(truth[0]).abs().amax(1), slopes * by_channel(g).abs().amax(1)  # before it cancels
    for fast, exact, size in zip(found[:2], truth[:2], sizes, strict=True):
        assert ((by_channel(fast) - by_channel(exact)).abs() <= rtol * size[:, None]).all()
    for fast, exact in zip(found[2:], truth[2:], strict=True):
        parts = (g.double().abs() * truth[0].abs()).sum().item() if exact.dim() == 0 else exact.abs().max().item()
        torch.testing.assert_close(fast.to(exact), exact, rtol=rtol, atol=rtol * parts)


def test_points_of_another_precision_than_the_layer():
    layer, x = LipschitzBatchNorm2d(3, 0.5), torch.randn(20, 3, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(layer(x), layer(x.float()).double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_only_the_output(dtype):
    """Statistics of 2,000 values of mean 100 would overflow float16 and stick in bfloat16, were they added in these."""
    torch.manual_seed(0)
    layer, x = LipschitzBatchNorm2d(3, 0.5), (100 + torch.randn(20, 3, 10, 10)).to(dtype)
    other, mixed = copy.deepcopy(layer), layer(x)
    assert mixed.dtype == dtype
    torch.testing.assert_close(mixed, other(x.float()).to(dtype))
    torch.testing.assert_close(layer.running_mean, other.running_mean)
    torch.testing.assert_close(layer.running_var, other.running_var)


def test_bad_input_is_named():
    layer = LipschitzBatchNorm2d(3)
    for shape, message in [((2, 4, 3, 3), "C = 3"), ((3,), "C = 3"), ((1, 3, 1, 1), "more than 1 value per channel")]:
        with pytest.raises(ValueError, match=message):
            layer(torch.zeros(shape))
    layer.eval()(torch.zeros(1, 3))
    for bad in (0, math.inf, math.nan):
        with pytest.raises(ValueError, match="gamma"):
            LipschitzBatchNorm2d(2, bad)


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, LipschitzBatchNorm2d])
def test_statistics_taken_again_are_those_of_torch(kind):
    """update_bn's for torch's BatchNorm, whose place the γ-BatchNorm takes with a slack limit; with dropout off."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)]
    oracle, x = nn.Sequential(*layers).train(), torch.rand(20, 2, 8, 8) + 1
    model = copy.deepcopy(oracle)
    for place in (1, 4):
        model[place] = kind(model[place].num_features).train(place == 1)
    model = nn.Sequential(*model[:3], nn.Dropout(0.9).eval(), *model[3:])
    model[1](torch.rand(9, 3, 2, 2))  # something to forget
    if kind is LipschitzBatchNorm2d:
        model[1].gamma = model[5].gamma = 1e6
    torch.optim.swa_utils.update_bn(x.tensor_split(3), oracle)
    assert refresh_statistics(model, x, batch_size=7) is model
    for place in (1, 4):
        ours, theirs = model[place + (place == 4)], oracle[place]
        torch.testing.assert_close(ours.running_mean, theirs.running_mean)
        torch.testing.assert_close(ours.running_var, theirs.running_var)
        assert (ours.momentum, ours.training) == (0.1, place == 1), "as before"
