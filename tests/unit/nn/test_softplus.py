"""Centered softplus against 50-digit arithmetic, autograd's own checks, and its properties for all inputs."""

import importlib
import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call, jacfwd, jacrev

from lcnn_utils.nn import CenteredSoftplus, centered_softplus
from lcnn_utils.nn.softplus import BETA_RANGE, FUSED_FROM

module = importlib.import_module("lcnn_utils.nn.softplus")
BETAS = [1e-4, 0.3, 5.0, 1e4]
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
    if dtype.itemsize >= 4:
        each = torch.full_like(x, beta).requires_grad_()
        (by_beta,) = torch.autograd.grad(centered_softplus(x, each).sum(), each)
        close(by_beta, [truth(p, each[0].item())[3] for p in x.tolist()], dtype, 16)


@pytest.mark.parametrize("modes", ["fff", "rfr", "frf", "rrr"])
@pytest.mark.parametrize("layer", [False, True], ids=["function", "layer"])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_derivatives_of_derivatives_in_every_mode(modes, layer, cap):
    """The third one too, in x and in β: forward mode, nested, must not be 0."""
    x, beta = torch.tensor(0.3, dtype=torch.float64), torch.tensor(5.0, dtype=torch.float64)
    module = CenteredSoftplus(5.0, cap=cap).double()

    def function(x, beta):
        if layer:
            return functional_call(module, {"log_beta": beta.log()}, (x,))
        return centered_softplus(x, beta, cap)

    def plain(x, beta):  # differentiable as it stands, and exact enough here
        s = lambda x: ((1 + (beta * x).exp()) / 2).log() / beta
        return s(x) if cap is None else s(x) - s(x - cap) + s(torch.tensor(-cap))

    for argument in (0, 1):
        got, want = function, plain
        for mode in modes:
            got = {"f": jacfwd, "r": jacrev}[mode](got, argnums=argument)
            want = jacrev(want, argnums=argument)
        torch.testing.assert_close(got(x, beta), want(x, beta), rtol=1e-9, atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4), st.floats(-4, 4))
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


@pytest.mark.parametrize("bad", [0, -1.0, math.nan, math.inf])
def test_bad_beta_is_refused_by_name(bad):
    for call in (lambda: centered_softplus(torch.zeros(1), bad), lambda: CenteredSoftplus(bad)):
        with pytest.raises(ValueError, match="beta"):
            call()
    layer = CenteredSoftplus(5.0)
    with pytest.raises(ValueError, match="beta"):
        layer.beta = bad
    assert centered_softplus(torch.ones(2), torch.tensor([-1.0, 1.0])).isnan().tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("log_beta", [-3e4, -200.0, 200.0, 3e4])
def test_beta_keeps_within_its_range_and_can_come_back(log_beta, dtype):
    """Where e^{log β} would be 0 or infinite, values, slopes and gradients are finite, and log β moves on."""
    layer = CenteredSoftplus().to(dtype)
    layer.log_beta.data.fill_(log_beta)
    assert layer.beta.item() == pytest.approx(BETA_RANGE[log_beta > 0], rel=1e-5)
    x = torch.tensor([-2.0, 0.0, 3.0], dtype=dtype, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, x.relu() if log_beta > 0 else x / 2, rtol=1e-3, atol=1e-3)
    (by_x, by_log_beta) = torch.autograd.grad(y.sum() + layer.beta.log(), [x, layer.log_beta])
    assert by_x.isfinite().all()
    assert by_log_beta.item() == pytest.approx(1, rel=1e-2), "∂ log β/∂ log β, at the ends too"


def laid(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values, as memory may hold them."""
    if layout == "sliced":
        return torch.stack([x, -x], -1)[..., 0]
    if layout == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    return x.contiguous(memory_format=getattr(torch, layout))


layouts = st.sampled_from(["contiguous_format", "channels_last", "sliced", "transposed"])


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    log10_beta=st.floats(-2.3, 8), log10_scale=st.floats(-6, 4), seed=st.integers(0, 100),
    shape=st.sampled_from([(3, 4, 5, 2), (2, 1, 3, 3), (5, 3, 1, 1), (40, 16, 16, 16)]),
    layout=layouts, grad_layout=layouts, dtype=st.sampled_from(list(FUSED_FROM)),
)  # fmt: skip
def test_the_layer_is_the_function_within_what_is_stated(
    log10_beta, log10_scale, shape, layout, grad_layout, dtype, seed
):
    """Training's fast forms (on a CPU) against the function in float64, for all β, scales and layouts."""
    generator = torch.Generator().manual_seed(seed)
    x = laid((torch.randn(shape, generator=generator) * 10**log10_scale).to(dtype), layout).requires_grad_()
    g = laid(torch.randn(shape, generator=generator).to(dtype), grad_layout)
    layer = CenteredSoftplus(10**log10_beta)
    y = layer(x)
    by_x, by_log_beta = torch.autograd.grad(y, [x, layer.log_beta], g)

    wide = x.detach().double().requires_grad_()
    log_beta = layer.log_beta.detach().double().requires_grad_()
    want = centered_softplus(wide, log_beta.exp())
    want_x, want_log_beta = torch.autograd.grad(want, [wide, log_beta], g.double())
    ulp, parts = torch.finfo(dtype).eps, 1 / log_beta.exp() + wide.abs()
    # the rounding of log β in float32, |log β| ulps of β, is in the input and moves the result by what its slope says
    moved = torch.finfo(torch.float32).eps * (1 + log_beta.abs())
    assert ((y - want).abs() <= 2 * ulp * parts + moved * parts).all()
    assert ((by_x - want_x).abs() <= 4 * ulp * g.abs() + moved * g.abs()).all()
    assert (by_log_beta - want_log_beta).abs() <= (4 * ulp + moved) * (g.abs() * parts).sum()


@pytest.mark.parametrize("fused", [FUSED_FROM, {}], ids=["a CPU's form", "a GPU's"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("beta", [0.4, 5.0, 20.0])
def test_rounding_does_not_push_beta_to_one_side(beta, dtype, fused, monkeypatch):
    """Where x is large the gradient in log β is Σ g log 2/β: x − log 2/β, rounded, was always off to the same side."""
    monkeypatch.setattr(module, "FUSED_FROM", fused)
    layer = CenteredSoftplus(beta)
    x = torch.linspace(10 / beta, 20 / beta, 1000).to(dtype)
    layer(x).sum().backward()
    assert layer.log_beta.grad.item() == pytest.approx(1000 * math.log(2) / beta, rel=1e-2)


@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("beta", [1.0, 5.0, 10.0, 20.0, 1000.0])
def test_the_gradient_in_beta_is_no_noise_in_bfloat16(beta, one_sided):
    """The terms g (xσ − s₀) are small beside each of their parts, whose rounding must not drown the sum."""
    layer, off, exact = CenteredSoftplus(beta), [], []
    for seed in range(6):
        draw = torch.Generator().manual_seed(seed)
        x, g = (scale * torch.randn(65_536, generator=draw) for scale in (1.5, 1.0))
        x, g = x.bfloat16(), (g.abs() if one_sided else g).bfloat16()
        (found,) = torch.autograd.grad(layer(x), layer.log_beta, g)
        t = beta * x.double()
        terms = g.double() * (x.double() * torch.sigmoid(t) - centered_softplus(x.double(), beta))
        exact.append(terms.sum().item())
        off.append(found.item() - exact[-1])
    assert math.hypot(*off) < 0.1 * math.hypot(*exact)


@pytest.mark.parametrize(("beta", "layout"), [(0.02, "sliced"), (0.3, "channels_last"), (50.0, "contiguous_format")])
def test_a_graph_of_the_layers_gradient_is_exact(beta, layout):
    """As GradReg needs it, against the function: the gradient of a function of the gradient, in x, log β and g."""
    x, g = (torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(i)) for i in range(2))
    x, layer, found = laid(x, layout), CenteredSoftplus(beta), []
    function = lambda at, log_beta: centered_softplus(at, log_beta.exp())
    for dtype, f in (
        (torch.float64, function),
        (torch.float64, layer),
        (torch.float32, layer),
        (torch.bfloat16, layer),
    ):
        log_beta = layer.to(torch.promote_types(dtype, torch.float32)).log_beta
        at, above = x.to(dtype).requires_grad_(), g.to(dtype).requires_grad_()
        y = f(at) if f is layer else f(at, log_beta)
        first = torch.autograd.grad(y, [at, log_beta], above, create_graph=True)
        total = first[0].square().sum() + first[1].square()
        found.append(torch.autograd.grad(total, [at, above, log_beta]))
    for exact, *values in zip(*found, strict=True):
        for value, rtol in zip(values, (1e-4, 1e-4, 0.03), strict=True):
            torch.testing.assert_close(value.double(), exact, rtol=rtol, atol=rtol * exact.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("beta", [1e-2, 5.0, 1e3])
def test_capped_unit_in_every_dtype_and_at_infinity(dtype, beta):
    """Against 50 digits: 1000 in bfloat16 used to give 7.875 and infinity NaN, for a cap of 6."""
    points = [-math.inf, -9984.0, -3.0, -1e-3, 0.0, 1e-3, 2.0, 6.0, 9.0, 1000.0, 9984.0, math.inf]
    x = torch.tensor(points, dtype=dtype, requires_grad=True)
    layer = CenteredSoftplus(beta, cap=6.0).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    (by_x, by_log_beta) = torch.autograd.grad(y.sum(), [x, layer.log_beta])
    value = lambda p: truth(p, layer.beta.item())[0]
    far = 1e4 / beta  # the unit is constant beyond
    want = [value(p) - value(p - 6) + value(-6.0) for p in (min(max(p, -far), far) for p in x.tolist())]
    eps = torch.finfo(dtype).eps
    for point, got, expected in zip(points, y.tolist(), want, strict=True):
        assert abs(got - expected) <= 4 * eps * (6 + 40 / beta) + 1e-6 / beta, point
    assert by_x.isfinite().all()
    assert (by_x >= 0).all()
    assert (by_x <= 1).all()
    assert by_log_beta.isfinite()
