"""Curvature against torch.func.hessian in float64 and closed forms."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lcnn_utils.curvature import SCALARS, evaluating, geometry, gradient_and_hvp, length
from lcnn_utils.curvature.hessian import METHODS
from lcnn_utils.nn import CenteredSoftplus, mlp


def cnn() -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), CenteredSoftplus(10.0),
        nn.Conv2d(8, 8, 3, stride=2, padding=1), CenteredSoftplus(10.0),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4),
    ).double()  # fmt: skip
    net(torch.rand(64, 3, 6, 6).double())  # fills the running statistics
    return net


def case(kind: str, seed: int, n: int):
    torch.manual_seed(seed)
    model = mlp((20, 32, 32, 5), beta=5.0).double() if kind == "mlp" else cnn()
    x = torch.rand(n, 20).double() if kind == "mlp" else torch.rand(n, 3, 6, 6).double()
    return model, x, torch.randint(0, 4, (n,))


def dense(model: nn.Module, x: torch.Tensor, y: torch.Tensor, scalar: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient norms (N,) and Hessians (N, d, d) from torch.func alone, with the scalar written the textbook way."""

    def f(x, y):
        logits = model(x[None])[0]
        if scalar == "loss":
            return F.cross_entropy(logits, torch.tensor(y))
        others = torch.cat([logits[:y], logits[y + 1 :]])
        return logits[y] - others.max() if scalar == "margin" else logits[y]

    with evaluating(model):
        grads = [torch.func.grad(f)(a, int(b)).norm() for a, b in zip(x, y, strict=True)]
        hessians = [torch.func.hessian(f)(a, int(b)).reshape(a.numel(), -1) for a, b in zip(x, y, strict=True)]
    return torch.stack(grads), torch.stack(hessians)


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
@pytest.mark.parametrize("scalar", SCALARS)
def test_every_method_against_the_exact_hessian(kind, scalar):
    model, x, y = case(kind, 0, 4)
    grads, hessians = dense(model, x, y, scalar)
    norms = torch.linalg.matrix_norm(hessians, 2)
    for method in METHODS:
        g = geometry(model, x, y, scalar=scalar, method=method, max_iter=1000)
        torch.testing.assert_close(g.grad_norm, grads)
        torch.testing.assert_close(g.hessian_norm, norms, rtol=1e-2 if method != "exact" else 1e-9, atol=0)
        torch.testing.assert_close(g.curvature, g.hessian_norm / (g.grad_norm + 1e-6))
        assert (g.residual <= 1e-2).all()
        change = torch.einsum("nij,nj->ni", hessians, g.direction.flatten(1)).norm(dim=1)
        torch.testing.assert_close(length(g.direction), torch.ones(4).double())
        torch.testing.assert_close(change, norms, rtol=1e-2, atol=0)
    v = torch.randn_like(x)
    product = gradient_and_hvp(model.eval(), x, y, scalar)[1](v).flatten(1)
    torch.testing.assert_close(product, torch.einsum("nij,nj->ni", hessians, v.flatten(1)))


@pytest.mark.parametrize("tol", [1e-2, 1e-4])
def test_lanczos_keeps_its_tolerance_over_random_nets(tol):
    products = []
    for seed in range(4):
        model, x, y = case("mlp", seed, 16)
        want = geometry(model, x, y, method="exact").hessian_norm
        got = geometry(model, x, y, tol=tol, max_iter=20)
        assert ((got.hessian_norm - want).abs() <= tol * want).all()
        assert (got.hessian_norm <= want * (1 + 1e-9)).all()  # Ritz values lie inside the spectrum
        products.append(int(got.iterations[0]))
    assert max(products) < 20, "never stopped early"


class Quadratic(nn.Module):
    """Logits (½ xᵀAx, 0): the Hessian of logit 0 is A everywhere."""

    def __init__(self, spectrum: torch.Tensor, seed: int = 0) -> None:
        super().__init__()
        d = len(spectrum)
        q = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed)).double()).Q
        self.matrix = q @ spectrum.double().diag() @ q.T

    def forward(self, x):
        value = torch.einsum("ni,ij,nj->n", x, self.matrix, x) / 2
        return torch.stack([value, torch.zeros_like(value)], 1)

    def measured(self, n: int, **options):
        x = torch.randn(n, len(self.matrix), generator=torch.Generator().manual_seed(1)).double()
        return geometry(self, x, torch.zeros(n).long(), scalar="logit", **options)


@settings(deadline=None, max_examples=15)
@given(st.lists(st.floats(-50, 50), min_size=2, max_size=24), st.integers(0, 10_000), st.booleans())
def test_any_spectrum_even_plus_minus_ties_and_zero(spectrum, seed, tie):
    values = torch.tensor(spectrum, dtype=torch.float64)
    if tie:  # where xᵀHx may vanish
        values[-1] = -values[0]
    want = values.abs().max()
    for method in ("lanczos", "exact"):
        got = Quadratic(values, seed).measured(3, method=method, tol=1e-3).hessian_norm
        assert ((got - want).abs() <= 1e-2 * want + 1e-9).all(), (method, got, want)


class Diagonal(nn.Module):
    """The Hessian of logit 0 is 3 I, or ± 3 on the diagonal, where x₀ > 0, and has d eigenvalues up to 2 elsewhere."""

    def __init__(self, d: int, sign: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.few, self.many = torch.full((d,), 3.0, dtype=dtype), torch.linspace(0.1, 2.0, d, dtype=dtype)
        self.few[::2] *= sign

    def forward(self, x):
        value = (torch.where(x[:, :1] > 0, self.few, self.many) * x.square()).sum(1) / 2
        return torch.stack([value, torch.zeros_like(value)], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("d", [8, 300])
def test_samples_whose_krylov_space_ends_at_once_beside_others(d, sign, dtype):
    x = torch.randn(6, d, generator=torch.Generator().manual_seed(0), dtype=dtype)
    found = geometry(Diagonal(d, sign, dtype), x, torch.zeros(6).long(), scalar="logit")
    torch.testing.assert_close(found.hessian_norm, torch.where(x[:, 0] > 0, 3, 2).to(dtype), rtol=3e-2, atol=0)


def test_power_iteration_at_a_tie_and_where_its_start_hides_the_top_eigenvector():
    tie = Quadratic(torch.tensor([3.0, -3.0, 1.0])).measured(8, method="power", tol=1e-4).hessian_norm
    torch.testing.assert_close(tie, torch.full((8,), 3.0).double(), rtol=1e-3, atol=0)
    spectrum = torch.tensor([3.0, 1.0, *[1e-3] * 30])  # the first small residual is at another eigenvalue
    for seed in range(12):
        assert Quadratic(spectrum, seed).measured(1, method="power").hessian_norm.item() == pytest.approx(3, rel=0.02)


def test_residual_is_honest_when_stopped_too_early():
    g = Quadratic(torch.linspace(0.9, 1.0, 300)).measured(4, method="power", max_iter=2, tol=1e-6)
    assert (g.iterations == 2).all()
    assert (g.residual > 1e-6).all()


def times(factor: float, d: int) -> nn.Module:
    layer = nn.Linear(d, d, bias=False).double()
    layer.weight.data = factor * torch.eye(d).double()
    return layer


def test_scaling_f_or_x():
    model, x, y = case("mlp", 1, 5)
    for scalar in SCALARS:
        options = dict(scalar=scalar, tol=1e-6, eps=0)
        plain = geometry(model, x, y, **options).curvature
        louder = geometry(nn.Sequential(model, times(3.0, 5)), x, y, **options).curvature
        assert torch.allclose(plain, louder, rtol=1e-3) == (scalar != "loss")
        zoomed = geometry(nn.Sequential(times(2.0, 20), model), x / 2, y, **options).curvature
        torch.testing.assert_close(zoomed, 2 * plain)  # unit 1/x


def test_batching_changes_nothing_and_the_model_is_left_as_found():
    model, x, _ = case("cnn", 2, 7)
    y = model.eval()(x).argmax(1)
    model.train()[2].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    whole = geometry(model, x, y, tol=1e-8, max_iter=300)
    split = geometry(model, x, tol=1e-8, max_iter=300, batch_size=3)  # labels: the predictions
    torch.testing.assert_close(whole.curvature, split.curvature)
    assert (model.training, model[1].training, model[2].training) == (True, True, False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_affine_nets_are_flat(method):
    flat = geometry(nn.Linear(20, 3).double(), torch.rand(2, 20).double(), scalar="margin", method=method)
    assert (flat.hessian_norm == 0).all()
    assert flat.direction.isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_derivatives_of_confident_samples(method):
    """Their squares vanish in float32; where they vanish themselves, the residual says so."""
    net = nn.Linear(4, 3)
    net.weight.data = torch.tensor([[2.0, 1.0, 0.0, 0.0], [0.0, 0.0, 3.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    x, y = torch.full((2, 4), 0.01), torch.tensor([0, 0])
    for margin in (1.0, 30.0, 66.0, 90.0):
        net.bias.data = torch.tensor([margin, 0.0, -1.0])
        got = geometry(net.float(), x, y, method=method, eps=0)
        want = geometry(net.double(), x.double(), y, method="exact", eps=0)
        assert got.residual.isinf().all() == (margin > 70)
        for name in ("grad_norm", "hessian_norm", "curvature") if margin < 70 else ():
            torch.testing.assert_close(getattr(got, name).double(), getattr(want, name), rtol=1e-2, atol=0)
