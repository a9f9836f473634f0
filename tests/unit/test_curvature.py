"""Curvature against torch.func.hessian in float64 and closed forms."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lcnn_utils.curvature import SCALARS, evaluating, geometry, gradient_and_hvp, scalar_of
from lcnn_utils.curvature.hessian import METHODS
from lcnn_utils.nn import CenteredSoftplus


def mlp(seed: int, sizes=(20, 32, 32, 5), beta=5.0) -> nn.Module:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), CenteredSoftplus(beta)]
    return nn.Sequential(*layers[:-1]).double()


def cnn(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), CenteredSoftplus(10.0),
        nn.Conv2d(8, 8, 3, stride=2, padding=1), CenteredSoftplus(10.0),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4),
    ).double()  # fmt: skip
    net(torch.rand(64, 3, 10, 10).double())  # fills the running statistics
    return net


@pytest.mark.parametrize("before", [True, False])
def test_convolutions_on_a_gpu_are_measured_in_float32_not_tf32(before, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", before)
    with evaluating(nn.Identity()):
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32 == before


def exact(model: nn.Module, x: torch.Tensor, y: torch.Tensor, scalar: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Norms from torch.func alone, with the scalar written the textbook way."""

    def f(x, y):
        logits = model(x[None])[0]
        if scalar == "loss":
            return F.cross_entropy(logits, y)
        others = torch.cat([logits[:y], logits[y + 1 :]])
        return logits[y] - others.max() if scalar == "margin" else logits[y]

    grads, hessians = [], []
    with evaluating(model):
        for xi, yi in zip(x, y, strict=True):
            grads.append(torch.func.grad(f)(xi, int(yi) if scalar != "loss" else yi).norm())
            matrix = torch.func.hessian(f)(xi, int(yi) if scalar != "loss" else yi).reshape(xi.numel(), xi.numel())
            hessians.append(torch.linalg.matrix_norm(matrix, 2))
    return torch.stack(grads), torch.stack(hessians)


def case(kind: str, seed: int, n: int):
    model = mlp(seed) if kind == "mlp" else cnn(seed)
    x = torch.rand(n, 20).double() if kind == "mlp" else torch.rand(n, 3, 10, 10).double()
    return model, x, torch.randint(0, 4, (n,))


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
@pytest.mark.parametrize("scalar", SCALARS)
@pytest.mark.parametrize("method", METHODS)
def test_within_one_percent_of_the_exact_hessian(kind, scalar, method):
    model, x, y = case(kind, 0, 6)
    grads, hessians = exact(model, x, y, scalar)
    result = geometry(model, x, y, scalar=scalar, method=method, max_iter=1000)
    torch.testing.assert_close(result.grad_norm, grads)
    torch.testing.assert_close(result.hessian_norm, hessians, rtol=1e-2 if method != "exact" else 1e-9, atol=0)
    torch.testing.assert_close(result.curvature, result.hessian_norm / (result.grad_norm + 1e-6))
    assert (result.residual <= 1e-2).all()


@pytest.mark.parametrize("tol", [1e-2, 1e-4])
def test_lanczos_keeps_its_tolerance_over_many_random_nets(tol):
    worst, products = 0.0, []
    for seed in range(40):
        model, x, y = case("mlp", seed, 16)
        want = geometry(model, x, y, method="exact").hessian_norm
        got = geometry(model, x, y, tol=tol, max_iter=20)
        worst = max(worst, ((got.hessian_norm - want).abs() / want).max().item())
        products.append(int(got.iterations[0]))
        assert (got.hessian_norm <= want * (1 + 1e-9)).all()  # Ritz values lie inside the spectrum
    assert worst <= tol
    assert max(products) < 20, "never stopped early"


def quadratic(matrix: torch.Tensor) -> nn.Module:
    """Logits (½ xᵀAx, 0): the Hessian of logit 0, and of its margin, is A everywhere."""

    class Quadratic(nn.Module):
        def forward(self, x):
            value = torch.einsum("ni,ij,nj->n", x, matrix, x) / 2
            return torch.stack([value, torch.zeros_like(value)], 1)

    return Quadratic()


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-50, 50), min_size=2, max_size=24), st.integers(0, 10_000))
def test_any_spectrum_even_plus_minus_ties_and_zero(spectrum, seed):
    """Closed form: a quadratic with a given spectrum. Half the spectra get a ± tie, where xᵀHx may vanish."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor(spectrum, dtype=torch.float64)
    if seed % 2:
        values[-1] = -values[0]
    q = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))[0]
    matrix = q @ torch.diag(values) @ q.T
    x = torch.randn(3, len(values), generator=generator, dtype=torch.float64)
    y = torch.zeros(3, dtype=torch.long)
    want = values.abs().max()
    for method, limit in (("lanczos", 100), ("exact", 100)):
        got = geometry(quadratic(matrix), x, y, scalar="logit", method=method, tol=1e-3, max_iter=limit).hessian_norm
        assert ((got - want).abs() <= 1e-2 * want + 1e-9).all(), (method, got, want)


def test_power_iteration_reads_the_norm_right_at_a_tie():
    matrix = torch.diag(torch.tensor([3.0, -3.0, 1.0], dtype=torch.float64))
    result = geometry(quadratic(matrix), torch.randn(8, 3).double(), torch.zeros(8).long(), scalar="logit",
                      method="power", tol=1e-4)  # fmt: skip
    torch.testing.assert_close(result.hessian_norm, torch.full((8,), 3.0).double(), rtol=1e-3, atol=0)


def test_residual_is_honest_when_stopped_too_early():
    matrix = torch.diag(torch.linspace(0.9, 1.0, 300).double())
    result = geometry(quadratic(matrix), torch.randn(4, 300).double(), torch.zeros(4).long(), scalar="logit",
                      method="power", max_iter=2, tol=1e-6)  # fmt: skip
    assert (result.iterations == 2).all()
    assert (result.residual > 1e-6).all()


def test_hessian_vector_product_is_the_hessian_times_the_vector():
    model, x, y = case("cnn", 3, 2)
    v = torch.randn_like(x)
    with evaluating(model):
        _, product = gradient_and_hvp(model, x, y, "loss")
        for i in range(2):
            f = lambda z, i=i: F.cross_entropy(model(z[None]), y[i : i + 1])
            hessian = torch.func.hessian(f)(x[i]).reshape(300, 300)
            torch.testing.assert_close(product(v)[i].flatten(), hessian @ v[i].flatten())


def test_top_direction_is_the_eigenvector():
    model, x, y = case("mlp", 5, 4)
    g = geometry(model, x, y, tol=1e-6)
    direction, norm = g.direction, g.hessian_norm
    _, product = gradient_and_hvp(model.eval(), x, y)
    torch.testing.assert_close(direction.norm(dim=1), torch.ones(4).double())
    torch.testing.assert_close(product(direction).norm(dim=1), norm, rtol=1e-4, atol=0)


def test_curvature_is_invariant_to_the_scale_of_f_but_not_of_x():
    model, x, y = case("mlp", 1, 5)
    plain = geometry(model, x, y, scalar="logit", tol=1e-6, eps=0)
    scaled = geometry(nn.Sequential(model, Scale(7.0)), x, y, scalar="logit", tol=1e-6, eps=0)
    torch.testing.assert_close(scaled.curvature, plain.curvature)
    zoomed = geometry(nn.Sequential(Scale(2.0), model), x / 2, y, scalar="logit", tol=1e-6, eps=0)
    torch.testing.assert_close(zoomed.curvature, 2 * plain.curvature)  # unit 1/x


class Scale(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


@pytest.mark.parametrize("confidence", [1.0, 20.0, 80.0])
def test_loss_gradient_survives_confidence_that_rounds_p_to_one(confidence):
    """−log p_y of a linear net in float32: ∇ = −(1−p)·Δw, and 1−p = e^{−80} is far below float32's ulp of 1."""
    logits = torch.tensor([[confidence, 0.0]], requires_grad=True)
    loss = scalar_of(logits, torch.tensor([0]))
    (grad,) = torch.autograd.grad(loss, logits)
    want = 1 / (1 + math.exp(confidence))
    assert grad[0, 1].item() == pytest.approx(want, rel=1e-4)
    wrong = scalar_of(torch.tensor([[0.0, confidence]]), torch.tensor([0]))
    assert wrong.item() == pytest.approx(confidence + math.log1p(math.exp(-confidence)), rel=1e-6)


def test_loss_is_cross_entropy():
    logits, y = torch.randn(50, 7).double() * 9, torch.randint(0, 7, (50,))
    torch.testing.assert_close(scalar_of(logits, y), F.cross_entropy(logits, y, reduction="none"))


def test_batching_changes_nothing_and_the_model_is_left_as_found():
    model, x, y = case("cnn", 2, 7)
    model.train()
    model[2].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    whole = geometry(model, x, y, tol=1e-8, max_iter=300)
    split = geometry(model, x, y, tol=1e-8, max_iter=300, batch_size=3)
    torch.testing.assert_close(whole.curvature, split.curvature)
    assert model.training
    assert model[1].training
    assert not model[2].training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_labels_default_to_the_prediction_and_affine_nets_are_flat():
    model, x, _ = case("mlp", 4, 5)
    y = model(x).argmax(1)
    torch.testing.assert_close(geometry(model, x).curvature, geometry(model, x, y).curvature)
    flat = geometry(nn.Linear(20, 3).double(), x, scalar="margin")
    assert (flat.curvature < 1e-12).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(scalar="los"), "unknown scalar 'los'.*did you mean 'loss'"),
        (dict(method="lancsoz"), "unknown method.*did you mean 'lanczos'"),
        (dict(tol=0.0), "tol must lie between"),
        (dict(max_iter=0), "max_iter"),
        (dict(x=torch.zeros(2, 3, 10, 10, dtype=torch.uint8)), "uint8"),
        (dict(x=torch.full((2, 3, 10, 10), 1.5).double()), r"\[0, 1\]"),
        (dict(x=torch.full((2, 3, 10, 10), math.nan).double()), "NaN"),
        (dict(y=torch.tensor([0, 9])), "9"),
        (dict(y=torch.tensor([0])), "label"),
        (dict(x=torch.rand(2, 5, 10, 10).double()), r"does not take inputs of shape \(2, 5, 10, 10\)"),
        (dict(x=torch.rand(2, 3, 10, 10)), "float32.*float64"),
        (dict(x=torch.zeros(0, 3, 10, 10).double()), "at least one sample"),
        (dict(x=[1.0]), "at least one sample, got list"),
        (dict(batch_size=0), "batch_size"),
    ],
)
def test_bad_input_is_named(change, message):
    model, x, y = case("cnn", 0, 2)
    arguments = dict(x=x, y=y) | change
    with pytest.raises(ValueError, match=message):
        geometry(model, **arguments)


def test_points_that_are_not_finite_and_huge_hessians_are_refused():
    with pytest.raises(ValueError, match="finite"):
        geometry(mlp(0), torch.full((2, 20), math.inf).double())
    with pytest.raises(ValueError, match="4096"):
        geometry(nn.Linear(5000, 2), torch.rand(1, 5000), method="exact")
    broken = mlp(0)
    broken[0].weight.data[0] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        geometry(broken, torch.rand(2, 20).double())


def test_top_direction_where_the_hessian_is_zero():
    flat = nn.Linear(20, 3).double()
    for method in ("power", "lanczos", "exact"):
        g = geometry(flat, torch.rand(2, 20).double(), scalar="logit", method=method)
        direction, norm = g.direction, g.hessian_norm
        assert direction.isfinite().all(), method
        assert (norm == 0).all()


def test_scaling_logits_changes_the_curvature_of_the_loss_but_not_of_the_margin():
    model, x, y = case("mlp", 1, 5)
    for scalar, same in (("margin", True), ("loss", False)):
        plain = geometry(model, x, y, scalar=scalar, tol=1e-6, eps=0).curvature
        scaled = geometry(nn.Sequential(model, Scale(3.0)), x, y, scalar=scalar, tol=1e-6, eps=0).curvature
        assert torch.allclose(plain, scaled, rtol=1e-3) == same
