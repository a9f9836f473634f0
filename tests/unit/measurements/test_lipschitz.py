"""What notebook 04 measures is right: against dense matrices, against ``fit``, and against the bounds."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from lcnn_utils.curvature import geometry
from lcnn_utils.measurements import lipschitz as measurements
from lcnn_utils.measurements.curvature import layer_calls
from lcnn_utils.nn import LipschitzBatchNorm2d, conv_norm, refresh_norms, resnet
from lcnn_utils.nn.resnet import AveragedBlock, _Parts
from lcnn_utils.training import Recipe, accuracy, fit, samples

RECIPE = Recipe("digits", "lcnn", "resnet10", width=2, epochs=1, batch_size=256)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LCNN_STORE", str(tmp_path_factory.mktemp("store")))
        return fit(RECIPE, device="cpu", progress=False)[0]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(2, 6, 6), (3, 5, 8), (1, 4, 3)])
def test_matrix_and_norm_of_a_convolution(stride, shape):
    conv = measurements.random_conv(shape[0], 4, seed=1, stride=stride)
    matrix = measurements.conv_matrix(conv, shape)
    x = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(x.flatten(1) @ matrix.mT, conv(x).flatten(1))
    top = torch.linalg.svdvals(matrix)[0].item()
    assert measurements.sparse_norm(conv, shape) == pytest.approx(top, rel=1e-8)
    assert conv_norm(conv, shape, "exact").item() == pytest.approx(top, rel=1e-12)


def test_estimates_of_norms_keep_their_sides():
    frame = measurements.norms_frame((4, 9), kernels=4)
    low, high = frame.groupby("estimate").ratio.min(), frame.groupby("estimate").ratio.max()
    assert max(high["reshaped"], high["power"]) <= 1 + 1e-9
    assert min(low["bound"], low["scaled"]) >= 1
    norms = frame.pivot(index=["stride", "size", "kernel"], columns="estimate", values="norm")
    np.testing.assert_allclose((norms.scaled / norms.reshaped).groupby("stride").mean(), [3, 2])
    true = frame.groupby(["stride", "kernel", "size"]).true.first().unstack()
    assert (true[9] >= true[4]).all(), "more room, more norm"


def test_names_of_layers():
    model = resnet(18, num_classes=10, width=2, in_channels=1, image_size=8)
    layers = measurements.conv_layers(model, torch.zeros(1, 1, 8, 8))
    assert list(layers)[:4] == ["stem", "block 1 conv 1", "block 1 conv 2", "block 2 conv 1"]
    assert ["shortcut" in name for name in layers].count(True) == 3
    assert len(layers) == 1 + 16 + 3
    for conv, norm, shape in layers.values():
        assert (norm.num_features, shape[0]) == (conv.out_channels, conv.in_channels)
    assert layers["block 4 conv 1"][2] == (4, 4, 4)
    assert measurements.layer_name("11") == "classifier"


def test_looking_at_the_norms_does_not_change_the_training(trained):
    """Bit for bit what ``fit`` makes; and the errors are those of the dense norms."""
    model, frame = measurements.training_norms(RECIPE, every=2)
    assert sorted(frame.step.unique()) == [0, 2, 4]
    np.testing.assert_allclose(frame.error, (1 - 1 / frame.norm).clip(lower=1e-7))
    assert frame.norm.min() > 1 - 1e-5
    refresh_norms(model)
    for name, value in trained.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    norms = measurements.norm_errors(model).set_index("layer").norm
    for layer, (conv, _, shape) in measurements.conv_layers(model, torch.zeros(1, 1, 8, 8)).items():
        assert norms[layer] == pytest.approx(conv_norm(conv, shape, "exact").item(), rel=1e-5)


def test_spectra_against_dense_jacobians(trained):
    x, _ = samples(RECIPE, "test")
    frame = measurements.spectra_frame({"lcnn": trained}, x)
    tops = frame.groupby(["layer", "operator"]).value.max()
    for layer, (conv, norm, shape) in measurements.conv_layers(trained, x).items():
        pixels = torch.eye(math.prod(shape)).view(-1, *shape)
        for operator, net in (("convolution", [conv]), ("convolution, then BatchNorm", [conv, norm])):
            both = nn.Sequential(*net)
            with torch.no_grad():
                jacobian = (both(pixels) - both(0 * pixels)).flatten(1).double()
            assert tops[layer, operator] == pytest.approx(torch.linalg.matrix_norm(jacobian, 2).item(), rel=1e-4)


def test_statistics_measured_again_are_those_of_what_arrives(trained):
    """After a change of γ; with means alone the variances stay; the net itself is left alone."""
    train = samples(RECIPE, "train")[0][:200]
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    for variances in (True, False):
        net = measurements.with_gamma(trained, 2.0, train, variances=variances)
        old_norms = [norm for norm, _, _ in layer_calls(trained, train, LipschitzBatchNorm2d)]
        for (norm, inputs, _), old in zip(layer_calls(net, train, LipschitzBatchNorm2d), old_norms, strict=True):
            assert norm.lipschitz_constant() <= 2.0 * (1 + 1e-6)
            torch.testing.assert_close(norm.running_mean, inputs.mean((0, 2, 3)), rtol=1e-4, atol=1e-6)
            expected = inputs.var((0, 2, 3)) if variances else old.running_var
            torch.testing.assert_close(norm.running_var, expected, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in before.items())


def test_gamma_frame_against_the_exact_geometry(trained):
    x, y = samples(RECIPE, "test")
    frame = measurements.gamma_frame({"lcnn": trained}, (2.0, 1e6), (x, y), x[:50], images=3)
    assert frame.groupby(["gamma", "statistics"]).layer.nunique().tolist() == [12] * 4
    assert (frame[frame.gamma == 2].slope <= 2 * (1 + 1e-6)).all()
    wide = measurements.with_gamma(trained, 1e6)
    row = frame[(frame.gamma == 1e6) & (frame.statistics == "as trained")].iloc[0]
    g = geometry(wide, x[:3], y[:3], scalar="margin", method="exact")
    assert row.accuracy == pytest.approx(accuracy(wide, x, y))
    assert row.curvature == pytest.approx(g.curvature.median().item(), rel=0.05)
    assert row.grad_norm == pytest.approx(g.grad_norm.median().item(), rel=1e-4)


def test_stacks_of_residual_blocks():
    frame = measurements.residual_frame(4, (0, 1), shape=(2, 4, 4))
    bounded = frame.dropna()
    assert set(bounded.block) == {"sum", "average"}
    assert (bounded.slope <= bounded.bound * (1 + 1e-9)).all()
    row = frame[(frame.block == "sum") & (frame.seed == 1)].iloc[0]
    branch = measurements.random_branch((2, 4, 4), 1000 + 2, batchnorm=False).eval()
    block = lambda z: measurements.residual_block(branch, False, z)
    z = torch.randn(32, 2, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)[:1]
    jacobian = torch.autograd.functional.jacobian(block, z).reshape(32, 32)
    assert row.slope == pytest.approx(torch.linalg.matrix_norm(jacobian, 2).item(), rel=1e-6)
    assert row.signal == pytest.approx((block(z).norm() / z.norm()).item(), rel=1e-6)


def test_the_averaged_block_is_the_authors():
    """Given the same branch, it computes what ``nn.AveragedBlock`` does."""
    theirs = AveragedBlock(2, 2, 1, 4, _Parts(True, 5.0, 10.0)).double().eval()
    theirs.branch = measurements.random_branch((2, 4, 4), 3, batchnorm=False).eval()
    z = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(measurements.residual_block(theirs.branch, True, z), theirs(z), rtol=1e-6, atol=1e-8)
