"""Activations and their compositions against torch's softplus, autograd and closed forms."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lcnn_utils.measurements import softplus as measurements

X = torch.linspace(-4, 4, 41).double()


def derivatives(x: torch.Tensor, beta: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Torch's softplus at x, its slope and its curvature, by autograd."""
    z = x.clone().requires_grad_()
    value = F.softplus(z, beta, threshold=1e9)
    (slope,) = torch.autograd.grad(value.sum(), z, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), z)
    return value.detach(), slope.detach(), curvature


def test_activations_against_autograd():
    frame = measurements.activation_frame((0.3, 2.0, 20.0), X)
    relu = frame[frame.activation == "relu"]
    np.testing.assert_array_equal(relu[["value", "slope"]], torch.stack([F.relu(X), (X > 0).double()], 1))
    assert (relu.curvature == 0).all()
    for (name, beta), part in frame[frame.activation != "relu"].groupby(["activation", "beta"]):
        value, slope, curvature = derivatives(X, beta)
        shift = math.log(2) / beta if name == "centered" else 0.0
        np.testing.assert_allclose(part.value, value - shift, rtol=1e-9, atol=1e-13)
        np.testing.assert_allclose(part.slope, slope, rtol=1e-9)
        np.testing.assert_allclose(part.curvature, curvature, rtol=1e-6, atol=1e-14)


@settings(max_examples=50, deadline=None)
@given(st.floats(-30, 30), st.floats(0.01, 1000), st.integers(1, 30))
def test_compositions_against_their_closed_forms(x, beta, depth):
    """log(n + e^{βx})/β and log(1 + (e^{βx} − 1)/2ⁿ)/β, in a form that does not overflow."""
    plain, centered = measurements.composition(torch.tensor([x], dtype=torch.float64), beta, depth)
    assert plain.item() == pytest.approx(np.logaddexp(math.log(depth), beta * x) / beta, rel=1e-9, abs=1e-9 / beta)
    t = beta * x
    inside = math.log1p(math.expm1(t) / 2**depth) if t < 700 else t - depth * math.log(2)
    assert centered.item() == pytest.approx(inside / beta, rel=1e-9, abs=1e-9 / beta)


def test_normalised_curvature_against_autograd():
    frame = measurements.normalised_curvature_frame((0.1, 2.0, 30.0), (-1.0, 0.0, 0.5))
    assert len(frame) == 9
    for row in frame.itertuples():
        _, slope, curvature = derivatives(torch.tensor(row.x, dtype=torch.float64), row.beta)
        assert row.normalised == pytest.approx((curvature / slope).item(), rel=1e-5)
        assert row.normalised <= row.beta
