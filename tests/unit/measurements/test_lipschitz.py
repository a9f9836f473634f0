"""The measurements of notebook 04: layers by name, statistics measured again, and γ against the exact geometry."""

import pytest
import torch

from lcnn_utils.curvature import geometry
from lcnn_utils.measurements import lipschitz as measurements
from lcnn_utils.measurements.curvature import layer_calls
from lcnn_utils.nn import LipschitzBatchNorm2d
from lcnn_utils.training import Recipe, accuracy, fit_recipe, samples

RECIPE = Recipe(dataset="digits", method="lcnn", model="resnet10", width=2, epochs=1, batch_size=256)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LCNN_STORE", str(tmp_path_factory.mktemp("store")))
        return fit_recipe(RECIPE, device="cpu", progress=False)[0]


def test_statistics_measured_again_are_those_of_what_arrives(trained):
    """After a change of γ; the net itself is left alone."""
    train = samples(RECIPE, "train")[0][:200]
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    net = measurements.with_gamma(trained, 2.0, train)
    for norm, inputs, _ in layer_calls(net, train, LipschitzBatchNorm2d):
        assert norm.lipschitz_constant() <= 2.0 * (1 + 1e-6)
        torch.testing.assert_close(norm.running_mean, inputs.mean((0, 2, 3)), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(norm.running_var, inputs.var((0, 2, 3)), rtol=1e-4, atol=1e-6)
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
