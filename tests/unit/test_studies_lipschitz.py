"""What notebook 04 measures is right: against dense matrices, against ``fit``, and against the bounds."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from lcnn_utils import nn as models
from lcnn_utils.curvature import geometry
from lcnn_utils.nn import CenteredSoftplus, LipschitzBatchNorm2d, conv_norm, refresh_norms, spectral_normalize
from lcnn_utils.nn.resnet import AveragedBlock, _Parts
from lcnn_utils.measurements import lipschitz as measurements
from lcnn_utils.training import Recipe, accuracy, fit, samples

RECIPE = Recipe("digits", "lcnn", "resnet10", width=2, epochs=1, batch_size=256)


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LCNN_STORE", str(tmp_path_factory.mktemp("store")))
        return {
            method: fit(Recipe("digits", method, "resnet10", width=2, epochs=1), device="cpu", progress=False)[0]
            for method in ("standard", "lcnn")
        }


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


def test_the_same_seed_gives_the_same_kernel_and_touches_no_global_state():
    state = torch.random.get_rng_state()
    one, two = (measurements.random_conv(2, 3, seed=5, stride=s).weight for s in (1, 2))
    assert torch.equal(one, two)
    assert torch.equal(state, torch.random.get_rng_state())


def test_norms_frame_keeps_its_bounds():
    frame = measurements.norms_frame((4, 9), kernels=4)
    assert len(frame) == 2 * 2 * 4 * 4
    np.testing.assert_allclose(frame.ratio, frame.norm / frame.true)
    ratio = frame.groupby("estimate").ratio
    assert ratio.max()["reshaped"] <= 1
    assert ratio.max()["power"] <= 1 + 1e-9
    assert ratio.min()["bound"] >= 1
    assert ratio.min()["scaled"] >= 1
    wide = frame.pivot(index=["stride", "size", "kernel"], columns="estimate", values="norm")
    np.testing.assert_allclose((wide.scaled / wide.reshaped).groupby("stride").mean(), [3, 2])
    true = frame.groupby(["stride", "kernel", "size"]).true.first().unstack()
    assert (true[9] >= true[4]).all(), "more room, more norm"


def test_power_frame_comes_from_below():
    ratio = measurements.power_frame((1, 5, 200), kernels=4, size=6).pivot(
        index="iterations", columns="kernel", values="ratio"
    )
    assert (ratio <= 1 + 1e-9).all(axis=None)
    assert (ratio.diff().iloc[1:] >= 0).all(axis=None)
    assert (ratio.loc[200] > 0.99).all()


def test_random_start():
    layer = spectral_normalize(nn.Linear(6, 3, bias=False))
    weight = layer.parametrizations.weight.original.detach().double()
    conv = nn.Conv2d(6, 3, 1, bias=False).double()
    conv.weight.data = weight[..., None, None]
    norms = [conv_norm(conv, (6, 1, 1), "power", 1, torch.Generator().manual_seed(seed)).item() for seed in range(1000)]
    error = 1 - np.median(norms) / torch.linalg.svdvals(weight)[0].item()
    assert measurements.random_start_error(layer, 20_000) == pytest.approx(error, rel=0.15)
    assert measurements.random_start_error(layer) == measurements.random_start_error(layer)


def test_names_of_layers():
    model = models.resnet(18, num_classes=10, width=2, in_channels=1, image_size=8)
    found = measurements.conv_layers(model, torch.zeros(1, 1, 8, 8))
    assert list(found)[:4] == ["stem", "block 1 conv 1", "block 1 conv 2", "block 2 conv 1"]
    assert len(found) == 1 + 16 + 3
    assert sum("shortcut" in name for name in found) == 3
    for conv, norm, shape in found.values():
        assert isinstance(norm, nn.BatchNorm2d)
        assert (norm.num_features, shape[0]) == (conv.out_channels, conv.in_channels)
    assert found["block 4 conv 1"][2] == (4, 4, 4)
    assert measurements.layer_name("11") == "classifier"


def test_looking_at_the_norms_does_not_change_the_training(store):
    """Bit for bit what ``fit`` makes, however often one looks; and the errors are those of the dense norms."""
    fitted, _ = fit(RECIPE, device="cpu", progress=False)
    for every in (2,):
        model, frame = measurements.training_norms(RECIPE, every)
        assert sorted(frame.step.unique()) == list(range(0, 5, every))
        assert frame.groupby("step").layer.nunique().eq(13).all()
        np.testing.assert_allclose(frame.error, (1 - 1 / frame.norm).clip(lower=1e-7))
        assert frame.norm.min() > 1 - 1e-5
        refresh_norms(model)
        for name, value in fitted.state_dict().items():
            assert torch.equal(value, model.state_dict()[name]), name
    errors = measurements.norm_errors(model).set_index("layer").norm
    for layer, (conv, _, shape) in measurements.conv_layers(model, torch.zeros(1, 1, 8, 8)).items():
        assert errors[layer] == pytest.approx(conv_norm(conv, shape, "exact").item(), rel=1e-5)


def test_spectra_and_slopes(nets):
    x, _ = samples(RECIPE, "test")
    frame = measurements.spectra_frame(nets, x)
    for method, net in nets.items():
        for layer, (conv, norm, shape) in measurements.conv_layers(net, x).items():
            part = frame[(frame.method == method) & (frame.layer == layer)]
            top = part.groupby("operator").value.max()
            assert top["convolution"] == pytest.approx(conv_norm(conv, shape, "exact").item(), rel=1e-5)
            both = nn.Sequential(conv, norm)
            pixels = torch.eye(math.prod(shape)).view(-1, *shape)
            with torch.no_grad():
                jacobian = (both(pixels) - both(torch.zeros(1, *shape))).flatten(1)
            exact = torch.linalg.matrix_norm(jacobian.double(), 2).item()
            assert top["convolution, then BatchNorm"] == pytest.approx(exact, rel=1e-4)
            assert part.groupby("operator").share.max().eq(1).all()
    slopes = measurements.slopes_frame(nets, x)
    assert slopes[slopes.method == "standard"].gamma.isna().all()
    norm = measurements.conv_layers(nets["lcnn"], x)["stem"][1]
    stem = slopes[(slopes.method == "lcnn") & (slopes.layer == "stem")]
    assert stem.slope.clip(upper=stem.gamma).max() == pytest.approx(norm.lipschitz_constant().item(), rel=1e-6)


def test_gamma(nets):
    x, y = samples(RECIPE, "test")
    train = samples(RECIPE, "train")[0][:200]
    net = nets["lcnn"]
    before = {name: value.clone() for name, value in net.state_dict().items()}
    wide = measurements.with_gamma(net, 1e6)
    anew = measurements.with_gamma(net, 2.0, train)
    again = measurements.with_gamma(anew, 2.0, train)
    for module, other in zip(anew.modules(), again.modules(), strict=True):
        if isinstance(module, LipschitzBatchNorm2d):
            assert module.gamma.item() == pytest.approx(2.0)
            assert module.lipschitz_constant() <= 2.0 * (1 + 1e-6)
            torch.testing.assert_close(module.running_var, other.running_var)
            assert not module.training
    assert torch.isfinite(wide(x)).all()
    means = measurements.with_gamma(net, 2.0, train, variances=False)
    for (name, norm), other in zip(
        measurements.conv_layers(means, x).items(), measurements.conv_layers(net, x).values(), strict=True
    ):
        seen = []
        hook = norm[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))  # noqa: B023
        with torch.no_grad():
            means(train)
        hook.remove()
        torch.testing.assert_close(norm[1].running_mean, seen[0].mean((0, 2, 3)), msg=name)
        assert torch.equal(norm[1].running_var, other[1].running_var)
    assert not any(module._forward_pre_hooks for module in means.modules())
    frame = measurements.gamma_frame({"lcnn": net}, (2.0, 1e6), (x, y), train, images=3)
    assert list(frame.statistics.unique()) == list(measurements.STATISTICS)
    assert len(frame) == 2 * 2 * 12
    part = frame[(frame.gamma == 1e6) & (frame.statistics == "as trained")].iloc[0]
    assert part.accuracy == pytest.approx(accuracy(wide, x, y))
    g = geometry(wide, x[:3], y[:3], scalar="margin", method="exact")
    assert part.curvature == pytest.approx(g.curvature.median().item(), rel=0.05)
    assert part.grad_norm == pytest.approx(g.grad_norm.median().item(), rel=1e-4)
    assert (frame[frame.gamma == 2].slope <= 2 * (1 + 1e-6)).all()
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items()), "the net is left alone"


def test_input_spread():
    """For one layer it is β times the standard deviation of what comes in."""
    x = torch.randn(50, 2, 3, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 3.0]).view(2, 1, 1)
    model = nn.Sequential(CenteredSoftplus(4.0), nn.Flatten(), nn.Linear(18, 2))
    spread = (x[:, 0].std() + x[:, 1].std()).item() / 2
    torch.testing.assert_close(measurements.input_spread(model, x), torch.tensor([4 * spread]))
    assert not model[0]._forward_pre_hooks


def test_residual_stacks():
    frame = measurements.residual_frame(4, (0, 1), channels=2, size=4)
    assert list(frame.block.unique()) == list(measurements.MERGES)
    bounded = frame.dropna()
    assert (bounded.slope <= bounded.bound * (1 + 1e-9)).all()
    assert set(bounded.block) == {"sum", "average"}
    at = frame[frame.seed == 0].pivot(index="blocks", columns="block", values="signal").loc[4]
    assert at["average"] < 0.1 * at["sum"]
    assert at["average + γ-BatchNorm"] > 10 * at["average"]
    one = frame[(frame.block == "sum") & (frame.seed == 1) & (frame.blocks == 1)].iloc[0]
    block = measurements._Block("sum", (2, 4, 4), 1000 + 2, 5.0).eval()
    z = torch.randn(32, 2, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)[:1]
    jacobian = torch.autograd.functional.jacobian(block, z).reshape(32, 32)
    assert one.slope == pytest.approx(torch.linalg.matrix_norm(jacobian, 2).item(), rel=1e-6)
    assert one.signal == pytest.approx((block(z).norm() / z.norm()).item(), rel=1e-6)


def test_the_block_is_the_authors():
    """Given the same branch and no BatchNorm, the averaged block computes what ``nn.AveragedBlock`` does."""
    ours = measurements._Block("average", (2, 4, 4), 3, 5.0).eval()
    theirs = AveragedBlock(2, 2, 1, 4, _Parts(True, 5.0, 10.0)).double().eval()
    theirs.branch = ours.branch
    z = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(ours(z), theirs(z))
