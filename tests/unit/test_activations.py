"""Centered softplus against 50-digit arithmetic, autograd's own checks, and its properties for all inputs."""

import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lcnn_utils.activations import CenteredSoftplus, centered_softplus

BETAS = [1e-4, 1e-2, 0.3, 1.0, 5.0, 77.0, 1e3, 1e4]
POINTS = [s * m for m in (0.0, 1e-8, 1e-4, 1e-3, 0.02, 0.3, 1.0, 4.0, 30.0, 1e3, 1e4) for s in (1, -1)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def truth(x: float, beta: float) -> tuple[float, float, float, float]:
    """s₀, s₀', s₀'' in x and ∂s₀/∂β with 50 digits (|x| ≤ 1e4, β ≤ 1e4)."""
    with mpmath.workdps(50):
        x, beta = mpmath.mpf(x), mpmath.mpf(beta)
        t = beta * x
        log1pexp = mpmath.log1p(mpmath.exp(-abs(t))) + max(t, 0)
        value = (log1pexp - mpmath.log(2)) / beta
        sigma = 1 / (1 + mpmath.exp(-t))
        bump = mpmath.exp(-abs(t)) / (1 + mpmath.exp(-abs(t))) ** 2
        return value, sigma, beta * bump, (x * sigma - value) / beta


def close(got: torch.Tensor, want: list, dtype: torch.dtype, ulps: float, condition: list[float] | None = None) -> None:
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    for i, (g, w) in enumerate(zip(got.tolist(), want, strict=True)):
        allowed = ulps * eps * (condition[i] if condition else 1) * abs(w) + tiny
        assert math.isfinite(g), f"{g} at {POINTS[i]}"
        assert abs(g - w) <= allowed, f"{dtype} x={POINTS[i]}: got {g}, want {float(w)}"


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_and_derivatives_are_exact_in_every_dtype_at_both_ends(dtype, beta):
    x = torch.tensor(POINTS, dtype=dtype, requires_grad=True)
    b = torch.tensor(beta, dtype=torch.float64 if dtype == torch.float64 else torch.float32, requires_grad=True)
    y = centered_softplus(x, b)
    assert y.dtype == dtype
    points = [truth(p, b.item()) for p in x.tolist()]  # the truth at the numbers that the dtype holds
    close(y, [p[0] for p in points], dtype, 4)
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    # e^{−t} magnifies the rounding of t = βx by |t|: that much is in the input, not in the expression
    condition = [1 + abs(p * b.item()) for p in x.tolist()]
    close(first, [p[1] for p in points], dtype, 4, condition)
    (second,) = torch.autograd.grad(first.sum(), x)
    close(second, [p[2] for p in points], dtype, 8, condition)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_beta_gradient_does_not_cancel(dtype, beta):
    b = torch.full((len(POINTS),), beta, dtype=dtype, requires_grad=True)
    (slope,) = torch.autograd.grad(centered_softplus(torch.tensor(POINTS, dtype=dtype), b).sum(), b)
    close(slope, [truth(p, b[0].item())[3] for p in torch.tensor(POINTS, dtype=dtype).tolist()], dtype, 16)


def test_autograd_agrees_with_finite_differences_in_every_mode():
    torch.manual_seed(0)
    x = torch.cat([torch.randn(6), torch.zeros(1)]).double().requires_grad_()
    beta = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(centered_softplus, (x, beta), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(centered_softplus, (x, beta))
    hessian = torch.func.hessian(lambda x: centered_softplus(x, 3.0).sum())(x.detach())
    bump = 3 * torch.sigmoid(3 * x) * torch.sigmoid(-3 * x)
    torch.testing.assert_close(hessian, torch.diag(bump.detach()))
    over_beta = torch.func.vmap(lambda b: centered_softplus(x.detach(), b))(torch.tensor([1.0, 2.0]).double())
    torch.testing.assert_close(over_beta[1], centered_softplus(x.detach(), 2.0))


def test_limits_are_reached():
    x = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    assert (centered_softplus(x, 1e-6) - x / 2).abs().max() < 1e-5  # first term left out: βx²/8 = 8e-6
    assert (centered_softplus(x, 1e6) - x.relu()).abs().max() <= math.log(2) / 1e6 + 1e-14


@settings(deadline=None, max_examples=200)
@given(
    st.floats(-1e4, 1e4),
    st.floats(-1e4, 1e4),
    st.floats(-4, 4),
)
def test_properties_for_all_inputs(a, b, log10_beta):
    beta = 10.0**log10_beta
    x = torch.tensor([a, b, 0.0], dtype=torch.float64, requires_grad=True)
    y = centered_softplus(x, beta)
    assert y[2] == 0  # 0 is a fixed point
    assert abs(y[0] - y[1]) <= abs(a - b) * (1 + 1e-12) + 1e-300  # 1-Lipschitz
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert ((first >= 0) & (first <= 1)).all()
    assert ((second >= 0) & (second <= beta / 4 * (1 + 1e-12))).all()
    if a <= b:
        assert y[0] <= y[1] + 1e-12 * abs(y[1])  # increasing


@pytest.mark.parametrize("bad", [0, -1.0, math.nan, math.inf, None])
def test_bad_beta_is_refused_by_name(bad):
    for call in (lambda: centered_softplus(torch.zeros(1), bad), lambda: CenteredSoftplus(bad)):
        with pytest.raises(ValueError, match=r"beta must be a finite number > 0, got"):
            call()
    layer = CenteredSoftplus(5.0)
    with pytest.raises(ValueError, match="beta"):
        layer.beta = bad
    assert layer.beta.item() == pytest.approx(5.0)


def test_bad_tensors_are_loud():
    assert centered_softplus(torch.ones(2), torch.tensor([-1.0, 1.0])).isnan().tolist() == [True, False]
    with pytest.raises(TypeError, match="floating"):
        centered_softplus(torch.ones(2, dtype=torch.uint8), 1.0)


def test_module_learns_beta_or_keeps_it():
    learned, fixed = CenteredSoftplus(2.0), CenteredSoftplus(1000.0, trainable=False)
    assert [n for n, _ in learned.named_parameters()] == ["log_beta"]
    assert not list(fixed.parameters())
    assert "log_beta" in fixed.state_dict()
    learned(torch.randn(8)).pow(2).sum().backward()
    assert learned.log_beta.grad.abs() > 0
    learned.beta = 7
    assert learned.beta.item() == pytest.approx(7)
    assert "beta=7" in repr(learned)


@pytest.mark.parametrize("beta", [0.1, 5.0, 1e4])
def test_capped_unit_tends_to_relu6_and_keeps_the_three_properties(beta):
    layer = CenteredSoftplus(beta, cap=6.0).double()
    x = torch.linspace(-10, 16, 2001, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    assert abs(layer(torch.zeros(1, dtype=torch.float64)).item()) < 1e-12
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert first.max() <= 1
    assert second.abs().max() <= beta / 4 + 1e-9
    if beta == 1e4:
        torch.testing.assert_close(y, torch.nn.functional.relu6(x), atol=1e-3, rtol=0)


def test_compiled_is_one_graph_and_the_same(needs_compiler):
    def step(x, beta):
        return centered_softplus(x, beta)

    compiled = torch.compile(step, fullgraph=True)
    x, beta = torch.randn(64, 8, 5, 5, requires_grad=True), torch.tensor(5.0, requires_grad=True)
    for function in (step, compiled):
        function(x, beta).square().sum().backward()
    torch.testing.assert_close(compiled(x, beta), step(x, beta))
    x.grad, beta.grad = None, None
    step(x, beta).square().sum().backward()
    eager = x.grad.clone(), beta.grad.clone()
    x.grad, beta.grad = None, None
    compiled(x, beta).square().sum().backward()
    torch.testing.assert_close((x.grad, beta.grad), eager)
