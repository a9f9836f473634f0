"""The measurements behind the figures against closed forms, numpy and autograd in float64."""

import copy
import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lcnn_utils import exercises, studies
from lcnn_utils.curvature import geometry
from lcnn_utils.figures.style import METHOD
from lcnn_utils.nn import CenteredSoftplus
from lcnn_utils.training import Recipe, fit, samples, state_path

pytestmark = pytest.mark.usefixtures("store")
X = torch.linspace(-4, 4, 41)


def moons_net(seed: int = 0, beta: float = 4.0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(2, 8), CenteredSoftplus(beta), nn.Linear(8, 8), CenteredSoftplus(beta), nn.Linear(8, 2)
    )


# ---- recipes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["standard", "lcnn"])
def test_the_recipes_differ_in_method_and_seed_alone(method):
    for make, dataset in ((measurements.moons_recipe, "moons"), (measurements.digits_recipe, "digits")):
        recipe = make(method, 3, epochs=2)
        assert (recipe.dataset, recipe.method, recipe.seed, recipe.epochs) == (dataset, method, 3, 2)
        assert make(method, 3, epochs=2) == recipe
    with pytest.raises(ValueError, match="unknown method"):
        measurements.moons_recipe("standrd")


# ---- activations -------------------------------------------------------------------------------------------------


def test_activation_frame_against_torch():
    betas = (0.3, 2.0, 20.0)
    frame = measurements.activation_frame(betas, X)
    assert list(frame.columns) == ["x", "activation", "beta", "value", "slope", "curvature"]
    assert len(frame) == len(X) * (1 + 2 * len(betas))
    x = X.double()
    relu = frame[frame.activation == "relu"]
    assert relu.beta.isna().all()
    np.testing.assert_array_equal(relu.value, F.relu(x))
    np.testing.assert_array_equal(relu.slope, (x > 0).double())
    assert (relu.curvature == 0).all()
    for beta in betas:
        z = x.clone().requires_grad_()
        value = F.softplus(z, beta, threshold=1e9)
        (slope,) = torch.autograd.grad(value.sum(), z, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), z)
        for name, shift in (("softplus", 0.0), ("centered", math.log(2) / beta)):
            part = frame[(frame.activation == name) & (frame.beta == beta)]
            np.testing.assert_allclose(part.x, x)
            np.testing.assert_allclose(part.value, value.detach() - shift, rtol=1e-9, atol=1e-13)
            np.testing.assert_allclose(part.slope, slope.detach(), rtol=1e-9)
            np.testing.assert_allclose(part.curvature, curvature, rtol=1e-6, atol=1e-14)


@settings(max_examples=50, deadline=None)
@given(st.floats(-30, 30), st.floats(0.01, 1000), st.integers(1, 30))
def test_compositions_against_their_closed_forms(x, beta, depth):
    """log(n + e^{βx})/β and log(1 + (e^{βx} − 1)/2ⁿ)/β, in a form that does not overflow."""
    plain, centered = measurements.composition(torch.tensor([x], dtype=torch.float64), beta, depth)
    expected = np.logaddexp(math.log(depth), beta * x) / beta
    assert plain.item() == pytest.approx(expected, rel=1e-9, abs=1e-9 / beta)
    t = beta * x
    inside = math.log1p(math.expm1(t) / 2**depth) if t < 700 else t - depth * math.log(2)
    assert centered.item() == pytest.approx(inside / beta, rel=1e-9, abs=1e-9 / beta)


def test_normalised_curvature_frame():
    """s₀″/s₀′ by autograd of torch's softplus in float64."""
    betas, points = (0.1, 2.0, 30.0), (-1.0, 0.0, 0.5)
    frame = measurements.normalised_curvature_frame(betas, points)
    assert list(frame.columns) == ["x", "beta", "normalised"]
    assert list(zip(frame.x, frame.beta, strict=True)) == [(x, beta) for x in points for beta in betas]
    for row in frame.itertuples():
        z = torch.tensor(row.x, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(F.softplus(z, row.beta, threshold=1e9), z, create_graph=True)
        (curvature,) = torch.autograd.grad(slope, z)
        assert row.normalised == pytest.approx((curvature / slope).item(), rel=1e-5)
        assert 0 < row.normalised <= row.beta


# ---- two moons ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resolution", [2, 5])
def test_moons_grid_against_numpy(resolution):
    left, right, low, high = measurements.MOONS_BOX
    x1, x2 = np.meshgrid(np.linspace(left, right, resolution), np.linspace(low, high, resolution))
    grid = measurements.moons_grid(resolution)
    np.testing.assert_allclose(grid, np.stack([x1.ravel(), x2.ravel()], 1), rtol=1e-6)


def test_the_box_holds_the_moons():
    left, right, low, high = measurements.MOONS_BOX
    for split in ("train", "test"):
        x, _ = samples(measurements.moons_recipe("standard"), split)
        assert left < x[:, 0].min() < x[:, 0].max() < right
        assert low < x[:, 1].min() < x[:, 1].max() < high


def fields_by_autograd(model: nn.Module, grid: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    margin = lambda point: (model(point[None])[0] * torch.tensor([-1.0, 1.0], dtype=point.dtype)).sum()
    values, curvatures = [], []
    for point in grid:
        gradient = torch.autograd.functional.jacobian(margin, point)
        hessian = torch.autograd.functional.hessian(margin, point)
        values.append(margin(point).item())
        curvatures.append((torch.linalg.svdvals(hessian)[0] / (gradient.norm() + 1e-6)).item())
    return np.array(values), np.array(curvatures)


def test_moons_fields_against_autograd():
    model, grid = moons_net().double(), measurements.moons_grid(4).double()
    model.train()
    margin, curvature = measurements.moons_fields(model, grid)
    assert model.training, "left as it was"
    expected_margin, expected_curvature = fields_by_autograd(model, grid)
    np.testing.assert_allclose(margin, expected_margin, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(curvature, expected_curvature, rtol=1e-8)


def test_moons_study_puts_each_field_at_its_point():
    models = {"standard": moons_net(0), "lcnn": moons_net(1)}
    frame, points = measurements.moons_study(models, resolution=3)
    assert frame.groupby("method", sort=False).size().to_dict() == {"standard": 9, "lcnn": 9}
    x, y = samples(measurements.moons_recipe("standard"), "test")
    for method, part in frame.groupby("method"):
        grid = torch.tensor(part[["x1", "x2"]].to_numpy(), dtype=torch.float64)
        margin, curvature = fields_by_autograd(copy.deepcopy(models[method]).double(), grid)
        np.testing.assert_allclose(part.margin, margin, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(part.curvature, curvature, rtol=1e-3)
        hits = models[method](x).argmax(1).numpy() == y.numpy()
        assert part.accuracy.unique() == pytest.approx([hits.mean()])
    x, y = samples(measurements.moons_recipe("standard"), "train")
    np.testing.assert_array_equal(points[["x1", "x2"]].to_numpy(np.float32), x)
    np.testing.assert_array_equal(points.label, y)


def test_with_beta_is_a_copy_with_one_beta():
    model = moons_net(beta=4.0)
    before = copy.deepcopy(model.state_dict())
    other = measurements.with_beta(model, 0.5)
    assert [m.beta.item() for m in other.modules() if isinstance(m, CenteredSoftplus)] == pytest.approx([0.5, 0.5])
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    x = torch.randn(5, 2)
    weights = [m for m in model if isinstance(m, nn.Linear)]
    h = weights[1](F.softplus(weights[0](x), 0.5) - math.log(2) / 0.5)
    torch.testing.assert_close(other(x), weights[2](F.softplus(h, 0.5) - math.log(2) / 0.5), rtol=1e-4, atol=1e-5)
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="beta"):
            measurements.with_beta(model, bad)
    with pytest.raises(ValueError, match="CenteredSoftplus"):
        measurements.with_beta(nn.Linear(2, 2), 1.0)


def test_beta_maps_frame_is_the_fields_of_each_net():
    models = {beta: moons_net(beta=beta) for beta in (1.0, 9.0)}
    frame = measurements.beta_maps_frame(models, 3)
    assert set(frame.columns) == {"x1", "x2", "beta", "margin", "curvature", "accuracy"}
    x, y = samples(measurements.moons_recipe("standard"), "test")
    for beta, part in frame.groupby("beta"):
        np.testing.assert_allclose(part[["x1", "x2"]].to_numpy(), measurements.moons_grid(3), rtol=1e-6)
        margin, curvature = fields_by_autograd(copy.deepcopy(models[beta]).double(), measurements.moons_grid(3).double())
        np.testing.assert_allclose(part.margin, margin, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(part.curvature, curvature, rtol=1e-3)
        assert part.accuracy.unique() == pytest.approx([(models[beta](x).argmax(1) == y).float().mean().item()])


def test_turning_of_one_bend_in_closed_form():
    """f = s₀(x₁; β) turns its gradient by σ(β) − σ(−β) between −1 and 1, all of it the Hessian's doing."""
    model = nn.Sequential(nn.Linear(2, 1), CenteredSoftplus(6.0), nn.Linear(1, 2))
    with torch.no_grad():
        for module, weight in ((model[0], [[1.0, 0.0]]), (model[2], [[0.0], [1.0]])):
            module.weight.copy_(torch.tensor(weight))
            module.bias.zero_()
    turned, accounted = measurements.turning(model, torch.tensor([-1.0, 0.3]), torch.tensor([1.0, 0.3]), steps=2000)
    expected = torch.sigmoid(torch.tensor(6.0)).item() - torch.sigmoid(torch.tensor(-6.0)).item()
    assert turned == pytest.approx(expected, rel=1e-5)
    assert accounted == pytest.approx(expected, rel=1e-4)
    assert next(model.parameters()).dtype == torch.float32, "the model given is not changed"


def test_turning_of_a_relu_is_unseen_by_its_hessian():
    model = nn.Sequential(nn.Linear(2, 1), nn.ReLU(), nn.Linear(1, 2))
    with torch.no_grad():
        for module, weight in ((model[0], [[1.0, 0.0]]), (model[2], [[0.0], [1.0]])):
            module.weight.copy_(torch.tensor(weight))
            module.bias.zero_()
    turned, accounted = measurements.turning(model, torch.tensor([-1.0, 0.3]), torch.tensor([1.5, 0.3]), steps=1001)
    assert turned == pytest.approx(1.0)
    assert accounted == 0


# ---- digits ------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch):
    def recipe(method, seed=0, *, epochs=1):
        return Recipe("digits", method, "resnet10", width=2, seed=seed, epochs=epochs, batch_size=512)

    monkeypatch.setattr(studies, "digits_recipe", recipe)
    return recipe


def test_digits_study(tiny, store):
    frame = measurements.digits_study((0,), epochs=1, device="cpu", images=8)
    assert set(frame.columns) == {
        "label", "method", "seed", "image", "grad_norm", "hessian_norm", "curvature", "margin_curvature", "correct",
        "accuracy",
    }  # fmt: skip
    assert frame.groupby("method", sort=False).size().to_dict() == {"standard": 8, "relu_reading": 8, "lcnn": 8}
    assert all(METHOD[row.method][0] == row.label for row in frame.drop_duplicates("method").itertuples())
    assert np.isfinite(frame[["grad_norm", "hessian_norm", "curvature"]]).all(axis=None)
    np.testing.assert_allclose(frame.curvature, frame.hessian_norm / (frame.grad_norm + 1e-6), rtol=1e-5)
    for method, part in frame.groupby("method"):
        assert part.image.tolist() == list(range(8))
        assert part.accuracy.unique() == pytest.approx([part.correct.mean()]), method
    accuracy = frame.groupby("method").accuracy.first()
    assert accuracy["relu_reading"] == pytest.approx(accuracy["standard"], abs=0.13), "β = 1000 is nearly a ReLU"
    states = {state_path(tiny(method)) for method in ("standard", "lcnn")}
    assert set(store.rglob("*.safetensors")) == states, "one training a method; the reading as ReLU needs none"
    model, _ = fit(tiny("standard"), device="cpu", progress=False)
    x, y = samples(tiny("standard"), "test")
    part = frame[frame.method == "standard"]
    np.testing.assert_array_equal(part.correct, (model(x[:8]).argmax(1) == y[:8]).numpy())
    gradient = torch.func.vmap(torch.func.grad(lambda x, y: F.cross_entropy(model(x[None]), y[None])))(x[:8], y[:8])
    np.testing.assert_allclose(part.grad_norm, gradient.flatten(1).norm(dim=1).detach(), rtol=1e-3, atol=1e-6)
    exact = geometry(model, x[:3], y[:3], scalar="margin", method="exact").curvature
    np.testing.assert_allclose(part.margin_curvature[:3], exact, rtol=1e-2, atol=1e-6)


def test_vanishing_gradient_agrees_with_the_exercise(capsys):
    assert exercises.why_curved(measurements.vanishing_gradient), capsys.readouterr().out


def test_geometry_table_by_hand():
    rows = [
        ("B", 0, 1.0, 2.0, 3.0, 0.5), ("B", 0, 3.0, 4.0, 5.0, 0.5), ("B", 0, 5.0, 9.0, 40.0, 0.5),
        ("B", 1, 2.0, 2.0, 2.0, 0.7), ("B", 1, 2.0, 2.0, 2.0, 0.7), ("B", 1, 2.0, 2.0, 5.0, 0.7),
        ("A", 0, 1.0, 1.0, 1.0, 1.0), ("A", 1, 1.0, 1.0, 1.0, 1.0),
    ]  # fmt: skip
    frame = pd.DataFrame(rows, columns=["label", "seed", "grad_norm", "hessian_norm", "curvature", "accuracy"])
    frame["margin_curvature"] = 2 * frame.curvature
    table = measurements.geometry_table(frame).set_index("net")
    assert list(table.index) == ["B", "A"], "in the order of the frame"
    # B: means of ‖∇f‖ are 3 and 2; of ‖∇²f‖ 5 and 2; of C 16 and 3; medians of C 5 and 2; standard deviation |a−b|/√2
    assert table.loc["B"].to_dict() == {
        "‖∇f‖": "2.5 ± 0.71", "‖∇²f‖": "3.5 ± 2.1", "C": "9.5 ± 9.2", "C of the margin": "19 ± 18",
        "accuracy %": "60 ± 14", "median C": "3.5 ± 2.1",
    }  # fmt: skip
    assert (table.loc["A"].drop(["accuracy %", "C of the margin"]) == "1 ± 0").all()
    assert table.loc["A", "accuracy %"] == "100 ± 0"


def test_convergence_frame():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 16), CenteredSoftplus(5.0), nn.Linear(16, 16), CenteredSoftplus(5.0), nn.Linear(16, 3)
    ).double()
    x, y = torch.randn(5, 6).double(), torch.tensor([0, 1, 2, 0, 1])
    frame = measurements.convergence_frame(model.train(), x, y, products=12)
    assert model.training, "left as it was"
    assert list(frame.columns) == ["estimator", "products", "sample", "estimate", "exact", "error"]
    assert frame.estimator.nunique() == 3
    assert (frame.groupby(["estimator", "products"])["sample"].agg(list).map(lambda s: s == list(range(5)))).all()
    f = lambda x, y: F.cross_entropy(model(x[None]), y[None])
    hessians = torch.stack([torch.autograd.functional.hessian(lambda x, y=yi: f(x, y), xi) for xi, yi in zip(x, y)])  # noqa: B905
    np.testing.assert_allclose(frame.exact, np.tile(torch.linalg.matrix_norm(hessians, 2), 3 * 12), rtol=1e-9)
    np.testing.assert_allclose(
        frame.error, ((frame.estimate - frame.exact).abs() / frame.exact).clip(lower=1e-7), rtol=1e-9
    )
    worst = frame.groupby(["estimator", "products"]).error.max()
    assert (worst["Lanczos"].loc[6:] == 1e-7).all(), "as many products as dimensions give everything"
    power = frame[frame.estimator == "power iteration, ‖Hu‖"].pivot(index="products", columns="sample", values="error")
    assert (power.diff().iloc[1:] <= 1e-12).all(axis=None), "‖Hu‖ never decreases, and never exceeds the norm"
    assert power.iloc[-1].median() < power.iloc[0].median() / 5
    published = frame[frame.estimator == "power iteration, |uᵀHu| (published)"]
    assert (published.estimate <= published.exact * (1 + 1e-9)).all(), "a Rayleigh quotient"
    u = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    for k in range(1, 4):  # the authors' loop, on the matrices
        u = u / u.norm(dim=1, keepdim=True)
        w = (hessians @ u[:, :, None])[:, :, 0]
        np.testing.assert_allclose(published[published.products == k].estimate, (u * w).sum(1).abs(), rtol=1e-8)
        u = w
